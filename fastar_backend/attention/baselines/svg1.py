"""Sparse VideoGen (Xi et al., arXiv 2502.01776, section 4 and `svg/models/wan/attention.py`): each head is spatial or
temporal, as a sample says.

A spatial head sees frames near the query's own, a temporal head places near the query's own in all frames; both see the
first frame. In every pass some queries are attended densely, and a head takes the mask whose output is nearer to that
(least mean squared error). The sampling is not counted as executed.

Ported: the paper's band of a square mask, of which a share is kept on average, becomes that share of the keys of a
chunk: its newest frames, or places in all frames. Sampled queries are evenly spaced, not random."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastar_backend.attention.baselines.history import Block, Plan, SparseHistory, attend, block_size, mask, pairs
from fastar_backend.attention.cache import CacheShape
from fastar_backend.config import AttentionConfig


@functools.lru_cache(maxsize=4)
def spatial(frames: int, chunk: int, size: int, share: float, device: torch.device) -> Plan:
    """The first frame and the newest ones. frames: of history and chunk, in latent frames of `size` tokens."""
    first = max(1, frames - max(chunk, math.ceil(share * frames))) * size
    keys = torch.cat([torch.arange(size), torch.arange(first, frames * size)]).to(device)
    return (Block(torch.arange(chunk * size, device=device), keys),)


@functools.lru_cache(maxsize=4)
def temporal(frames: int, chunk: int, size: int, block: int, share: float, device: torch.device) -> Plan:
    """All of the first frame, and of all frames the places around a block's own."""
    margin = math.ceil(max(0.0, share * size - block) / 2)
    token = torch.arange(frames * size).view(frames, size)
    plan = []
    for start in range(0, size, block):
        stop = min(size, start + block)
        near = token[1:, max(0, start - margin) : stop + margin].flatten()
        queries = token[:chunk, start:stop].flatten()
        plan.append(Block(queries.to(device), torch.cat([token[0], near]).to(device)))
    return tuple(plan)


class Svg1Cache(SparseHistory):
    def __init__(self, shape: CacheShape, config: AttentionConfig, layer: int) -> None:
        super().__init__(shape, config, layer)
        self.temporal = torch.zeros(shape.heads, dtype=torch.bool, device=shape.device)  # which heads were, last

    def _plans(self, keys: int) -> tuple[Plan, Plan]:
        shape, size, share = self.shape, self.shape.frame_tokens, self.config.baseline.svg1_share
        frames, block = keys // size, block_size(size, self.config)
        return (
            spatial(frames, shape.chunk_frames, size, share, shape.device),
            temporal(frames, shape.chunk_frames, size, block, share, shape.device),
        )

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, float]:
        plans = self._plans(keys.shape[1])
        errors = self._errors(query, keys, values, plans)
        self.temporal = errors[1] < errors[0]
        out, executed = torch.empty_like(query), 0
        for plan, heads in zip(plans, (~self.temporal, self.temporal), strict=True):
            chosen = heads.nonzero()[:, 0]
            if len(chosen):
                attend(query, keys, values, plan, chosen, out)
                executed += len(chosen) * pairs(plan)
        return out, executed / len(query)

    def _errors(self, query: Tensor, keys: Tensor, values: Tensor, plans: tuple[Plan, Plan]) -> Tensor:
        """Mean squared error of the sampled queries' outputs under each plan: [2, heads]."""
        count = min(self.config.baseline.svg1_rows, query.shape[1])
        rows = torch.linspace(0, query.shape[1] - 1, count, device=query.device).long()
        logits = (query[:, rows] @ keys.transpose(1, 2)).float() * self.shape.head_dim**-0.5
        exact = logits.softmax(-1) @ values.float()
        found = []
        for plan in plans:
            part = logits.masked_fill(~mask(plan, rows, keys.shape[1]), -torch.inf).softmax(-1) @ values.float()
            found.append((part - exact).square().mean((1, 2)))
        return torch.stack(found)

    def _seen(self, queries: Tensor) -> Tensor:
        keys = self.tokens + self.shape.chunk_tokens
        masks = torch.stack([mask(plan, queries, keys) for plan in self._plans(keys)])
        return masks[self.temporal.long()]
