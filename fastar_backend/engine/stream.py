"""The stream engine's public data: what a caller asks of one chunk, and what it gets."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


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
