"""Names of a Wan transformer's parameters in the checkpoints of its family -> Wan's own names, which `CausalDiT` has.

Wan and what is distilled from it (Self-Forcing, Rolling-Forcing, LongLive) differ in what is wrapped around the names;
diffusers has names of its own, among them a swap: its norm2 is Wan's norm3."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Self-Forcing's files hold the trained weights, their running average, or both; training checkpoints, a critic too.
GENERATORS = ("generator_ema", "generator")
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_PREFIXES = re.compile(r"((state_dict|module|model|base_model|diffusion_model|transformer|generator_lora)\.)+")
_DIFFUSERS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
        (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^proj_out\.", "head.head."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
        (r"^(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
        (r"^(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
        (r"_attn\.to_out\.0\.", "_attn.o."),
        (r"_attn\.to_([qkv])\.", r"_attn.\1."),
        (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
    )
)


def native(name: str) -> str:
    """Wan's own name of a parameter. A name that has none comes back with its wrappers removed."""
    name = _WRAPPERS.sub("", name)
    if prefix := _PREFIXES.match(name):
        name = name[prefix.end() :]
    for pattern, replacement in _DIFFUSERS:
        name = pattern.sub(replacement, name)
    return name


def generator_names(names: Iterable[str], ema: bool) -> dict[str, str]:
    """Name in the file -> the generator's name of it. Of a file that holds several networks: the generator, its running
    average if `ema` and there is one. Empty if only the average is there and `ema` is false."""
    names = list(names)
    held = [root for root in GENERATORS if any(name.startswith(f"{root}.") for name in names)]
    if not held:
        return {name: native(name) for name in names}
    wanted = [root for root in held if ema or root == "generator"]
    if not wanted:
        return {}
    return {name: native(name.removeprefix(f"{wanted[0]}.")) for name in names if name.startswith(f"{wanted[0]}.")}
