"""A recorder of chunks that does as CUDA graphs do, on any device: recording does no work, a replay does it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastar_backend.attention.flat_cache import FlatCaches
from fastar_backend.engine.engine import StreamEngine


class Rerun:
    """One recording of `act`, which changes the tensors of `state` and returns new ones."""

    def __init__(self, act: Callable[[], tuple[Tensor, ...]], state: list[Tensor]) -> None:
        before = [tensor.clone() for tensor in state]
        self.act, self.outputs = act, act()
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        for output in self.outputs:
            output.fill_(-1)

    def replay(self) -> None:
        for mine, fresh in zip(self.outputs, self.act(), strict=True):
            mine.copy_(fresh)


class Recorder:
    """engine: whose streams' caches a chunk changes; may be given later. count: of recordings."""

    def __init__(self, engine: StreamEngine | None = None) -> None:
        self.engine, self.count = engine, 0

    def record(self, act: Callable[[], tuple[Tensor, ...]]) -> Rerun:
        self.count += 1
        caches = [stream.caches for stream in self.engine.streams.values()]
        return Rerun(act, [getattr(cache, name) for cache in caches for name in FlatCaches.TENSORS])
