"""The quality guard's measurement: what AnnSA's choice of keys costs, on a few queries of every chunk.

For a sampled query it compares sparse attention with dense attention over the same kept keys, the chunk's own among
them: recall is the share of dense attention's mass that lies on keys that the query's block attends to; the error is
||sparse output - dense output|| / ||dense output|| over the queries of one sample. The pass that is measured is the
writing one: its queries are furthest from those that the selection was made for. What TempCache lost before is not seen
here (`recall.py` measures that, at a price). Nothing waits for the device.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from fastar_backend.attention.ann_sa import Selection
from fastar_backend.attention.cache import CacheShape
from fastar_backend.config import AttentionConfig

QUERIES = 16  # of a sample: one layer, one head
LAYERS = 8  # that are sampled in a chunk, at most


@dataclasses.dataclass(frozen=True)
class Sample:
    """Queries of one head of one layer. queries: [n] numbers within the chunk, int64."""

    head: int
    queries: Tensor


@functools.lru_cache(maxsize=32)
def _parts(queries: int, device: torch.device) -> Tensor:
    """All queries of a chunk in a random order that is always the same, a sample a row (the last one filled up from the
    first): [samples, n]."""
    order = torch.randperm(queries, generator=torch.Generator().manual_seed(20602))
    size = min(QUERIES, queries)
    return torch.cat([order, order[: -queries % size]]).unflatten(0, (-1, size)).to(device)


def plan(config: AttentionConfig, shape: CacheShape, layers: int, start: int) -> list[Sample | None]:
    """Which sample each layer takes in the chunk that begins at latent frame `start`; None: it takes none. Depends on
    nothing else, so a stream repeats itself. Within ceil(layers / LAYERS) * heads * ceil(queries / QUERIES) chunks every
    query of every head of every layer is measured."""
    if config.guard == "off" or config.sparse_density >= 1:
        return [None] * layers
    chunk, stride, parts = start // shape.chunk_frames, -(-layers // LAYERS), _parts(shape.chunk_tokens, shape.device)
    turn = chunk // stride
    return [
        Sample((turn + layer) % shape.heads, parts[(turn // shape.heads + layer) % len(parts)])
        if layer % stride == chunk % stride
        else None
        for layer in range(layers)
    ]


def compare(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, allowed: Tensor) -> Tensor:
    """query: [n, dim]; keys, values: [m, dim]; bias: [m], the groups' log-counts, or None; allowed: [n, m] bool, at
    least one key of each query. Returns recall (mean over the queries) and error, float32 [2]."""
    logits = query.float() @ keys.float().transpose(0, 1) * query.shape[-1] ** -0.5
    mass = (logits if bias is None else logits + bias).softmax(-1)
    kept = mass * allowed
    share = kept.sum(-1, keepdim=True)
    values = values.float()
    dense = mass @ values
    return torch.stack([share.mean(), (kept @ values / share - dense).norm() / dense.norm()])


def by_keys(sample: Sample, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None,
            selection: Selection) -> Tensor:  # fmt: skip
    """As `ann_sa.attend` takes them: query [heads, n, dim]; keys, values: [heads, m, dim], the chunk's own last; bias:
    [heads, m] or None. Returns recall and error, [2]."""
    head, own = sample.head, query.shape[1]
    block = selection.order[head].argsort()[sample.queries] // (own // selection.blocks)
    allowed = torch.zeros(len(block), keys.shape[1], dtype=torch.bool, device=keys.device)
    allowed.scatter_(1, selection.keys[head, block], True)
    allowed[:, -own:] = True
    weight = None if bias is None else bias[head]
    return compare(query[head, sample.queries], keys[head], values[head], weight, allowed)


def by_blocks(sample: Sample, query: Tensor, keys: Tensor, sums: Tensor, count: Tensor, tile: tuple[int, int],
              selection: tuple[Tensor, Tensor, Tensor]) -> Tensor:  # fmt: skip
    """As `kernels.ops.attend` takes them: query: [n, heads, dim]; keys, sums: [heads, m, dim], `sums` of the members'
    values; count: float32 [heads, m], 0 where there is no key; tile: (queries, keys) of a block; selection: (order,
    counts, blocks). Returns recall and error, [2]."""
    head, (order, counts, blocks) = sample.head, (part[sample.head] for part in selection)
    block = order.argsort()[sample.queries] // tile[0]
    visited = torch.arange(blocks.shape[1], device=blocks.device) < counts[block, None]
    taken = torch.zeros(len(block), -(-keys.shape[1] // tile[1]), dtype=torch.bool, device=keys.device)
    taken.scatter_(1, blocks[block].long(), visited)
    allowed = taken.repeat_interleave(tile[1], 1)[:, : keys.shape[1]]
    members = count[head]
    values = sums[head].float() / members.clamp(min=1)[:, None]
    return compare(query[sample.queries, head], keys[head], values, members.log(), allowed)


def summary(measured: list[Tensor], config: AttentionConfig) -> tuple[float, float] | None:
    """Mean recall and error of a chunk's samples; 1 and 0 where nothing was left out; None: the guard is off. Waits for
    the device."""
    if config.guard == "off":
        return None
    recall, error = torch.stack(measured).mean(0).tolist() if measured else (1.0, 0.0)
    return recall, error
