"""Where weights come from: a local file or folder, or the Hugging Face hub; and their tensors, one at a time."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastar_backend.errors import WeightsError

SUFFIXES = (".safetensors", ".pt", ".pth")
ALLOWED = "a local file (.safetensors, .pt, .pth), a local folder, or a hub id (org/name or org/name:path/in/repo)"
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<inside>[^:]+))?")


def locate(source: str, patterns: Sequence[str]) -> Path:
    """Local path of `source`. What is on the hub is downloaded, or taken from the hub's cache; of a repository (or of
    its folder `path/in/repo`) only what fits `patterns`. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured. Raises
    WeightsError."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    found = _HUB_ID.fullmatch(source)
    if found is None or (found["inside"] is None and path.suffix in SUFFIXES):
        raise WeightsError(f"weights: {source} does not exist; allowed: {ALLOWED}")
    try:
        import huggingface_hub
    except ImportError:
        raise WeightsError(
            f"weights: {source} is not a local path, and huggingface_hub is not installed; "
            "allowed: a local path, or pip install 'fastar-serve[wan]'"
        ) from None
    repo, inside = found["repo"], (found["inside"] or "").strip("/")
    try:
        if Path(inside).suffix in SUFFIXES:
            return Path(huggingface_hub.hf_hub_download(repo, inside))
        wanted = [f"{inside}/{pattern}" if inside else pattern for pattern in patterns]
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted)) / inside
    except Exception as error:  # the hub's client raises a dozen families: HTTP, offline, not found, gated, bad ids
        raise WeightsError(
            f"weights: {source} is neither here nor to be had from the hub ({first_line(error)}); allowed: {ALLOWED}"
        ) from None


def read_tensors(path: str | Path | Sequence[Path]) -> Mapping[str, Tensor]:
    """Name -> CPU tensor of a .safetensors file (or several, as one), or of a .pt or .pth file.

    Nothing is read before a tensor's values are, so copy what is to outlive the file. Nested dictionaries of a .pt file
    have dotted names; what is no tensor is left out. No code of a file is ever run. Raises WeightsError."""
    paths = [Path(path)] if isinstance(path, str | Path) else list(path)
    if all(each.suffix == ".safetensors" for each in paths):
        return _SafeTensors(paths)
    if len(paths) > 1 or paths[0].suffix not in SUFFIXES:
        raise WeightsError(f"weights: cannot read {paths[0]}; allowed: {', '.join(SUFFIXES)}")
    try:
        if not zipfile.is_zipfile(paths[0]):
            raise ValueError("no whole zip archive")
        loaded = torch.load(paths[0], map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # whose message recommends to run the code
        raise _unreadable(paths[0], "corrupt, or more than tensors: code or Python objects") from None
    except (OSError, EOFError, KeyError, ValueError, RuntimeError) as error:
        raise _unreadable(paths[0], first_line(error)) from None
    tensors = dict(_flat(loaded))
    if not tensors:
        raise WeightsError(f"weights: {paths[0]} holds no named tensors; allowed: a (nested) dictionary of tensors")
    return tensors


class _SafeTensors(Mapping[str, Tensor]):
    """A file is opened anew for each tensor: pages that an open mapping has read stay in the process's memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._where: dict[str, Path] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    self._where |= dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError) as error:
                raise _unreadable(path, first_line(error)) from None

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._where[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _unreadable(path: Path, why: str) -> WeightsError:
    return WeightsError(
        f"weights: cannot read {path} ({why}); allowed: a whole .safetensors file, or one of torch.save (since 1.6) "
        "with tensors only"
    )


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, Tensor) and prefix:
        yield prefix, value


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
