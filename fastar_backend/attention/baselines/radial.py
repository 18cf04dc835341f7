"""RadialAttention (Li et al., arXiv 2506.19852, section 4 and `radial_attn/attn_mask.py`): a fixed mask whose density
falls with the distance in time.

Between frames at distance d a query sees keys within a window around its own place. The window halves whenever d
doubles; once it is narrower than a block, whole frames are left out instead (one in 2, 4, ... stays). The first frame
is a sink. The mask is by blocks of tokens, and the same for all heads; a block stays if most of its columns are dense
enough.

Ported: the mask's last rows, those of the chunk, made anew as the stream grows. Blocks end with their frame; in the
public code they straddle."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastar_backend.attention.baselines.history import Block, Plan, SparseHistory, attend, block_size, mask, pairs

DENSE_COLUMN, DENSE_COLUMNS = 1 / 3, 0.6  # of a block: rows that a column needs, and share of such columns


@functools.lru_cache(maxsize=512)
def pair_mask(distance: int, size: int, block: int, decay: float) -> Tensor:
    """Blocks that are seen between two frames of `size` tokens at that distance, bool [blocks, blocks]."""
    count = -(-size // block)
    group = distance.bit_length()
    reach = 2 ** size.bit_length() / 2**group
    if distance and reach < block and distance % int(block / reach):
        return torch.zeros(count, count, dtype=torch.bool)
    width = {0: size, 1: size // 2}.get(distance, max(reach * decay, block))
    place = torch.arange(size)
    near = ((place[:, None] - place).abs() <= width).float()
    of_block = torch.nn.functional.one_hot(place // block, count).float()  # [size, blocks]
    column = (of_block.T @ near) / of_block.sum(0)[:, None]  # [blocks, size]: share of a block's rows
    dense, touched = ((column > least).float() @ of_block for least in (DENSE_COLUMN, 0.0))
    return dense / touched.clamp(min=1) > DENSE_COLUMNS


@functools.lru_cache(maxsize=4)
def plan_of(frames: int, chunk: int, size: int, block: int, decay: float, device: torch.device) -> Plan:
    """frames: latent frames of history and chunk; the chunk is the last ones."""
    plan = []
    inside = torch.arange(size) // block
    for frame in range(frames - chunk, frames):
        seen = torch.stack([pair_mask(abs(frame - other), size, block, decay) for other in range(frames)])
        seen[0] = True  # the sink
        tokens = seen[:, :, inside]  # [frames, query blocks, tokens of a frame]
        for row in range(tokens.shape[1]):
            first = (frame - frames + chunk) * size + row * block
            queries = torch.arange(first, first + int((inside == row).sum()), device=device)
            plan.append(Block(queries, tokens[:, row].flatten().nonzero()[:, 0].to(device)))
    return tuple(plan)


class RadialCache(SparseHistory):
    def _plan(self, keys: int) -> Plan:
        shape, size = self.shape, self.shape.frame_tokens
        block = block_size(size, self.config)
        return plan_of(keys // size, shape.chunk_frames, size, block, self.config.baseline.radial_decay, shape.device)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, float]:
        plan, out = self._plan(keys.shape[1]), torch.empty_like(query)
        attend(query, keys, values, plan, torch.arange(len(query), device=query.device), out)
        return out, pairs(plan)

    def _seen(self, queries: Tensor) -> Tensor:
        keys = self.tokens + self.shape.chunk_tokens
        return mask(self._plan(keys), queries, keys).expand(self.shape.heads, -1, -1)
