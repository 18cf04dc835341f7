"""All that a stream is, as bytes: safetensors, with a JSON header in its metadata under the key "fastar".

Header: version, world (name), fingerprint (of weights and configuration), chunk (number of the next one), cache_bytes,
stream (numbers of the stream and of each layer's cache), extra (the service's own), sha256 (of all else). Tensors:
"prompt", "target", "origin" (embedded prompts: the text itself is not stored), "noise" (the generator), and
"<layer>.<name>" of the caches, their used parts only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastar_backend.engine.stream import Stream
from fastar_backend.errors import SnapshotError
from fastar_backend.model.world import World

VERSION = 2
HEADER_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Immutable. Taking one copies no cache: the stream makes its own copy when it goes on."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def take(cls, stream: Stream, world: str, fingerprint: str, extra: dict[str, Any]) -> Snapshot:
        numbers, tensors = stream.state()
        header = {
            "version": VERSION, "world": world, "fingerprint": fingerprint, "chunk": stream.chunk,
            "cache_bytes": stream.cache_bytes, "stream": numbers, "extra": json.loads(json.dumps(extra)),
        }  # fmt: skip
        return cls(header, tensors)

    @property
    def chunk(self) -> int:
        """The number of the next chunk."""
        return self.header["chunk"]

    @property
    def cache_bytes(self) -> int:
        return self.header["cache_bytes"]

    @property
    def extra(self) -> dict[str, Any]:
        return self.header["extra"]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to_bytes(self) -> bytes:
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.tensors.items()}
        header = self.header | {"sha256": digest(self.header, tensors)}
        return safetensors.torch.save(tensors, {"fastar": json.dumps(header)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """Raises SnapshotError: torn, or of another version."""
        try:
            size = int.from_bytes(data[:8], "little")
            if not 0 < size <= min(HEADER_BYTES, len(data) - 8):
                raise ValueError("no header")
            header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fastar"])
            version = header["version"]
            if version != VERSION:
                what = f"snapshot: it has version {version!r:.20}"
                raise SnapshotError(f"{what}; allowed: version {VERSION}, of this release")
            tensors = safetensors.torch.load(data)
            if header.pop("sha256") != digest(header, tensors):
                raise ValueError("checksum")
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            SafetensorError,
            RuntimeError,
        ) as error:
            reason = "its checksum is wrong" if str(error) == "checksum" else "its format is broken"
            raise SnapshotError(f"snapshot: torn ({len(data)} bytes, {reason}); allowed: an earlier one") from None
        return cls(header, tensors)


def digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """sha256 of the header and of every tensor's name, type, shape and bytes."""
    result = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        result.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def fingerprint(world: World) -> str:
    """Of configuration and weights: streams of one world mean nothing to another."""
    modules = {"dit": world.dit, "text": world.text, "autoencoder": world.autoencoder, "decoder": world.decoder}
    weights = {
        f"{name}.{key}": value
        for name, part in modules.items()
        if isinstance(part, torch.nn.Module)  # umT5 is named by the configuration, and mostly not in memory
        for key, value in part.state_dict().items()
    }
    return digest(world.config.model_dump(mode="json"), weights)
