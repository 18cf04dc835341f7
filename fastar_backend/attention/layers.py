"""The caches of all layers of one stream, as the stream engine holds them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol, Self

from torch import Tensor

from fastar_backend.attention import guard
from fastar_backend.attention.baselines.flow_cache import FlowCache
from fastar_backend.attention.baselines.radial import RadialCache
from fastar_backend.attention.baselines.svg1 import Svg1Cache
from fastar_backend.attention.baselines.svg2 import Svg2Cache
from fastar_backend.attention.cache import CacheShape, FrameCache
from fastar_backend.attention.sparse_cache import SparseCache
from fastar_backend.attention.temp_cache import TempCache
from fastar_backend.config import AttentionConfig

SPARSE = {"radial": RadialCache, "svg1": Svg1Cache, "svg2": Svg2Cache}


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """Of one chunk. tokens: cached per head, mean over layers; executed, possible: query-key pairs of the chunk's
    self-attention, summed over layers; merged: tokens that went into a group so far, mean over layers and heads."""

    tokens: float
    executed: float
    possible: float
    merged: float
    guard: tuple[float, float] | None = None  # recall and error of AnnSA, sampled (guard.py); None: not watched


class Caches(Protocol):
    """A sequence with one cache per layer, and what is done to all of them."""

    def __iter__(self) -> Iterator[Any]: ...
    def __getitem__(self, layer: int) -> Any: ...
    def __len__(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def begin(self, start: int) -> None:
        """Makes `start` (a latent frame index) position 0 of the chunk that begins."""

    def commit(self) -> None:
        """Ends a chunk, after the pass that wrote it."""

    def configure(self, config: AttentionConfig) -> None:
        """Another `sparse_density`, from the next chunk on."""

    def stats(self) -> CacheStats: ...
    def fork(self) -> Self:
        """A copy; it may share the tensors until one side begins its next chunk."""

    def state(self) -> tuple[Any, dict[str, Tensor]]:
        """Numbers (JSON) and tensors that `load` takes back. The tensors are views that nobody will write to."""

    def load(self, numbers: Any, tensors: dict[str, Tensor]) -> None:
        """Into new caches of the same configuration. Raises KeyError, TypeError, ValueError, RuntimeError."""


def make_cache(shape: CacheShape, config: AttentionConfig, layer: int = 0) -> FrameCache:
    """The portable cache of one layer (0 is the first) of one stream."""
    if config.kind == "dense":
        return FrameCache(shape) if config.sparse_density >= 1 else SparseCache(shape, config)
    if config.kind == "window":
        return FrameCache(shape, config.budget_frames, config.sink_frames)
    if config.kind == "flowcache":
        return FlowCache(shape, config)
    if config.kind in SPARSE:
        return SPARSE[config.kind](shape, config, layer)
    return TempCache(shape, config)


class PortableCaches:
    """Each layer by itself, in plain PyTorch: any device, any setting."""

    def __init__(self, shape: CacheShape, config: AttentionConfig, layers: int) -> None:
        self.shape, self.config = shape, config
        self.layers = [make_cache(shape, config, layer) for layer in range(layers)]

    def __iter__(self) -> Iterator[FrameCache]:
        return iter(self.layers)

    def __getitem__(self, layer: int) -> FrameCache:
        return self.layers[layer]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.layers)

    def begin(self, start: int) -> None:
        samples = guard.plan(self.config, self.shape, len(self.layers), start)
        for cache, sample in zip(self.layers, samples, strict=True):
            cache.begin(start)
            if isinstance(cache, TempCache):
                cache.sample, cache.measured = sample, None

    def skip(self) -> None:
        """A pass of this chunk that is not made: nothing executed where dense attention would have been."""
        for cache in self.layers:
            cache.count_pairs(self.shape.chunk_tokens, 0)

    def commit(self) -> None:
        """Nothing: each layer takes its chunk in as it is written."""

    def configure(self, config: AttentionConfig) -> None:
        self.config = config
        for cache in self.layers:
            cache.config = config

    def stats(self) -> CacheStats:
        count = len(self.layers)
        measured = [getattr(cache, "measured", None) for cache in self.layers]
        return CacheStats(
            sum(cache.tokens for cache in self.layers) / count,
            sum(cache.executed for cache in self.layers),
            sum(cache.possible for cache in self.layers),
            sum(getattr(cache, "merged", 0.0) for cache in self.layers) / count,
            guard.summary([pair for pair in measured if pair is not None], self.config),
        )

    def fork(self) -> PortableCaches:
        twin = copy.copy(self)
        twin.layers = [cache.fork() for cache in self.layers]
        return twin

    def state(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        numbers, tensors = [], {}
        for layer, cache in enumerate(self.layers):
            own, values = cache.state()
            numbers.append(own)
            tensors |= {f"{layer}.{name}": value for name, value in values.items()}
        return numbers, tensors

    def load(self, numbers: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        for layer, cache in enumerate(self.layers):
            prefix = f"{layer}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            cache.load(numbers[layer], own)
