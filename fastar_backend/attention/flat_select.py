"""AnnSA over blocks of keys, for the block-sparse kernel: which key blocks each block of queries visits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.attention import ann_sa
from fastar_backend.config import AttentionConfig
from fastar_backend.kernels import ops


def select(query: Tensor, keys: Tensor, count: Tensor, own: slice, stop: int, config: AttentionConfig,
           places: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """query: [tokens, heads, dim], turned; keys: [heads, rows, dim]; count: [heads, rows], 0 where there is no key;
    own: rows of the chunk, always visited; places: [tokens] (`cache.by_place`). Returns order, counts, blocks as
    `ops.attend` takes them.

    Queries are ordered as in `ann_sa`. A key block is worth what its best key is to the block's mean query; each query
    block takes the share `sparse_density` of the held key blocks."""
    tokens, heads, dim = query.shape
    rows = ops.sparse_tiles(query.dtype).queries
    x = query.transpose(0, 1)
    order = ann_sa.ordered(x, places, config).contiguous()
    padding = -tokens % rows
    ordered = F.pad(x.gather(1, order[..., None].expand_as(x)), (0, 0, 0, padding)).unflatten(1, (-1, rows))
    weight = torch.full((ordered.shape[1], 1), float(rows), device=x.device)
    weight[-1] -= padding
    mean = (ordered.sum(2, dtype=torch.float32) / weight).to(keys.dtype)  # [heads, query blocks, dim]
    end = stop + -stop % ops.KEY_BLOCK
    near = torch.baddbmm(
        count[:, None, :end].log().to(mean.dtype), mean, keys[:, :end].transpose(1, 2), alpha=dim**-0.5
    )
    near = near.unflatten(2, (-1, ops.KEY_BLOCK)).amax(-1)  # [heads, query blocks, key blocks]
    first, last = own.start // ops.KEY_BLOCK, -(-own.stop // ops.KEY_BLOCK)
    near[..., first:last] = torch.inf
    always = last - first
    held = (near[:, 0] > -torch.inf).sum(-1)
    chosen = always + ((held - always) * config.sparse_density).ceil()
    most = always + math.ceil((near.shape[-1] - always) * config.sparse_density)
    blocks = near.topk(most, dim=-1).indices.int()
    counts = chosen.clamp(max=most).int()[:, None].expand(heads, near.shape[1]).contiguous()
    return order, counts, blocks
