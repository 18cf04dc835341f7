"""Attention recall: how much of dense attention over the whole history a compressed or sparse cache reproduces.

Each past token is represented by something the cache holds (itself, or the group that took it in) or by nothing. With
P the dense attention mass summed over what each held entry represents, and Q the entry's mass in the fast attention,
recall = sum over entries of min(P, Q): 1 when the fast softmax puts all mass where the dense one does; dropped tokens
and wrong group weights both lower it. Every pass of a chunk is measured: the denoising ones, then the one that writes.
Measuring keeps the whole history's keys: for evaluation and tests."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastar_backend.attention.cache import CacheShape, FrameCache
from fastar_backend.attention.temp_cache import TempCache

QUERY_STRIDE = 12  # one query in so many is measured


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of a chunk through one layer. executed, possible: query-key pairs, as the cache counts them."""

    recall: float
    executed: float
    possible: float


class RecallProbe:
    """Of one layer. measuring: whether passes are measured at all; the history is kept in any case."""

    def __init__(self, shape: CacheShape, cache: FrameCache) -> None:
        self.shape, self.cache = shape, cache
        self.history = FrameCache(shape)
        self.owner = torch.full((shape.heads, 0), -1, dtype=torch.long, device=shape.device)  # slot of each past token
        self.measuring = True
        self.passes: list[Pass] = []  # of this chunk, in their order

    @property
    def recall(self) -> float:
        """Mean over the chunk's measured passes; 1 where there was none."""
        return sum(done.recall for done in self.passes) / len(self.passes) if self.passes else 1.0

    def begin(self, start: int) -> None:
        self.history.begin(start)
        self.passes = []

    def measure(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Call after `cache.attend` and before `cache.append`; query, key, value as there."""
        if not self.measuring:
            return
        probe, scale = query[:, ::QUERY_STRIDE].float(), self.shape.head_dim**-0.5
        keys, _ = self.history.view(key, value)
        dense = (probe @ keys.float().transpose(1, 2) * scale).softmax(-1)
        held, _ = self.cache.view(key, value)
        logits = probe @ held.float().transpose(1, 2) * scale
        if self.cache.bias is not None:
            logits = logits + self.cache.bias[:, None]
        allowed = self.cache.allowed(torch.arange(0, query.shape[1], QUERY_STRIDE, device=query.device))
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        fast = logits.softmax(-1)
        entry = self._entries(held.shape[1], key.shape[1])
        mass = torch.zeros(*fast.shape[:2], fast.shape[2] + 1, device=fast.device)
        mass.scatter_add_(2, entry[:, None].expand_as(dense), dense)
        recall = torch.minimum(mass[..., :-1], fast).sum(-1).mean().item()
        before = [sum(getattr(done, name) for done in self.passes) for name in ("executed", "possible")]
        self.passes.append(Pass(recall, self.cache.executed - before[0], self.cache.possible - before[1]))

    def _entries(self, held: int, own: int) -> Tensor:
        """For each token of the history and the chunk its index among the cache's entries; `held` (one past) = none."""
        size, cache = self.shape.frame_tokens, self.cache
        tokens = self.history.tokens
        slots = cache.slots if isinstance(cache, TempCache) else 0
        offset = slots - (cache.prefix - cache.first)  # slot number of the view's first entry
        entry = torch.where(self.owner >= 0, self.owner - offset, held)
        for index, time in enumerate(cache.times):
            first = cache.prefix - cache.first + index * size
            entry[:, time * size : (time + 1) * size] = torch.arange(first, first + size, device=entry.device)
        chunk = torch.arange(held - own, held, device=entry.device).expand(len(entry), -1)
        return torch.cat([entry[:, :tokens], chunk], 1)

    def appended(self, query: Tensor, key: Tensor, value: Tensor, before: list[int]) -> None:
        """Call after `cache.append`; before: the cache's `times` before it."""
        size = self.shape.frame_tokens
        self.history.append(query, key, value)
        fresh = torch.full((len(self.owner), key.shape[1]), -1, dtype=torch.long, device=key.device)
        self.owner = torch.cat([self.owner, fresh], 1)
        if not isinstance(self.cache, TempCache):
            return
        known = [*before, *self.history.times[-(key.shape[1] // size) :]]
        gone = [time for time in known if time not in self.cache.times]
        for time, report in zip(gone, self.cache.reports, strict=False):  # no reports where there is no memory
            self.owner = torch.where(self.owner >= 0, report.moved.gather(1, self.owner.clamp(min=0)), -1)
            self.owner[:, time * size : (time + 1) * size] = report.assigned
