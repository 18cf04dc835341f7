"""AnnSA: each block of queries attends only to the keys nearest to it (paper, section on approximate self-attention).

A block holds queries that are near each other in the picture (ours: it keeps more), or of one LSH signature, hence of
like content (the paper's buckets). Each block takes the keys with the most neighbours in it, a fixed share of the
cache. The chunk's own keys are always attended to."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.attention import ann
from fastar_backend.config import AttentionConfig


@dataclasses.dataclass(frozen=True)
class Selection:
    order: Tensor  # [heads, queries]: query numbers, block after block
    keys: Tensor  # [heads, blocks, keys_per_block]: cached keys of each block
    blocks: int

    @property
    def keys_per_block(self) -> int:
        return self.keys.shape[-1]


def scores(query: Tensor, keys: Tensor, config: AttentionConfig) -> Tensor:
    """How near each query [heads, n, dim] is to each key [heads, m, dim]: [heads, n, m]. LSH: shared buckets over the
    tables; quantised: the int8 product; exact: the product."""
    if config.index == "lsh":
        tables, bits = config.index_tables, config.index_bits
        mine, theirs = ann.signatures(query, tables, bits), ann.signatures(keys, tables, bits)
        return (mine[:, :, None] == theirs[:, None]).sum(-1).float()
    if config.index == "quantised":
        query, keys = ann.quantise(query), ann.quantise(keys)
    return query @ keys.transpose(1, 2) * query.shape[-1] ** -0.5


def ordered(query: Tensor, places: Tensor | None, config: AttentionConfig) -> Tensor:
    """Numbers of the queries [heads, n, dim], block after block: [heads, n]. places: [n] (`cache.by_place`), or None:
    by content."""
    if places is not None and config.sparse_order == "place":
        return places.expand(len(query), -1)
    return ann.signatures(query, 1, config.index_bits)[..., 0].argsort(dim=-1, stable=True)


def select(query: Tensor, keys: Tensor, bias: Tensor | None, config: AttentionConfig, places: Tensor | None = None,
           ) -> Selection:  # fmt: skip
    """query: [heads, n, dim]; keys: [heads, m, dim]; bias: [heads, m] or None (-inf: never taken unless nothing else
    is); places: as `ordered` takes them."""
    heads, queries, _ = query.shape
    blocks = max(1, queries // config.sparse_block)
    while queries % blocks:  # equal blocks: the nearest smaller number of them
        blocks -= 1
    order = ordered(query, places, config)
    near = scores(query, keys, config)
    if config.index != "lsh":
        near = (near if bias is None else near + bias[:, None]).softmax(-1)
    of_block = near.gather(1, order[..., None].expand_as(near)).unflatten(1, (blocks, -1)).sum(2)
    if bias is not None:
        of_block = of_block.masked_fill(bias[:, None] == -torch.inf, -1.0)
    count = math.ceil(config.sparse_density * keys.shape[1])
    return Selection(order, of_block.topk(count, dim=-1).indices.sort(-1).values, blocks)


def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, selection: Selection) -> Tensor:
    """Block-sparse attention. keys, values: [heads, m + own, dim], the last `own` (the chunk's) attended to by all."""
    heads, queries, dim = query.shape
    own = torch.arange(keys.shape[1] - queries, keys.shape[1], device=query.device)
    index = torch.cat([selection.keys, own.expand(heads, selection.blocks, -1)], -1)
    rows = selection.order[..., None].expand(-1, -1, dim)
    q = query.gather(1, rows).unflatten(1, (selection.blocks, -1))
    head = torch.arange(heads, device=query.device)[:, None, None]
    mask = None
    if bias is not None:
        mask = bias[head, index][:, :, None].to(query.dtype).expand(-1, -1, q.shape[2], -1)
    out = F.scaled_dot_product_attention(q, keys[head, index], values[head, index], mask)
    return torch.empty_like(query).scatter_(1, rows, out.flatten(1, 2))
