"""Attention of a batch of streams: splits the batch, lets each stream's own caches attend, and joins the results.

These objects are what the transformer calls (`SelfAttend`, `CrossAttend`), one per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastar_backend.attention.ann_ca import TextCache
from fastar_backend.attention.cache import CacheShape, FrameCache
from fastar_backend.attention.recall import RecallProbe


class StreamsAttend:
    """Self-attention of one layer. Positions are relative to each stream's chunk, hence equal for all streams.

    write: take keys and values into the caches (the clean pass). progress: share of denoising steps done, 0..1. Caches
    are the layer's `FrameCache`s (portable) or `FlatLayer`s (by kernels).
    """

    def __init__(self, shape: CacheShape, caches: Sequence[Any], probes: Sequence[RecallProbe | None], *,
                 progress: float, write: bool) -> None:  # fmt: skip
        self.shape, self.caches, self.probes = shape, caches, probes
        self.progress, self.write = progress, write
        frames = torch.arange(shape.chunk_frames, device=shape.device)
        self.positions = frames.repeat_interleave(shape.frame_tokens)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not any(isinstance(cache, FrameCache) for cache in self.caches):
            return self._by_kernels(query, key, value)
        if not all(isinstance(cache, FrameCache) for cache in self.caches):  # streams with other settings in one step
            rows = zip(self.caches, self.probes, query.split(1), key.split(1), value.split(1), strict=True)
            return torch.cat([self._alone(cache, probe)(q, k, v) for cache, probe, q, k, v in rows])
        return self._portable(query, key, value)

    def _alone(self, cache: Any, probe: RecallProbe | None) -> StreamsAttend:
        return StreamsAttend(self.shape, [cache], [probe], progress=self.progress, write=self.write)

    def _by_kernels(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = zip(self.caches, query, key, value, strict=True)
        return _stacked([cache.attend(q, k, v, self.progress, self.write) for cache, q, k, v in rows])

    def _portable(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [streams, heads, tokens, head_dim]
        query, key = self.shape.turn(query, self.positions), self.shape.turn(key, self.positions)
        out = torch.empty_like(query)
        for row, (cache, probe) in enumerate(zip(self.caches, self.probes, strict=True)):
            q, k, v = query[row], key[row], value[row]
            out[row] = cache.attend(q, k, v, self.progress)
            if probe is not None:
                probe.measure(q, k, v)
            if self.write:
                before = list(cache.times)
                cache.append(q, k, v)
                if probe is not None:
                    probe.appended(q, k, v, before)
        return out.transpose(1, 2)


class StreamsAttendText:
    """Cross-attention of one layer."""

    def __init__(self, caches: Sequence[TextCache]) -> None:
        self.caches = caches

    def __call__(self, query: Tensor) -> Tensor:
        query = query.transpose(1, 2)
        return _stacked([cache.attend(q) for cache, q in zip(self.caches, query, strict=True)]).transpose(1, 2)


def _stacked(parts: list[Tensor]) -> Tensor:
    """A stream alone, the common case on a GPU, is not copied."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)
