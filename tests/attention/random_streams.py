"""Random streams for one attention layer, driven through the caches as the engine does."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastar_backend.attention import CacheShape, FrameCache, make_cache
from fastar_backend.attention.batch import StreamsAttend
from fastar_backend.attention.recall import RecallProbe
from fastar_backend.attention.reference import Layout
from fastar_backend.config import AttentionConfig

THETA = 100.0
STEPS = (0.0, 0.5)  # progress of the denoising passes; the clean pass follows


def shape_of(heads: int = 3, head_dim: int = 10, frame_tokens: int = 7, chunk_frames: int = 2, reach: int = 3,
             dtype: torch.dtype = torch.float32, columns: int = 0) -> CacheShape:  # fmt: skip
    spatial = 2 * (head_dim // 6)
    split = (head_dim - 2 * spatial, spatial, spatial)
    device = torch.device("cpu")
    return CacheShape(heads, head_dim, frame_tokens, chunk_frames, reach, split, THETA, device, dtype, columns)


def layout_of(shape: CacheShape) -> Layout:
    return Layout(
        shape.frame_tokens, shape.chunk_frames, shape.reach, shape.rope_split[0], shape.rope_theta, shape.columns
    )


def tokens(shape: CacheShape, frames: int, seed: int, change: float = 1.0) -> list[Tensor]:
    """Query, key, value, [heads, frames * frame_tokens, head_dim] each, without temporal positions.

    change: share of the tokens that are new in a frame; the others are last frame's with a little noise. Queries
    resemble the keys of their own tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (shape.heads, shape.frame_tokens, shape.head_dim)
    now = [torch.randn(size, generator=generator, dtype=shape.dtype) for _ in range(3)]
    rows = []
    for _ in range(frames):
        fresh = torch.rand(size[:2], generator=generator)[..., None] < change
        for kind in range(3):
            noise = torch.randn(size, generator=generator, dtype=shape.dtype)
            now[kind] = torch.where(fresh, noise, now[kind] + 0.1 * noise)
        rows.append([now[1] + 0.5 * now[0], now[1], now[2]])
    return [torch.cat([row[kind] for row in rows], 1) for kind in range(3)]


@dataclasses.dataclass
class Run:
    """What a stream gave. outputs: per chunk, the output of each pass, [heads, tokens, head_dim] in turn."""

    cache: FrameCache
    outputs: list[list[Tensor]]
    bytes: list[int]
    tokens: list[int]
    density: list[float]
    recall: list[float]

    @property
    def clean(self) -> Tensor:
        """The clean passes' outputs, chunk after chunk."""
        return torch.cat([passes[-1] for passes in self.outputs], 1)


def drive(shape: CacheShape, config: AttentionConfig, qkv: list[Tensor], *, start: int = 0, recall: bool = False,
          cache: FrameCache | None = None, before_chunk=lambda cache: None) -> Run:  # fmt: skip
    """Chunk by chunk: two denoising passes and the clean pass that is appended."""
    cache = cache or make_cache(shape, config)
    probe = RecallProbe(shape, cache) if recall else None
    run = Run(cache, [], [], [], [], [])
    for index, parts in enumerate(zip(*(x.split(shape.chunk_tokens, 1) for x in qkv), strict=True)):
        begin = start + index * shape.chunk_frames
        cache.begin(begin)
        if probe:
            probe.begin(begin)
        before_chunk(cache)
        query, key, value = (x.transpose(0, 1)[None] for x in parts)
        passes = []
        for progress in (*STEPS, 1.0):
            attend = StreamsAttend(shape, [cache], [probe], progress=progress, write=progress == 1.0)
            passes.append(attend(query, key, value)[0].transpose(0, 1))
        run.outputs.append(passes)
        run.bytes.append(cache.nbytes)
        run.tokens.append(cache.tokens)
        run.density.append(cache.executed / cache.possible)
        if probe:
            run.recall.append(probe.recall)
    return run


def distance(fast: Tensor, exact: Tensor) -> float:
    """Relative error in norm."""
    return float((fast.double() - exact.double()).norm() / exact.double().norm())
