"""Approximate nearest neighbours among keys: LSH and quantised (the paper's two indices), and an exact one beside
them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.config import AttentionConfig


@functools.lru_cache(maxsize=32)
def planes(dim: int, tables: int, bits: int, device: torch.device) -> Tensor:
    """Random projections [dim, tables * bits], the same for queries and keys, for every stream and every run."""
    generator = torch.Generator().manual_seed(20602)
    return torch.randn(dim, tables * bits, generator=generator).to(device)


def signatures(x: Tensor, tables: int, bits: int) -> Tensor:
    """Bucket numbers [..., tables], int64, of x [..., dim]: the signs of `bits` random projections a table."""
    signs = (x.float() @ planes(x.shape[-1], tables, bits, x.device) > 0).unflatten(-1, (tables, bits))
    return (signs << torch.arange(bits, device=x.device)).sum(-1)


def quantise(x: Tensor) -> Tensor:
    """x rounded to 255 levels a row (symmetric int8 with a scale per row), returned de-quantised: what an int8 kernel
    computes with, on any device."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round() * scale


def prepare(x: Tensor, config: AttentionConfig) -> Tensor:
    """x [..., dim] as the index holds it: unit length, float32, and rounded where the index is quantised."""
    x = F.normalize(x.float(), dim=-1)
    return quantise(x) if config.index == "quantised" else x


def nearest(probe: Tensor, keys: Tensor, valid: Tensor, config: AttentionConfig) -> Tensor:
    """For each probe [heads, n, dim] the index [heads, n] of its nearest key [heads, m, dim] by cosine; both prepared
    and finite.

    valid: [heads, m] bool. Where no key is found (no valid one; with LSH: none in its buckets) the index is -1.
    """
    if config.index == "lsh":
        return _nearest_lsh(probe, keys, valid, config)
    excluded = torch.zeros(valid.shape, device=keys.device).masked_fill_(~valid, -torch.inf)
    index = torch.baddbmm(excluded[:, None], probe, keys.transpose(1, 2)).argmax(-1)
    return torch.where(valid.any(-1, keepdim=True), index, -1)


def top1(probe: Tensor, keys: Tensor, valid: Tensor, config: AttentionConfig) -> Tensor:
    """`nearest` of vectors not prepared yet."""
    keys = keys.masked_fill(~valid[..., None], 0.0)  # what is not valid may not even be finite
    return nearest(prepare(probe, config), prepare(keys, config), valid, config)


def _nearest_lsh(probe: Tensor, keys: Tensor, valid: Tensor, config: AttentionConfig, candidates: int = 16) -> Tensor:
    """Sorts each table's buckets and re-scores up to `candidates` keys of the probe's bucket: no n x m product."""
    tables = config.index_tables
    key_codes = signatures(keys, tables, config.index_bits).masked_fill(~valid[..., None], 1 << 62)
    codes, order = key_codes.transpose(1, 2).sort(-1)  # [heads, tables, m]
    wanted = signatures(probe, tables, config.index_bits).transpose(1, 2).contiguous()  # [heads, tables, n]
    first = torch.searchsorted(codes.contiguous(), wanted)
    at = first[..., None] + torch.arange(candidates, device=probe.device)  # [heads, tables, n, candidates]
    inside = at < codes.shape[-1]
    at = at.clamp(max=codes.shape[-1] - 1).flatten(2)
    same = (codes.gather(2, at).unflatten(2, (-1, candidates)) == wanted[..., None]) & inside
    found = order.gather(2, at).unflatten(2, (-1, candidates))  # key numbers
    found = found.permute(0, 2, 1, 3).flatten(2)  # [heads, n, tables * candidates]
    same = same.permute(0, 2, 1, 3).flatten(2)
    heads = torch.arange(len(keys), device=keys.device)[:, None, None]
    scores = (keys[heads, found] * probe[:, :, None]).sum(-1).masked_fill(~same, -torch.inf)
    best, which = scores.max(-1)
    return torch.where(best > -torch.inf, found.gather(2, which[..., None])[..., 0], -1)
