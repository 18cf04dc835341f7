"""What one layer of one stream remembers. `FrameCache` keeps whole latent frames: all of them (dense) or a window.

Positions. Keys arrive with spatial rotary positions only. Temporal positions are counted from the first latent frame
of the chunk being generated and clamped at `reach` frames of distance, so a stream can run for ever on positions the
model was trained on. Cached keys are stored rotated to their position in the current chunk's frame of reference;
`begin` turns by the difference those whose position changed (only frames nearer than `reach`, so dense attention pays
for the newest frames only)."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastar_backend.model.layers import rotate_time, time_turns

HALF = (torch.bfloat16, torch.float16)
MOST_GROWTH = 24  # latent frames that a growing cache takes at a time, so that little is taken for nothing


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """What every layer's cache of a model has in common."""

    heads: int
    head_dim: int
    frame_tokens: int
    chunk_frames: int
    reach: int  # latent frames after which temporal distance is clamped
    rope_split: tuple[int, int, int]
    rope_theta: float
    device: torch.device
    dtype: torch.dtype
    columns: int = 0  # tokens in a row of the frame; 0: not known, one row

    @property
    def chunk_tokens(self) -> int:
        return self.frame_tokens * self.chunk_frames

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates x [..., tokens, head_dim] in time by positions (whole frames), broadcastable to x.shape[:-1]."""
        span = self.reach + self.chunk_frames
        if x.is_cuda and x.dtype in HALF and positions.dim() == 1 and x.dim() > 2:
            from fastar_backend.kernels import ops  # Triton comes with PyTorch for CUDA only

            turns = time_turns(self.rope_split[0], self.rope_theta, span, x.device, torch.float32)
            out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
            flat = [part.flatten(0, -3).transpose(0, 1) for part in (x, out)]
            ops.turn(flat[0], (positions + span).int(), turns.real.contiguous(), turns.imag.contiguous(), 1, flat[1])
            return out
        return rotate_time(x, positions, self.rope_split[0], self.rope_theta, span)


def interleaved(low: Tensor, high: Tensor) -> Tensor:
    """Numbers below 2^16 as one: the bits of `low` at its even places, those of `high` at the odd ones."""
    return sum((low >> bit & 1) << 2 * bit | (high >> bit & 1) << 2 * bit + 1 for bit in range(16))


@functools.lru_cache(maxsize=8)
def by_place(shape: CacheShape) -> Tensor:
    """The chunk's tokens [chunk tokens] along a Z-order curve over the frame, all frames of a place together: any
    stretch of them is a compact patch of the picture."""
    token = torch.arange(shape.frame_tokens)
    columns = shape.columns or shape.frame_tokens
    code = interleaved(token % columns, token // columns)
    frames = torch.arange(shape.chunk_frames) * shape.frame_tokens
    return (code.argsort()[:, None] + frames).flatten().to(shape.device)


class FrameCache:
    """Keys and values [heads, tokens, head_dim] of whole latent frames, oldest first.

    max_frames=None keeps all (dense attention); else the first `sink_frames` and the newest others (sliding window).
    All writing happens between a `begin` and the next: copies that share buffers part at `begin`.
    """

    BUFFERS: tuple[str, ...] = ("keys", "values")  # tensors whose tokens (dimension 1) count up to `end`
    TABLES: tuple[str, ...] = ()  # tensors that count as a whole
    NUMBERS: tuple[str, ...] = ("times", "start", "history_frames")

    def __init__(self, shape: CacheShape, max_frames: int | None = None, sink_frames: int = 0, prefix: int = 0) -> None:
        self.shape, self.max_frames, self.sink_frames = shape, max_frames, sink_frames
        self.prefix = prefix  # tokens reserved in front for a subclass
        frames = (max_frames or 16) + shape.chunk_frames
        room = (shape.heads, prefix + frames * shape.frame_tokens, shape.head_dim)
        self.keys = torch.zeros(room, device=shape.device, dtype=shape.dtype)
        self.values = torch.zeros_like(self.keys)
        self.times: list[int] = []  # latent frame index of each cached frame
        self.start = 0  # first latent frame of the current chunk
        self.history_frames = 0  # latent frames ever appended: what dense attention would hold
        self.executed = self.possible = 0  # query-key pairs of this chunk, for `density`
        self.shared = False  # the tensors belong to a fork or a snapshot, too
        self.bias: Tensor | None = None  # logit bias [heads, cached tokens + chunk tokens], constant during a chunk

    @property
    def end(self) -> int:
        """One past the last cached token in the buffers."""
        return self.prefix + len(self.times) * self.shape.frame_tokens

    @property
    def first(self) -> int:
        """The first used token in the buffers."""
        return self.prefix

    @property
    def tokens(self) -> int:
        return self.end - self.first

    @property
    def nbytes(self) -> int:
        """Bytes held, unused room included."""
        return self.keys.nbytes + self.values.nbytes

    def begin(self, start: int) -> None:
        """Makes `start` (a latent frame index) position 0 and prepares the cached keys for it."""
        shape = self.shape
        self._own()
        if self.times:
            times = torch.tensor(self.times, device=shape.device)
            turn = (times - start).clamp(min=-shape.reach) - (times - self.start).clamp(min=-shape.reach)
            changed = turn.nonzero()
            if len(changed):
                first = int(changed[0])
                rows = slice(self.prefix + first * shape.frame_tokens, self.end)
                by = turn[first:].repeat_interleave(shape.frame_tokens)
                self.keys[:, rows] = shape.turn(self.keys[:, rows], by)
        self.start = start
        self.executed = self.possible = 0

    def fork(self) -> Self:
        """A copy that shares the tensors until one side begins its next chunk."""
        self.shared = True
        twin = copy.copy(self)
        twin.times = list(self.times)
        return twin

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Numbers (JSON) and tensors that `load` takes back. The tensors are views that nobody will write to."""
        self.shared = True
        present = {name: getattr(self, name) for name in (*self.BUFFERS, *self.TABLES)}
        tensors = {
            name: value[:, : self.end] if name in self.BUFFERS else value
            for name, value in present.items()
            if value is not None
        }
        return {name: copy.copy(getattr(self, name)) for name in self.NUMBERS}, tensors

    def load(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Into a new cache of the same configuration. Raises ValueError where something does not fit."""
        for name in self.NUMBERS:
            if type(numbers[name]) is not type(getattr(self, name)):
                raise ValueError(f"{name} is {type(numbers[name]).__name__}")
            setattr(self, name, copy.copy(numbers[name]))
        most = self.max_frames if self.max_frames is not None else len(self.times)
        if len(self.times) > most or self.times != sorted(map(int, self.times)):
            raise ValueError(f"times has {len(self.times)} frames; at most {most}, ascending")
        self._make_room()
        for name in (*self.BUFFERS, *self.TABLES):
            own = getattr(self, name)
            if own is None:
                continue
            there, value = own[:, : self.end] if name in self.BUFFERS else own, tensors[name]
            if value.shape != there.shape or value.dtype != there.dtype:
                raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, not {there.dtype} {list(there.shape)}")
            there.copy_(value)

    def _own(self) -> None:
        if self.shared:
            for name in (*self.BUFFERS, *self.TABLES):
                if (value := getattr(self, name)) is not None:
                    setattr(self, name, value.clone())
            self.shared = False

    def _make_room(self) -> None:
        missing = self.end + self.shape.chunk_tokens - self.keys.shape[1]
        if missing > 0:
            grow = (0, 0, 0, max(missing, min(self.keys.shape[1] // 2, MOST_GROWTH * self.shape.frame_tokens)))
            self.keys, self.values = F.pad(self.keys, grow), F.pad(self.values, grow)

    def view(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Cached and current keys and values in one contiguous stretch; key, value: [heads, chunk tokens, head_dim]."""
        self._make_room()
        end = self.end
        stop = end + key.shape[1]
        self.keys[:, end:stop], self.values[:, end:stop] = key, value
        return self.keys[:, self.first : stop], self.values[:, self.first : stop]

    def count_pairs(self, queries: int, keys: int) -> None:
        self.executed += queries * keys
        self.possible += queries * (self.history_frames * self.shape.frame_tokens + self.shape.chunk_tokens)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, progress: float) -> Tensor:
        """One chunk's queries over the cache and the chunk itself (block-causal: all of the chunk).

        query, key, value: [heads, chunk tokens, head_dim], rotated in space and time. progress: the share of
        denoising steps done, 0..1 (1: the clean pass)."""
        keys, values = self.view(key, value)
        self.count_pairs(query.shape[1], keys.shape[1])
        return attention(query, keys, values, self.bias)

    def allowed(self, queries: Tensor) -> Tensor | None:
        """What the last `attend` let the chunk's queries of these numbers [n] see of `view`'s entries: bool [heads, n,
        entries]; None: everything."""
        return None

    def append(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Takes the clean pass's keys and values into the cache. Shapes and rotations as in `attend`."""
        self.view(key, value)
        frames = key.shape[1] // self.shape.frame_tokens
        self.times += range(self.start, self.start + frames)
        self.history_frames += frames
        surplus = len(self.times) - self.max_frames if self.max_frames is not None else 0
        if surplus > 0:
            self._drop(surplus)

    def _drop(self, surplus: int) -> None:
        """Removes `surplus` frames behind the sinks."""
        size = self.shape.frame_tokens
        first = self.prefix + self.sink_frames * size
        moved = slice(first + surplus * size, self.end)
        for buffer in (self.keys, self.values):
            buffer[:, first : moved.stop - surplus * size] = buffer[:, moved].clone()
        del self.times[self.sink_frames : self.sink_frames + surplus]


def attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(d) + bias) v; [heads, tokens, head_dim], bias [heads, keys]."""
    if bias is None and query.is_cuda and query.dtype in HALF:  # cuDNN is the faster one on Hopper
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return F.scaled_dot_product_attention(query[None], keys[None], values[None])[0]
    mask = None if bias is None else bias[None, :, None].to(query.dtype).expand(1, -1, query.shape[1], -1)
    return F.scaled_dot_product_attention(query[None], keys[None], values[None], mask)[0]
