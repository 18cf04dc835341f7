"""Checkpoints of the Wan2.1 family -> `CausalDiT`, tensor by tensor, so that memory never holds the weights twice."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastar_backend.config import ModelConfig
from fastar_backend.errors import WeightsError
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.wan_names import generator_names, native
from fastar_backend.model.weight_files import first_line, locate, read_tensors

__all__ = ["load_transformer", "read_tensors"]
STEM = "diffusion_pytorch_model"
_FILES = ("config.json", f"{STEM}*.safetensors", f"{STEM}*.safetensors.index.json")
_PATTERNS = (*_FILES, *(f"transformer/{name}" for name in _FILES))
_LORA_FILES = ("adapter_model.safetensors", "adapter_config.json")
_LORA_NAME = re.compile(r"(?P<module>.+)\.(lora_(?P<side>[AB])(\.default)?\.weight|(?P<alpha>alpha))")
# What a config.json says that no tensor's shape tells: its name there (diffusers', Wan's) -> ours.
_SAID = {"num_attention_heads": "heads", "num_heads": "heads", "eps": "eps"}
_SHOWN = 8  # problems named in an error; all are counted
_Shapes = dict[str, tuple[int, ...]]


def load_transformer(
    source: str, config: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ema: bool = True, lora: str | None = None,
) -> CausalDiT:  # fmt: skip
    """A transformer for inference (no gradients) with the weights of `source`: a local file (.safetensors, .pt, .pth),
    a local folder (Wan's, or of diffusers), or a hub id, org/name or org/name:path/in/repo.

    Layouts: Wan's own; diffusers'; Self-Forcing's and Rolling-Forcing's (`ema`: the running average is preferred to
    the last weights); LongLive's, a base and `lora`, a source in PEFT's layout that is merged into the base (scale
    alpha / rank; alpha = rank, as in LongLive, if neither the file nor an adapter_config.json beside it says so).
    Raises WeightsError: what cannot be read, or one that counts what is missing, unexpected or of another shape.
    """
    files = _transformer_files(locate(source, _PATTERNS), source, config)
    tensors = read_tensors(files)
    with torch.device("meta"):
        model = CausalDiT(config)
    want = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = generator_names(tensors, ema)
    if not found:
        raise WeightsError(f"weights: {source} holds only a running average (generator_ema); allowed: ema=True")
    names = _fit(source, tensors, found, want)
    updates = _read_lora(lora, want) if lora else {}
    for name, there in names.items():
        value = tensors[there]
        if name in updates:
            value = updates[name].add(value.to(device, torch.float32))
        value = torch.empty(value.shape, device=device, dtype=dtype).copy_(value)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
    return model.to(device).eval()  # moves the rotary tables; the parameters are there


def _transformer_files(path: Path, source: str, config: ModelConfig) -> list[Path]:
    """The file itself, or a folder's safetensors files, whose config.json must not contradict `config`."""
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    said = _read_json(folder / "config.json")
    for key, field in _SAID.items():
        if key in said and said[key] != getattr(config, field):
            raise WeightsError(
                f"weights: {source} has {key} {said[key]!r:.40}, not {getattr(config, field)}; "
                f"allowed: a configuration with these {field}"
            )
    whole = folder / f"{STEM}.safetensors"
    if whole.is_file():
        return [whole]
    index = _read_json(folder / f"{STEM}.safetensors.index.json").get("weight_map", {})
    shards = [folder / str(name) for name in sorted(set(index.values()))] if isinstance(index, dict) else []
    shards = shards or sorted(folder.glob(f"{STEM}-*-of-*.safetensors"))
    if not shards:
        raise WeightsError(
            f"weights: {source} has no {STEM}*.safetensors; allowed: a folder of Wan's or of diffusers', or a file"
        )
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    """{} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"weights: cannot read {path} ({first_line(error)}); allowed: a JSON object") from None
    if not isinstance(value, dict):
        raise WeightsError(f"weights: {path} is no JSON object; allowed: a JSON object")
    return value


def _fit(source: str, tensors: Mapping[str, Tensor], found: dict[str, str], want: _Shapes) -> dict[str, str]:
    """Our name -> the file's, for every parameter. found: the file's names -> ours."""
    names: dict[str, str] = {}
    unexpected = []
    for there, name in found.items():
        if name in want and name not in names:
            names[name] = there
        else:
            unexpected.append(f"unexpected {there}")
    missing = [f"missing {name}" for name in want if name not in names]
    wrong = []
    for name, there in names.items():
        value = tensors[there]
        if tuple(value.shape) != want[name]:
            wrong.append(f"{name} is {tuple(value.shape)}, not {want[name]}")
        elif not value.is_floating_point():
            wrong.append(f"{name} is {value.dtype}, not a float type")
    if missing or unexpected or wrong:
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} of another shape or type"
        named = _first(missing, unexpected, wrong)
        raise WeightsError(f"weights: {source} does not fit the configuration: {counts}: {'; '.join(named)}")
    return names


def _first(*kinds: list[str]) -> list[str]:
    """The first few problems, in turn of each kind, so that none hides another."""
    turns = zip_longest(*kinds)
    return [problem for turn in turns for problem in turn if problem is not None][:_SHOWN]


class _Update(NamedTuple):
    """weight += scale * up @ down (Hu et al. 2021, section 4.1)."""

    tensors: Mapping[str, Tensor]
    down: str  # lora_A, [rank, in]
    up: str  # lora_B, [out, rank]
    scale: float

    def add(self, weight: Tensor) -> Tensor:
        """weight: float32 [out, in] on the device of the sum."""
        down, up = (self.tensors[name].to(weight) for name in (self.down, self.up))
        return torch.addmm(weight, up, down, alpha=self.scale)


def _read_lora(source: str, want: _Shapes) -> dict[str, _Update]:
    """Our weight's name -> its update."""
    path = locate(source, _LORA_FILES)
    said = _read_json((path if path.is_dir() else path.parent) / "adapter_config.json")
    tensors = read_tensors(path / "adapter_model.safetensors" if path.is_dir() else path)
    if any(name.startswith("generator_lora.") for name in tensors):  # LongLive's training files have a critic's, too
        names = [name for name in tensors if name.startswith("generator_lora.")]
    else:
        names = list(tensors)
    parts: dict[str, dict[str, str]] = {}
    problems = [f"{key} is not supported" for key in ("use_dora", "use_rslora", "alpha_pattern") if said.get(key)]
    for there in names:
        found = _LORA_NAME.fullmatch(there)
        name = native(f"{found['module']}.weight") if found else there
        if found is None or name not in want:
            problems.append(f"unexpected {there}")
        else:
            parts.setdefault(name, {})[found["side"] or "alpha"] = there
    updates = {}
    for name, part in parts.items():
        if not {"A", "B"} <= part.keys():
            problems.append(f"{name} has no pair lora_A, lora_B")
            continue
        down, up = tensors[part["A"]].shape, tensors[part["B"]].shape
        if len(down) != 2 or len(up) != 2 or (up[0], down[1]) != want[name] or up[1] != down[0]:
            problems.append(f"{name} is {want[name]}, not lora_B {tuple(up)} times lora_A {tuple(down)}")
            continue
        rank = down[0]
        alpha = tensors[part["alpha"]].item() if "alpha" in part else said.get("lora_alpha", rank)
        updates[name] = _Update(tensors, part["A"], part["B"], float(alpha) / rank)
    if problems or not updates:
        shown = "; ".join(problems[:_SHOWN]) or "no lora_A, lora_B"
        raise WeightsError(f"weights: the LoRA {source} does not fit the model: {len(problems)} problems: {shown}")
    return updates
