"""TempCache and the sliding window on a GPU: all layers of a stream in one set of tensors of constant shape, by
kernels.

The same law as `temp_cache`, laid out for a device that must never be waited for: no size depends on data, the layers
are merged together once a chunk (`commit`), and a chunk's keys go straight to their place (`FlatLayer.attend`). Two
things are decided otherwise. Groups sit at the clamp's temporal distance for ever, also where the newest frames are
fewer than it: all members of a group then share one position, so the log-count law is exact, and no group is ever
turned again. And similarity is what int8 codes see of it (to about .005).

Values of groups are kept as sums (kernels/attend). Rows of the tensors: [memory slots, filled from the last one
backwards | places of whole latent frames]. The first places are the sinks', the others a ring of the newest frames and
the chunk.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastar_backend.attention import guard
from fastar_backend.attention.cache import CacheShape, by_place
from fastar_backend.attention.flat_select import select
from fastar_backend.attention.layers import CacheStats
from fastar_backend.attention.temp_cache import FREE, stay
from fastar_backend.config import AttentionConfig
from fastar_backend.kernels import ops
from fastar_backend.model.layers import time_turns

TOGETHER = 128  # heads that are merged at a time: bounds the temporary tensors


def supports(shape: CacheShape, config: AttentionConfig) -> bool:
    """Whether these caches can do what is asked; else the portable ones must."""
    chunk, recent = shape.chunk_frames, newest(config)
    whole = config.sink_frames % chunk == 0 and recent % chunk == 0 and recent > 0
    plain = config.weight == "count" and config.representative == "last" and config.match == "key"
    power = shape.head_dim & (shape.head_dim - 1) == 0 and shape.head_dim >= 32  # int8 products take 32 at least
    return (
        power and whole and (config.kind == "window" or (config.kind == "fastar" and plain and config.index != "lsh"))
    )


def newest(config: AttentionConfig) -> int:
    """Latent frames that stay whole."""
    return config.recent_frames if config.kind == "fastar" else config.budget_frames - config.sink_frames


@dataclasses.dataclass
class Work:
    """What was done in a chunk so far; tensors are not read before `stats`."""

    used: Tensor  # groups held, mean over layers and heads
    sparse_pairs: Tensor  # query-key pairs of sparse calls
    dense_calls: int = 0
    sparse_calls: int = 0
    seen: int = 0  # one past the last row that was attended to
    measured: list[Tensor] = dataclasses.field(default_factory=list)  # the guard's recall and error, layer by layer

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.used, self.sparse_pairs, *self.measured


class FlatCaches:
    """`Caches` of one stream. A chunk is `prepare` (the host's part), `turn_history`, the layers' `attend`, `merge`,
    `took` (the host's part); the three in the middle may be recorded once and replayed."""

    TENSORS = ("keys", "values", "origin", "count", "stay", "code", "first", "merged")

    def __init__(self, shape: CacheShape, config: AttentionConfig, layers: int) -> None:
        self.shape, self.config = shape, config
        size, heads = shape.frame_tokens, layers * shape.heads
        self.slots = (config.budget_frames - config.sink_frames - newest(config)) * size
        self.places = config.sink_frames + newest(config) + shape.chunk_frames
        rows = self.slots + self.places * size
        rows += -rows % ops.KEY_BLOCK
        on = {"device": shape.device, "dtype": shape.dtype}
        self.keys, self.values = (torch.zeros(heads, rows, shape.head_dim, **on) for _ in range(2))
        # The frames' keys at their place in their own chunk: always turned from here, so that no rounding piles up.
        self.origin = torch.zeros(heads, self.places * size, shape.head_dim, **on)
        floats = {"device": shape.device, "dtype": torch.float32}
        self.count = torch.zeros(heads, rows, **floats)
        self.stay = torch.zeros(heads, self.slots, **floats)  # see `TempCache`; of frames that this chunk drives out:
        self.leaving = torch.zeros(shape.chunk_frames, size, **floats)
        self.code = torch.zeros(heads, self.slots, shape.head_dim, device=shape.device, dtype=torch.int8)
        self.first = torch.full((heads,), self.slots, device=shape.device, dtype=torch.int32)  # where groups begin
        self.merged = torch.zeros((), **floats)
        self.times: list[int] = []  # latent frame index of each place that is filled
        self.own = 0  # the chunk's first place
        self.start = self.history_frames = 0
        self.layers = [FlatLayer(self, layer) for layer in range(layers)]
        self.span = shape.reach + shape.chunk_frames
        turns = time_turns(shape.rope_split[0], shape.rope_theta, self.span, torch.device("cpu"), torch.float32)
        self.cos, self.sin = (part.contiguous().to(shape.device) for part in (turns.real, turns.imag))
        self.in_chunk = self._lines(range(shape.chunk_frames))
        self.lines = torch.zeros(self.places, device=shape.device, dtype=torch.int32)  # of the places' frames
        self.far = self._lines(-shape.reach - place % shape.chunk_frames for place in range(self.places))
        self._reset()

    def __iter__(self) -> Iterator[FlatLayer]:
        return iter(self.layers)

    def __getitem__(self, layer: int) -> FlatLayer:
        return self.layers[layer]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.TENSORS)

    @property
    def own_rows(self) -> slice:
        """The chunk's rows in keys and values."""
        start = self.slots + self.own * self.shape.frame_tokens
        return slice(start, start + self.shape.chunk_tokens)

    @property
    def stop(self) -> int:
        """One past the last used row."""
        return self.slots + max(len(self.times), self.own + self.shape.chunk_frames) * self.shape.frame_tokens

    def _lines(self, positions: Any) -> Tensor:
        """Lines of the table of turns, int32."""
        return self._there(torch.tensor([position + self.span for position in positions], dtype=torch.int32))

    def _there(self, x: Tensor) -> Tensor:
        """x, of the host's, on the device; through pinned memory, so that the host does not wait."""
        return (x.pin_memory() if self.keys.is_cuda else x).to(self.keys.device, non_blocking=True)

    def _reset(self) -> None:
        self.work = Work(self.slots - self.first.float().mean(), torch.zeros((), device=self.shape.device))

    @property
    def full(self) -> bool:
        """Whether every place holds a frame: from then on all chunks are the same work."""
        return len(self.times) == self.places

    def begin(self, start: int) -> None:
        self.prepare(start)
        self.turn_history()

    def prepare(self, start: int) -> None:
        shape = self.shape
        self.start = start
        if self.times:
            positions = (
                max(time - start, -shape.reach) - place % shape.chunk_frames for place, time in enumerate(self.times)
            )
            self.lines[: len(self.times)] = self._lines(positions)
        if self.drives_out:
            times = (self.times[place] for place in self.next_places)
            self.leaving.copy_(self._there(torch.stack([stay(time, shape) + (time - start) for time in times])))
        samples = guard.plan(self.config, shape, len(self.layers), start)
        for layer, sample in zip(self.layers, samples, strict=True):
            layer.selection = None
            layer.look_at(sample)

    def turn_history(self) -> None:
        """Turns the whole frames' keys to their positions in the chunk's frame of reference."""
        if self.times:
            size, there = self.shape.frame_tokens, len(self.times) * self.shape.frame_tokens
            out = self.keys[:, self.slots : self.slots + there].transpose(0, 1)
            ops.turn(self.origin[:, :there].transpose(0, 1), self.lines, self.cos, self.sin, size, out)
        self.count[:, self.slots : self.stop] = 1.0
        self._reset()

    def commit(self) -> None:
        """Takes the chunk in; the frames that leave the newest are merged, one after the other."""
        self.merge()
        self.took()

    @property
    def following(self) -> int:
        """The next chunk's first place."""
        after = self.own + self.shape.chunk_frames
        return after if after < self.places else self.config.sink_frames

    @property
    def next_places(self) -> range:
        return range(self.following, self.following + self.shape.chunk_frames)

    @property
    def drives_out(self) -> bool:
        """Whether frames go into the memory after this chunk: the ring is full, and its oldest chunk is where the next
        one goes."""
        return self.slots > 0 and max(len(self.times), self.own + self.shape.chunk_frames) == self.places

    def merge(self) -> None:
        if self.drives_out:
            for due, place in zip(self.leaving, self.next_places, strict=True):
                for first in range(0, len(self.keys), TOGETHER):
                    self._merge(slice(first, first + TOGETHER), place, due)
            self.stay -= self.shape.chunk_frames

    def took(self) -> None:
        chunk = self.shape.chunk_frames
        self.times[self.own : self.own + chunk] = [self.start + index for index in range(chunk)]
        self.history_frames += chunk
        self.own = self.following

    def _merge(self, heads: slice, place: int, due: Tensor) -> None:
        """The frame at `place`, whose tokens stay for `due`, goes into the memory. Same steps as `TempCache._merge`,
        none of which waits."""
        size, slots = self.shape.frame_tokens, self.slots
        source = self.origin[heads, place * size : (place + 1) * size]
        rows = slice(slots + place * size, slots + (place + 1) * size)
        key = torch.empty_like(source)
        ops.turn(source.transpose(0, 1), self.far[place : place + 1], self.cos, self.sin, size, key.transpose(0, 1))
        code, first = ops.quantise(key), self.first[heads]
        held = ops.Groups(self.keys[heads], self.values[heads], self.code[heads], self.count[heads], self.stay[heads])
        similarity, match = ops.nearest(code, held.code, first)
        new = ops.Groups(key, self.values[heads, rows], code, torch.ones_like(similarity), due)
        joins = similarity > self.config.merge_threshold
        if not self.config.merge_early:
            joins &= (first < size)[:, None]  # so many slots are free
        # Newcomers that join no group: those that stay longest replace free slots, then the groups whose time is up.
        worth, newcomer = torch.where(joins, -torch.inf, due).sort(-1, descending=True)
        full, index = held.count[:, :slots] > 0, match.clamp(min=0).long()
        price = torch.where(full, held.stay, FREE)
        price.masked_fill_(torch.zeros_like(price).scatter_add_(1, index, joins.float()) > 0, torch.inf)  # is joined
        backwards = FREE * (1 + torch.arange(slots, device=price.device) / slots)
        slot = torch.where(full, price, backwards).topk(size, largest=False).indices
        replace = worth > price.gather(1, slot)
        evicts = replace & full.gather(1, slot)
        lost = evicts | ~(replace | joins.gather(1, newcomer))
        loser = ops.Groups(
            key,  # not looked at: whoever is folded in does not change its group's key
            _rows(held.value, torch.where(evicts, slot, rows.start + newcomer)),
            torch.where(evicts[..., None], _rows(held.code, slot), _rows(code, newcomer)),
            torch.where(evicts, held.count.gather(1, slot), 1.0),
            due,  # likewise
        )
        ops.place(held, slot, newcomer, replace, new)
        ops.merge(held, torch.where(joins, match, slots), new, renew=True)
        first.copy_(slots - (held.count[:, :slots] > 0).sum(-1))
        gone = joins.sum()
        if self.config.fold_threshold < 1:
            similarity, target = ops.nearest(loser.code, held.code, first)
            lost &= (target >= 0) & (similarity > self.config.fold_threshold)
            ops.merge(held, torch.where(lost, target, slots), loser, renew=False)
            gone = gone + lost.sum()
        self.merged += gone / len(self.keys)

    def configure(self, config: AttentionConfig) -> None:
        self.config = config

    def stats(self) -> CacheStats:
        """The only place that waits for the device."""
        now = self.slots - self.first.float().mean()
        work = self.work
        used, now, sparse, merged = torch.stack([work.used, now, work.sparse_pairs, self.merged]).tolist()
        whole, queries = len(self.times) * self.shape.frame_tokens, self.shape.chunk_tokens
        calls = work.dense_calls + work.sparse_calls
        before = self.history_frames - self.shape.chunk_frames
        return CacheStats(
            tokens=now + min(whole, (self.places - self.shape.chunk_frames) * self.shape.frame_tokens),
            executed=work.dense_calls * queries * (used + work.seen - self.slots) + sparse,
            possible=calls * queries * (before * self.shape.frame_tokens + queries),
            merged=merged,
            guard=guard.summary(work.measured, self.config),
        )

    def fork(self) -> FlatCaches:
        """Copied at once, and `state` too: recordings and layers know the tensors by their place in memory."""
        twin = copy.copy(self)
        twin.times = list(self.times)
        for name in (*self.TENSORS, "lines", "leaving"):
            setattr(twin, name, getattr(self, name).clone())
        twin.layers = [FlatLayer(twin, layer) for layer in range(len(self.layers))]
        return twin

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        numbers = {name: copy.copy(getattr(self, name)) for name in ("times", "own", "start", "history_frames")}
        return numbers, {f"all.{name}": getattr(self, name).clone() for name in self.TENSORS}

    def load(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        times, own = [int(time) for time in numbers["times"]], int(numbers["own"])
        chunk = self.shape.chunk_frames
        if len(times) > self.places or len(times) % chunk or own % chunk or not 0 <= own <= self.places - chunk:
            raise ValueError(f"times has {len(times)} frames, the next place is {own}; at most {self.places}")
        self.times, self.own = times, own
        self.start, self.history_frames = int(numbers["start"]), int(numbers["history_frames"])
        for name in self.TENSORS:
            there, value = getattr(self, name), tensors[f"all.{name}"]
            if value.shape != there.shape or value.dtype != there.dtype:
                raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, not {there.dtype} {list(there.shape)}")
            there.copy_(value)


class FlatLayer:
    """One layer's part of `FlatCaches`."""

    def __init__(self, caches: FlatCaches, layer: int) -> None:
        self.caches, self.layer = caches, layer
        self.selection: tuple[Tensor, Tensor, Tensor] | None = None  # AnnSA's, once a chunk
        self.sample: guard.Sample | None = None  # what the guard looks at in this chunk
        self.looked_at: guard.Sample | None = None  # its tensors, which stay: recordings know them

    def look_at(self, sample: guard.Sample | None) -> None:
        self.sample = sample
        if sample is None:
            return
        if self.looked_at is None:
            self.looked_at = guard.Sample(sample.heads.clone(), sample.queries.clone())
        else:
            self.looked_at.heads.copy_(sample.heads)
            self.looked_at.queries.copy_(sample.queries)
        self.sample = self.looked_at

    def attend(self, query: Tensor, key: Tensor, value: Tensor, progress: float, write: bool) -> Tensor:
        """One chunk's queries over the cache and the chunk itself. All [chunk tokens, heads, head_dim], rotated in
        space, not in time. progress: share of denoising steps done. write: the pass whose keys and values are kept."""
        caches, shape, work = self.caches, self.caches.shape, self.caches.work
        heads = slice(self.layer * shape.heads, (self.layer + 1) * shape.heads)
        keys, values, count, rows = caches.keys[heads], caches.values[heads], caches.count[heads], caches.own_rows
        turned = torch.empty(query.shape, device=query.device, dtype=query.dtype)
        turn = (caches.in_chunk, caches.cos, caches.sin, shape.frame_tokens)
        ops.turn(query, *turn, turned)
        ops.turn(key, *turn, keys[:, rows].transpose(0, 1))
        values[:, rows] = value.transpose(0, 1)
        stop, config = caches.stop, caches.config
        sparse = config.kind == "fastar" and config.sparse_density < 1 and progress >= config.dense_steps
        if sparse and self.selection is None and (caches.times or caches.slots):
            self.selection = select(turned, keys, count, rows, stop, config, by_place(shape))
        chosen = self.selection if sparse else None
        first = caches.first[heads]
        out = ops.attend(turned, keys, values, count, first, caches.slots, stop, selection=chosen)
        work.seen = stop
        if chosen is None:
            work.dense_calls += 1
        else:
            work.sparse_calls += 1
            work.sparse_pairs += chosen[1].sum() * (ops.sparse_tiles(query.dtype).queries * ops.KEY_BLOCK / shape.heads)
        if write:
            own = slice(rows.start - caches.slots, rows.stop - caches.slots)
            caches.origin[heads, own] = keys[:, rows]
            if chosen is not None and self.sample is not None:
                tile = ops.sparse_tiles(query.dtype).queries, ops.KEY_BLOCK
                kept = (part[:, :stop] for part in (keys, values, count))
                work.measured.append(guard.by_blocks(self.sample, turned, *kept, tile, chosen))
        return out


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [heads, m, d], contiguous, at index [heads, n] -> [heads, n, d]."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.view(-1, x.shape[2]).index_select(0, (index + first).flatten()).view(*index.shape, -1)
