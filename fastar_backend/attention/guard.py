"""The quality guard's measurement: what AnnSA's choice of keys costs, on a few queries of every chunk.

For a sampled query it compares sparse attention with dense attention over the same kept keys, the chunk's own among
them: recall is the share of dense attention's mass that lies on keys that the query's block attends to; the error is
||sparse output - dense output|| / ||dense output|| over the queries of a layer. The pass that is measured is the
writing one: its queries are furthest from those that the selection was made for. What TempCache lost before is not seen
here (`recall.py` measures that, at a price). Heads differ much more than the queries of a head (docs/decisions.md), so
a sample has few queries of many heads. Nothing waits for the device.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from fastar_backend.attention.ann_sa import Selection
from fastar_backend.attention.cache import CacheShape
from fastar_backend.config import AttentionConfig

LAYERS, HEADS, QUERIES = 6, 6, 4  # layers of a chunk, heads of a layer, queries of a head that are sampled, at most


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is looked at in one layer, int64 on the device. heads: [n]; queries: [m] numbers within the chunk."""

    heads: Tensor
    queries: Tensor


@functools.lru_cache(maxsize=32)
def _parts(queries: int, device: torch.device) -> Tensor:
    """All queries of a chunk in a random order that is always the same, a sample a row (the last one filled up from the
    first): [samples, n]."""
    order = torch.randperm(queries, generator=torch.Generator().manual_seed(20602))
    size = min(QUERIES, queries)
    return torch.cat([order, order[: -queries % size]]).unflatten(0, (-1, size)).to(device)


@functools.lru_cache(maxsize=32)
def _heads(heads: int, device: torch.device) -> Tensor:
    """All heads, a sample a row: [samples, n], as many in each (the last ones filled up from the first)."""
    apart = -(-heads // HEADS)
    return (torch.arange(apart)[:, None] + torch.arange(0, heads, apart)).remainder(heads).to(device)


def turn(config: AttentionConfig, layers: int, chunk: int) -> int:
    """Which of the sets of layers a chunk's samples are from; 0 where the guard is off."""
    return chunk % -(-layers // LAYERS) if config.guard != "off" else 0


def plan(config: AttentionConfig, shape: CacheShape, layers: int, start: int) -> list[Sample | None]:
    """Which sample each layer takes in the chunk that begins at latent frame `start`; None: it takes none. Depends on
    nothing else, so that a stream can be repeated. Every query of every head of every layer has its turn within
    ceil(layers / LAYERS) * ceil(heads / HEADS) * ceil(queries / QUERIES) chunks."""
    if config.guard == "off":
        return [None] * layers
    heads, parts = _heads(shape.heads, shape.device), _parts(shape.chunk_tokens, shape.device)
    every, chunk = -(-layers // LAYERS), start // shape.chunk_frames
    mine, time = turn(config, layers, chunk), chunk // every
    return [
        Sample(heads[(time + layer) % len(heads)], parts[(time // len(heads) + layer) % len(parts)])
        if layer % every == mine
        else None
        for layer in range(layers)
    ]


def compare(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, allowed: Tensor) -> Tensor:
    """query: [heads, n, dim]; keys, values: [heads, m, dim]; bias: [heads, m], the groups' log-counts, or None;
    allowed: [heads, n, m] bool, at least one key of each query. Returns recall (mean over the queries) and error,
    float32 [2]."""
    logits = query.float() @ keys.float().transpose(1, 2) * query.shape[-1] ** -0.5
    mass = (logits if bias is None else logits + bias[:, None]).softmax(-1)
    kept = mass * allowed
    share = kept.sum(-1, keepdim=True)
    dense, sparse = (torch.cat([mass, kept / share], 1) @ values.float()).chunk(2, 1)
    return torch.stack([share.mean().clamp(max=1), (sparse - dense).norm() / dense.norm().clamp(min=1e-12)])


def by_keys(sample: Sample, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None,
            selection: Selection) -> Tensor:  # fmt: skip
    """As `ann_sa.attend` takes them: query [heads, n, dim]; keys, values: [heads, m, dim], the chunk's own last; bias:
    [heads, m] or None. Returns recall and error, [2]."""
    heads, own = sample.heads, query.shape[1]
    block = selection.order[heads].argsort(-1)[:, sample.queries] // (own // selection.blocks)
    chosen = selection.keys[heads].gather(1, block[..., None].expand(-1, -1, selection.keys_per_block))
    allowed = torch.zeros(*block.shape, keys.shape[1], dtype=torch.bool, device=keys.device)
    allowed.scatter_(2, chosen, True)
    allowed[..., -own:] = True
    weight = None if bias is None else bias[heads]
    return compare(query[heads][:, sample.queries], keys[heads], values[heads], weight, allowed)


def by_blocks(sample: Sample, query: Tensor, keys: Tensor, sums: Tensor, count: Tensor, tile: tuple[int, int],
              selection: tuple[Tensor, Tensor, Tensor]) -> Tensor:  # fmt: skip
    """As `kernels.ops.attend` takes them: query: [n, heads, dim]; keys, sums: [heads, m, dim], `sums` of the members'
    values; count: float32 [heads, m], 0 where there is no key; tile: (queries, keys) of a block; selection: (order,
    counts, blocks). Returns recall and error, [2]."""
    order, counts, blocks = (part[sample.heads] for part in selection)
    members, m = count[sample.heads], keys.shape[1]
    block = order.argsort(-1)[:, sample.queries] // tile[0]
    visited = torch.arange(blocks.shape[-1], device=blocks.device) < counts.gather(1, block)[..., None]
    chosen = blocks.gather(1, block[..., None].expand_as(visited)).long()
    taken = torch.zeros(*block.shape, -(-m // tile[1]), dtype=torch.bool, device=keys.device)
    taken.scatter_(2, chosen, visited)
    values = sums[sample.heads].float() / members.clamp(min=1)[..., None]
    allowed = taken.repeat_interleave(tile[1], 2)[..., :m]
    return compare(
        query[sample.queries][:, sample.heads].transpose(0, 1), keys[sample.heads], values, members.log(), allowed
    )


def summary(measured: list[Tensor], config: AttentionConfig) -> tuple[float, float] | None:
    """Mean recall and error of a chunk's samples; 1 and 0 where nothing was left out; None: the guard is off. Waits for
    the device."""
    if config.guard == "off":
        return None
    recall, error = torch.stack(measured).mean(0).tolist() if measured else (1.0, 0.0)
    return recall, error
