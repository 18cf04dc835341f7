"""One stream: what a caller asks of a chunk, what it gets, and all the state in between."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fastar_backend.attention import CacheShape, TextCache, make_cache
from fastar_backend.attention.recall import RecallProbe
from fastar_backend.config import AttentionConfig, Config
from fastar_backend.model.world import World


@dataclasses.dataclass(frozen=True)
class ChunkRequest:
    """Advance one stream by one chunk."""

    stream_id: int
    actions: tuple[str, ...]  # one for the whole chunk, or one per latent frame; e.g. ("forward+turn_left", "")
    prompt: str | None = None  # a new prompt from this chunk on


@dataclasses.dataclass(frozen=True)
class ChunkStats:
    """Figures of one chunk, sent to the client as JSON (docs/structure.md)."""

    chunk: int
    first_frame: int
    frames: int
    cache_tokens: float  # mean over layers, per head
    cache_bytes: int
    density: float  # executed / dense query-key pairs of this chunk's self-attention, 0..1
    recall: float | None  # attention mass of the whole history that was kept, 0..1; None unless measured
    merged_tokens: float  # history tokens folded into a group with others, mean over layers
    text_tokens: float  # prompt tokens attended to, mean over layers and heads
    step_seconds: float
    batch: int
    prompt_applied: bool

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One stream's new frames. frames: uint8 [frames, height, width, 3], RGB."""

    stream_id: int
    frames: np.ndarray
    stats: ChunkStats


class StreamOptions(Config):
    """What a client may choose when it opens a stream (the OPTIONS tensor)."""

    seed: int = Field(0, ge=0, lt=2**63)
    start: str = Field("auto", max_length=64)
    attention: AttentionConfig | None = None  # None: the server's
    measure_recall: bool = False  # keeps all keys beside the stream's cache: memory grows; for benchmarks


class Stream:
    """All state of one stream; nothing about it lives elsewhere. Dropping the object frees it."""

    def __init__(self, world: World, shape: CacheShape, prompt: str, options: StreamOptions,
                 attention: AttentionConfig) -> None:  # fmt: skip
        self.world, self.attention = world, attention
        self.noise = torch.Generator().manual_seed(options.seed)  # on the CPU: the same video on every device
        layers = range(world.config.model.layers)
        self.caches = [make_cache(shape, attention) for _ in layers]
        self.probes = [RecallProbe(shape, cache) if options.measure_recall else None for cache in self.caches]
        self.text: list[TextCache] = []
        self.set_prompt(prompt)
        self.latent_frame = 0  # of the next chunk; counts the start's frames too
        self.chunk = 0
        self.frame = 0  # video frames sent
        self.pending_start = world.starts.get(world.find_start(options.start, prompt) or "")
        self.stepped = time.monotonic()

    def set_prompt(self, prompt: str) -> None:
        """Computes the cross-attention keys and values of the new prompt, once."""
        dit = self.world.dit
        text = self.world.text([prompt])
        pairs = dit.prompt_keys_values(text.to(dit.head.head.weight.dtype))
        self.text = [TextCache(key[0], value[0], text[0], self.attention) for key, value in pairs]

    def draw(self, like: tuple[int, ...]) -> Tensor:
        """Standard normal noise from the stream's own generator, on the CPU."""
        return torch.randn(like, generator=self.noise)

    def begin_chunk(self) -> None:
        for cache, probe in zip(self.caches, self.probes, strict=True):
            cache.begin(self.latent_frame)
            if probe is not None:
                probe.begin(self.latent_frame)

    @property
    def cache_bytes(self) -> int:
        """Keys, values and their bookkeeping, recall probes' history included."""
        return sum(cache.nbytes for cache in self.caches) + sum(p.history.nbytes for p in self.probes if p is not None)
