"""What turns a stream's latents into pixels: one interface, two decoders of the Wan2.1 family, and their loading.

Decoders hold weights only. What a stream's next chunk depends on is a `State`, which `decode` takes and returns anew:
forks and snapshots may share an old one, and a dictionary of tensors is all there is to store.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastar_backend.errors import WeightsError
from fastar_backend.model.taehv import TinyDecoder
from fastar_backend.model.wan_vae import MEAN, STD, State, WanDecoder, native_name
from fastar_backend.model.weight_files import locate, read_tensors

__all__ = ["Decoder", "State", "check_state", "load_decoder", "pixel_frames", "state_bytes"]

STRIDE = 8  # pixels per latent in height and width
TIME_STRIDE = 4  # frames per latent, but one for a stream's first
Kind = Literal["wan", "taehv"]
_SHOWN = 8  # problems named in an error; all are counted
_FILES = {
    "wan": ("Wan2.1_VAE.pth", "diffusion_pytorch_model.safetensors"),
    "taehv": ("taew2_1.pth", "taew2_1.safetensors"),
}
# What to get of a whole hub repository: there, diffusion_pytorch_model.safetensors is the transformer.
_AT_THE_TOP = {
    "wan": ("Wan2.1_VAE.pth", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    "taehv": _FILES["taehv"],
}
_OTHER_HALF = {"wan": ("encoder.", "conv1.", "quant_conv."), "taehv": ("encoder.",)}
# A tensor whose first dimension is the decoder's `dim`, and the published one.
_DIM = {"wan": ("decoder.head.0.gamma", 96), "taehv": ("decoder.1.weight", 256)}
_DECODERS = {"wan": WanDecoder, "taehv": TinyDecoder}


class Decoder(Protocol):
    def state(self) -> State:
        """A fresh stream's: empty."""

    def state_shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int, int]]:
        """The state after any chunk of latents of that height and width: the shape of each of its tensors."""

    def decode(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        """latents: [F, 16, h, w] of one stream's chunk -> pixels [frames, 3, 8 h, 8 w] in -1..1, not clamped, in the
        weights' dtype and channels-last memory, and the new state. `state` is not written to."""


def pixel_frames(latent_frames: int, first: bool) -> int:
    """Frames of a chunk. first: it is the stream's first."""
    return TIME_STRIDE * latent_frames - (TIME_STRIDE - 1 if first else 0)


def state_bytes(decoder: Decoder, height: int, width: int, dtype: torch.dtype) -> int:
    """Memory of a stream's state after any of its chunks; nothing is computed. height, width: of its latents."""
    return dtype.itemsize * sum(math.prod(shape) for shape in decoder.state_shapes(height, width).values())


def check_state(decoder: Decoder, state: Mapping[str, Tensor], height: int, width: int, dtype: torch.dtype) -> None:
    """Is it a fresh stream's, or one that `decode` can go on with? Raises ValueError."""
    shapes = decoder.state_shapes(height, width) if state else {}
    if state.keys() != shapes.keys():
        raise ValueError(f"decoder: {len(state.keys() ^ shapes.keys())} tensors too many or too few")
    for name, value in state.items():
        if tuple(value.shape) != shapes[name] or value.dtype != dtype:
            raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, not {dtype} {list(shapes[name])}")


def load_decoder(kind: Kind, source: str, device: torch.device | str, dtype: torch.dtype) -> WanDecoder | TinyDecoder:
    """source: a local file (.pth, .safetensors), a local folder, or a hub id (org/name, org/name:path/in/repo).
    wan: Wan2.1_VAE.pth, or a diffusers pipeline or its vae folder; taehv: taew2_1.pth. Of any `dim`. For inference: no
    gradients. Raises WeightsError: what cannot be read, or one that counts what is missing, unexpected or unfit.
    """
    if kind not in _DECODERS:
        raise WeightsError(f"decoder: got {kind!r:.40}; allowed: {', '.join(_DECODERS)}")
    tensors = read_tensors(_file(kind, source))
    names: dict[str, str] = {}  # ours -> the file's
    for there in tensors:
        if not there.startswith(_OTHER_HALF[kind]):
            name = native_name(there) if kind == "wan" else there
            names[there if name in names else name] = there
    telling, dim = _DIM[kind]
    if telling in names and tensors[names[telling]].ndim:
        dim = tensors[names[telling]].shape[0]
    with torch.device("meta"):  # a wrong file may tell a huge one
        want = {name: tuple(value.shape) for name, value in _DECODERS[kind](dim).state_dict().items()}
    _check(f"{source} is no {kind} decoder", {name: tensors[there] for name, there in names.items()}, want)
    decoder = _DECODERS[kind](dim).to(device, dtype).eval().requires_grad_(False)
    for name, weight in decoder.state_dict().items():
        weight.copy_(tensors[names[name]])
    return decoder


def _file(kind: Kind, source: str) -> Path:
    inside = ("config.json", *_FILES[kind]) if ":" in source else ()
    path = locate(source, (*_AT_THE_TOP[kind], *inside))
    if path.is_file():
        return path
    found = [folder / name for name in _FILES[kind] for folder in (path / "vae", path) if (folder / name).is_file()]
    if not found:
        raise WeightsError(f"weights: {source} has no {' nor '.join(_FILES[kind])}; allowed: a folder with one, a file")
    if kind == "wan":
        _check_statistics(found[0].parent / "config.json")
    return found[0]


def _check_statistics(path: Path) -> None:
    """Of the latents, in a diffusers config.json, if there is one: they must be Wan2.1's."""
    try:
        said = json.loads(path.read_text()) if path.is_file() else {}
        same = [said.get(key, list(own)) == list(own) for key, own in (("latents_mean", MEAN), ("latents_std", STD))]
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"weights: cannot read {path} ({type(error).__name__}); allowed: a JSON object") from None
    if not all(same):
        raise WeightsError(f"weights: {path} has another latents_mean or latents_std; allowed: Wan2.1's")


def _check(what: str, have: Mapping[str, Tensor], want: Mapping[str, tuple[int, ...]]) -> None:
    missing = sorted(f"missing {name}" for name in want.keys() - have.keys())
    unexpected = sorted(f"unexpected {name}" for name in have.keys() - want.keys())
    wrong = [
        f"{name} is {value.dtype} {tuple(value.shape)}, not float {want[name]}"
        for name, value in sorted(have.items())
        if name in want and (tuple(value.shape) != want[name] or not value.is_floating_point())
    ]
    if problems := missing + unexpected + wrong:
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} of another shape or type"
        raise WeightsError(f"weights: {what}: {counts}: {'; '.join(problems[:_SHOWN])}")
