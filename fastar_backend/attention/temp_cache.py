"""TempCache (paper, section on temporal cache compression): keys that recur across frames become one group.

Newest frames stay whole. A frame that leaves them is merged, token by token and head by head, into a memory of at most
`budget` groups: its nearest group (ANN top-1) takes it in when their keys' cosine exceeds the threshold; otherwise, and
as long as the memory has room for the whole frame, it founds a group: until the budget is full, nothing is lost. A
group has one key, the mean of its members' values, and the logit bias log(count), which is exact when the members' keys
are equal. That is where the clamp of temporal distance helps: members that left the newest frames share one temporal
position, so equal content means equal keys (under plain rotary positions it does not, and the log-count law fails).

The budget is hard. When it is full, those give way whose time is up first (`stay`): every other token has twice as
much of it, one in 4 four times as much, and so on up to one in 16. So what is kept is spread over the past,
and over the picture: a frame thins out as it ages. (Attention mass, by which others choose, keeps many views of what
was seen last and forgets the place before it; docs/decisions.md has both, measured.) Whoever loses is folded into its
nearest group, unless that is too far (`fold_threshold`): the group's count and mean value grow, its key stays. So the
memory keeps the softmax's long tail instead of losing it. Sinks and the newest frames are never merged nor dropped.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.attention import ann
from fastar_backend.attention.cache import CacheShape, FrameCache, interleaved
from fastar_backend.attention.sparse_cache import SparseCache
from fastar_backend.config import AttentionConfig

SPREAD = 4  # latent frames that a token stays at least
PERIOD = 16  # one token in so many stays longest, so many times as long; a power of two
FREE = -1e30  # what a slot without a group is worth: less than any group


@dataclasses.dataclass
class MergeReport:
    """What became of the tokens of one leaving frame and of the groups. assigned: [heads, n] the slot of each token;
    moved: [heads, slots] the slot that now holds each slot's former group. -1: dropped."""

    assigned: Tensor
    moved: Tensor


@functools.lru_cache(maxsize=8)
def thinning(shape: CacheShape) -> Tensor:
    """The order in which a frame's tokens are numbered for `stay`, int64 [frame tokens] of the host's: its lowest bit
    is a checkerboard, and with each further one every 2 x 2, 4 x 2, ... tokens have each number once (Bayer's matrix
    for ordered dither, bits reversed)."""
    token = torch.arange(shape.frame_tokens)
    columns = shape.columns or shape.frame_tokens
    row, column = token // columns, token % columns
    return interleaved(row ^ column, row)


def stay(time: int, shape: CacheShape) -> Tensor:
    """Float32 [frame tokens] of the host's, latent frames: how long after `time` the tokens of its frame are due to
    give way; those longest overdue do first. SPREAD * (the largest power of two, PERIOD at most, that divides time +
    the token's number), so that frames thin out alternately, and a fraction, so that tokens alike in this go one by
    one, spread over the picture."""
    number = thinning(shape)
    fraction = sum((number >> bit & 1) * 0.5 ** (bit + 1) for bit in range(24))
    steps = torch.gcd(number + time, torch.full_like(number, PERIOD))
    return (SPREAD * steps + fraction).float()


class TempCache(SparseCache):
    """Layout of the buffers: [memory slots, filled from the last one backwards | sinks, newest frames | chunk]."""

    BUFFERS = (*FrameCache.BUFFERS, "queries")
    TABLES = ("count", "time", "stay", "index")
    NUMBERS = (*FrameCache.NUMBERS, "used", "merged")

    def __init__(self, shape: CacheShape, config: AttentionConfig) -> None:
        slots = (config.budget_frames - config.sink_frames - config.recent_frames) * shape.frame_tokens
        whole = config.sink_frames + config.recent_frames
        super().__init__(shape, config, whole, config.sink_frames, prefix=slots)
        self.slots = slots
        self.count = torch.zeros(shape.heads, slots, device=shape.device)  # members of each group; 0 = free slot
        self.time = torch.zeros(shape.heads, slots, dtype=torch.long, device=shape.device)  # of its newest member
        # Of its newest member: latent frames from the chunk's start on until it is due to give way.
        self.stay = torch.zeros(shape.heads, slots, device=shape.device)
        # The groups' keys without temporal position, as the index compares them.
        self.index = torch.zeros(shape.heads, slots, shape.head_dim, device=shape.device)
        self.queries = None  # the tokens' queries, without temporal position
        if config.match == "query" or config.weight == "effective":
            self.queries = torch.zeros_like(self.keys)
        self.used = 0  # slots in use, the fullest head's
        self.merged = 0.0  # tokens and groups that went into another group so far, mean over heads
        self.reports: list[MergeReport] = []  # of the last append: one for each frame that left the newest

    @property
    def first(self) -> int:
        return self.prefix - self.used

    @property
    def nbytes(self) -> int:
        extra = (self.count, self.time, self.stay, self.index) + (() if self.queries is None else (self.queries,))
        return super().nbytes + sum(t.nbytes for t in extra)

    def begin(self, start: int) -> None:
        self._own()
        reach = self.shape.reach
        if self.used:
            turn = (self.time - start).clamp(min=-reach) - (self.time - self.start).clamp(min=-reach)
            if turn.any():
                self.keys[:, : self.slots] = self.shape.turn(self.keys[:, : self.slots], turn)
            self.stay -= start - self.start
        super().begin(start)
        self.bias = None
        if self.used:
            count = self.count[:, self.slots - self.used :]
            bias = count.log() if self.config.weight != "none" else torch.where(count > 0, 0.0, -torch.inf)
            self.bias = F.pad(bias, (0, self.end - self.prefix + self.shape.chunk_tokens)).to(self.shape.dtype)

    def append(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if self.queries is not None:
            fresh = slice(self.end, self.end + key.shape[1])
            frames = torch.arange(query.shape[1] // self.shape.frame_tokens, device=query.device)
            self.queries[:, fresh] = self.shape.turn(query, -frames.repeat_interleave(self.shape.frame_tokens))
        self.reports = []
        super().append(query, key, value)

    def _drop(self, surplus: int) -> None:
        size = self.shape.frame_tokens
        first = self.prefix + self.sink_frames * size
        leaving = slice(first, first + surplus * size)
        for index in range(surplus if self.slots else 0):  # one after the other, so that still frames unite
            rows = slice(first + index * size, first + (index + 1) * size)
            probe = None if self.queries is None else self.queries[:, rows]
            self._merge(self.keys[:, rows], self.values[:, rows], self.times[self.sink_frames + index], probe)
        moved = slice(leaving.stop, self.end)
        if self.queries is not None:
            self.queries[:, first : moved.stop - surplus * size] = self.queries[:, moved].clone()
        super()._drop(surplus)

    def _merge(self, keys: Tensor, values: Tensor, time: int, probe: Tensor | None) -> None:
        """One frame. keys, values: [heads, n, head_dim], rotated; time: the frame's; probe: the tokens' queries without
        temporal position, where kept."""
        shape, config, slots = self.shape, self.config, self.slots
        due = (stay(time, shape) + (time - self.start)).to(shape.device)
        position = torch.full_like(due, max(time - self.start, -shape.reach), dtype=torch.long)
        raw = shape.turn(keys, -position)  # without temporal position: content and place in the frame
        entry, held = ann.prepare(raw, config), self.count > 0
        match = ann.nearest(ann.prepare(probe, config) if config.match == "query" else entry, self.index, held, config)
        found = match.clamp(min=0)
        similarity = F.cosine_similarity(raw.float(), _rows(self.index, found), dim=-1)
        joins = (match >= 0) & (similarity > config.merge_threshold)
        if not config.merge_early:
            joins &= ((~held).sum(-1) < keys.shape[1])[:, None]

        # Newcomers that join no group: those that stay longest replace free slots, then the groups whose time is up.
        rank = torch.where(joins, -torch.inf, due)
        worth, newcomer = rank.sort(-1, descending=True)
        joiners = torch.zeros_like(self.count).scatter_add_(1, found, joins.to(self.count.dtype))
        taken = joiners > 0
        price = torch.where(held, self.stay, FREE).masked_fill(taken, torch.inf)
        # Free slots are filled from the last one backwards, so that those in use are a contiguous stretch.
        order = torch.where(held, price, FREE * (1 + torch.arange(slots, device=shape.device) / slots)).argsort(-1)
        pairs = min(order.shape[1], newcomer.shape[1])
        slot, newcomer, worth = order[:, :pairs], newcomer[:, :pairs], worth[:, :pairs]
        replace = worth > price.gather(1, slot)
        evicts = replace & held.gather(1, slot)
        assigned = torch.where(joins, match, -1).scatter(
            1, newcomer, torch.where(replace, slot, _at(joins, newcomer, match))
        )
        moved = torch.arange(slots, device=shape.device).expand_as(held)
        moved = moved.scatter(1, slot, torch.where(evicts, -1, slot))
        losers = (
            torch.cat([entry, _rows(self.index, slot)], 1),
            torch.cat([values, _rows(self.values[:, :slots], slot)], 1),
            torch.cat([torch.ones_like(rank), self.count.gather(1, slot)], 1),
            torch.cat([assigned < 0, evicts], 1),
        )
        self._write(slot, newcomer, replace, keys, values, time, due, entry)
        self._join(found, joins, keys, values, time, due, entry, probe)
        if config.fold_threshold < 1 and losers[-1].any():
            target = self._fold(*losers)
            self.merged += (losers[-1] & (target >= 0)).float().sum(1).mean().item()
            tokens = target[:, : assigned.shape[1]]
            assigned = torch.where(assigned < 0, tokens, assigned)
            moved = moved.scatter(1, slot, torch.where(evicts, target[:, assigned.shape[1] :], slot))
        self.used = max(self.used, slots - int(((self.count > 0).any(0)).int().argmax())) if self.count.any() else 0
        self.merged += joins.float().sum(1).mean().item()
        self.reports.append(MergeReport(assigned, moved))

    def _write(self, slot: Tensor, newcomer: Tensor, replace: Tensor, keys: Tensor, values: Tensor, time: int,
               due: Tensor, entry: Tensor) -> None:  # fmt: skip
        """Puts newcomer [heads, pairs] into slot [heads, pairs] where `replace`."""
        heads, pairs = replace.nonzero(as_tuple=True)
        to, source = slot[heads, pairs], newcomer[heads, pairs]
        self.keys[heads, to], self.values[heads, to] = keys[heads, source], values[heads, source]
        self.time[heads, to], self.stay[heads, to] = time, due[source]
        self.index[heads, to] = entry[heads, source]
        self.count[heads, to] = 1

    def _join(self, found: Tensor, joins: Tensor, keys: Tensor, values: Tensor, time: int, due: Tensor,
              entry: Tensor, probe: Tensor | None) -> None:  # fmt: skip
        """Adds the joining tokens to their groups: count, mean value, representative key (the last member's)."""
        shape, slots = self.shape, self.slots
        heads, tokens = joins.nonzero(as_tuple=True)
        if not len(heads):
            return
        flat = heads * slots + found[heads, tokens]
        old_count = self.count.flatten()
        added = torch.zeros_like(old_count).index_add(0, flat, torch.ones_like(flat, dtype=old_count.dtype))
        value_sum = torch.zeros(len(old_count), shape.head_dim, device=shape.device, dtype=torch.float32)
        value_sum.index_add_(0, flat, values[heads, tokens].float())
        grown = added.nonzero()[:, 0]
        last = torch.full_like(flat.new_empty(len(old_count)), -1).scatter_reduce(0, flat, tokens, "amax")[grown]
        head, slot = grown // slots, grown % slots
        before, plus = old_count[grown], added[grown]
        mean = (before[:, None] * self.values[head, slot].float() + value_sum[grown]) / (before + plus)[:, None]
        self.values[head, slot] = mean.to(shape.dtype)
        weight = before
        if self.config.weight == "effective":
            # How much of the old members' weight is left under the new key, for the frame's mean query.
            mean_query = probe.float().mean(1)[head]
            change = self.keys[head, slot].float() - keys[head, last].float()
            weight = before * ((mean_query * change).sum(-1) * shape.head_dim**-0.5).exp().clamp(max=1.0)
        if self.config.representative == "mean":
            mixed = before[:, None] * self.keys[head, slot].float() + plus[:, None] * keys[head, last].float()
            self.keys[head, slot] = (mixed / (before + plus)[:, None]).to(shape.dtype)
            position = (self.time[head, slot] - self.start).clamp(min=-shape.reach)
            self.index[head, slot] = ann.prepare(shape.turn(self.keys[head, slot], -position), self.config)
        else:
            self.keys[head, slot] = keys[head, last]
            self.time[head, slot], self.stay[head, slot] = time, due[last]
            self.index[head, slot] = entry[head, last]
        self.count.view(-1)[grown] = weight + plus

    def _fold(self, entry: Tensor, values: Tensor, count: Tensor, lost: Tensor) -> Tensor:
        """Adds the entries where `lost` to their nearest groups; all [heads, n, ...]. Returns the slots [heads, n]."""
        slots, everyone = self.slots, lost.shape
        # Only as many rows as the head with the most losers has: they come first.
        first = lost.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, : int(lost.sum(1).max())]
        entry, values = _rows(entry, first), _rows(values, first)
        count, lost = count.gather(1, first), lost.gather(1, first)
        target = ann.nearest(entry, self.index, self.count > 0, self.config)
        near = (entry * _rows(self.index, target.clamp(min=0))).sum(-1) > self.config.fold_threshold
        target = torch.where(near, target, -1)
        heads, entries = (lost & (target >= 0)).nonzero(as_tuple=True)
        flat = heads * slots + target[heads, entries]
        plus = count[heads, entries]
        old = self.count.flatten()
        total = old.index_add(0, flat, plus)
        held = torch.where(old > 0, old, 1.0)[:, None] * self.values[:, :slots].flatten(0, 1).float()
        mean = held.index_add_(0, flat, plus[:, None] * values[heads, entries].float()) / total.clamp(min=1)[:, None]
        self.values[:, :slots] = mean.unflatten(0, (-1, slots)).to(self.shape.dtype)
        self.count.view(-1).copy_(total)
        return torch.full(everyone, -1, device=target.device).scatter(1, first, torch.where(lost, target, -1))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [heads, m, d] at index [heads, n] -> [heads, n, d]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _at(joins: Tensor, newcomer: Tensor, match: Tensor) -> Tensor:
    """Slot of tokens that stay as they are: their match if they join, else -1."""
    return torch.where(joins.gather(1, newcomer), match.gather(1, newcomer), -1)
