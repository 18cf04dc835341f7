"""What the operators of plugins/table.py compute, in plain PyTorch: any float type, float64 throughout or not at all;
outputs are new tensors; sums are in float32 at least. It shares no code with the kernels. Layouts and meanings are the
table's; an operator's function has its name. BLOCK_M: queries of a block (the table's, which depends on the type)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

KEYS = 128  # rows of a key block
SAMPLES = 64  # queries that a prompt's masses are measured by, at most


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.itemsize < 4 else x


def attend(query: Tensor, key: Tensor, value: Tensor, count: Tensor, first: Tensor) -> Tensor:
    rows = torch.arange(key.shape[1], device=key.device)
    return _attend(query, key, value, count, (rows >= first[:, None])[:, None])


def attend_sparse(query: Tensor, key: Tensor, value: Tensor, count: Tensor, order: Tensor, counts: Tensor,
                  blocks: Tensor, *, BLOCK_M: int) -> Tensor:  # fmt: skip
    visits = torch.arange(blocks.shape[2], device=key.device) < counts[..., None]
    chosen = torch.zeros(len(key), counts.shape[1], key.shape[1] // KEYS, dtype=torch.int32, device=key.device)
    chosen.scatter_add_(2, blocks.clamp(0, chosen.shape[2] - 1).long(), visits.int())  # past the counts: anything
    block = order.argsort(-1) // BLOCK_M  # [G, N]: of each query
    allowed = chosen.gather(1, block[..., None].expand(-1, -1, chosen.shape[2])) > 0
    return _attend(query, key, value, count, allowed.repeat_interleave(KEYS, dim=2))


def _attend(query: Tensor, key: Tensor, value: Tensor, count: Tensor, allowed: Tensor) -> Tensor:
    """allowed: bool [G, N or 1, R]. A value is a sum over its group's members, so it is weighed without their count."""
    logits = _wide(query).transpose(0, 1) @ _wide(key).transpose(1, 2) * query.shape[-1] ** -0.5
    held = allowed & (count > 0)[:, None]
    lse = torch.where(held, logits + count[:, None].log(), -math.inf).logsumexp(-1)
    weight = torch.where(held, (logits - lse[..., None]).exp(), 0.0)
    return (weight @ _wide(value)).transpose(0, 1).to(query.dtype).contiguous()


def append(cache: Tensor, new: Tensor, row: Tensor) -> Tensor:
    after = cache.clone()
    heads = len(cache) // len(row)
    for stream, start in enumerate(row.tolist()):
        groups = slice(stream * heads, (stream + 1) * heads)
        after[groups, start : start + len(new)] = new[:, groups].transpose(0, 1)
    return after


def turn(source: Tensor, lines: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A pair of adjacent dimensions (a, b) is the complex number a + ib, turned by cos + i sin."""
    frame = torch.arange(len(source), device=source.device) // (len(source) // len(lines))
    c, s = (table[lines[frame].long()][:, None] for table in (cos, sin))
    time = 2 * cos.shape[1]
    a, b = _wide(source)[..., :time:2], _wide(source)[..., 1:time:2]
    turned = torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)
    return torch.cat([turned.to(source.dtype), source[..., time:]], -1).contiguous()


def turn_into(cache: Tensor, source: Tensor, lines: Tensor, cos: Tensor, sin: Tensor, *, row: int = 0) -> Tensor:
    after = cache.clone()
    after[:, row : row + source.shape[1]] = turn(source.transpose(0, 1), lines, cos, sin).transpose(0, 1)
    return after


def quantise(x: Tensor) -> Tensor:
    return _words((127 * F.normalize(_wide(x), dim=-1)).round().to(torch.int8))


def nearest(probe: Tensor, code: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    product = _codes(probe).float() @ _codes(code).float().transpose(1, 2)  # whole numbers below 2^24: exact
    slots = torch.arange(code.shape[1], device=code.device)
    held = (slots >= first[:, None])[:, None].expand_as(product)
    best, match = product.masked_fill(~held, -math.inf).max(-1)
    found = held.any(-1)
    return torch.where(found, best / 127**2, -1.0), torch.where(found, match, -1).int()


def place(slot: Tensor, newcomer: Tensor, replace: Tensor, new_value: Tensor, new_key: Tensor, new_code: Tensor,
          new_stay: Tensor, key: Tensor, value: Tensor, code: Tensor, count: Tensor, stay: Tensor,
          ) -> tuple[Tensor, ...]:  # fmt: skip
    group = torch.arange(len(slot), device=slot.device)[:, None].expand_as(slot)
    slot, newcomer, replace = slot.long(), newcomer.long(), replace != 0
    evicts = replace & (count[group, slot] > 0)
    tensors = (key, value, code, count, stay)
    ones = torch.ones(newcomer.shape, dtype=count.dtype, device=count.device)
    entries = [*(entry[group, newcomer] for entry in (new_key, new_value, new_code)), ones, new_stay[newcomer]]
    losers = []
    for tensor, entry in zip(tensors[1:4], entries[1:4], strict=True):
        mask = evicts.reshape(evicts.shape + (1,) * (entry.dim() - 2))
        losers.append(torch.where(mask, tensor[group, slot], entry))
    after = [tensor.clone() for tensor in tensors]
    for tensor, entry in zip(after, entries, strict=True):
        tensor[group[replace], slot[replace]] = entry[replace]
    return *after, *losers


def merge(target: Tensor, order: Tensor, new_value: Tensor, new_key: Tensor, new_code: Tensor, new_count: Tensor,
          new_stay: Tensor, key: Tensor, value: Tensor, code: Tensor, count: Tensor, stay: Tensor, *,
          renew: bool = True) -> tuple[Tensor, ...]:  # fmt: skip
    group = torch.arange(len(target), device=target.device)[:, None].expand_as(target)
    joins = target < code.shape[1]
    to, token = (group[joins], target[joins].long()), (group[joins], order[joins].long())
    value, count = (
        (_wide(tensor).index_put(to, _wide(entry)[token], accumulate=True)).to(tensor.dtype)
        for tensor, entry in ((value, new_value), (count, new_count))
    )
    key, code, stay = key.clone(), code.clone(), stay.clone()
    if renew:
        last = joins.clone()
        last[:, :-1] &= target[:, :-1] != target[:, 1:]
        to, token = (group[last], target[last].long()), (group[last], order[last].long())
        key[to], code[to], stay[to] = new_key[token], new_code[token], new_stay[token[1]]
    return key, value, code, count, stay


def arrange(key: Tensor) -> Tensor:
    return key.argsort(dim=-1, stable=True).int()


def block_means(query: Tensor, order: Tensor, *, BLOCK_M: int) -> Tensor:
    x = _wide(query).transpose(0, 1)
    ordered = x.gather(1, order.long()[..., None].expand_as(x))
    return torch.stack([block.mean(1) for block in ordered.split(BLOCK_M, dim=1)], 1).to(query.dtype)


def near_blocks(mean: Tensor, key: Tensor, count: Tensor) -> Tensor:
    logits = _wide(mean) @ _wide(key).transpose(1, 2) * mean.shape[-1] ** -0.5 + count[:, None].log()
    return logits.unflatten(-1, (-1, KEYS)).amax(-1)


def choose_blocks(near: Tensor, row: Tensor, *, own: int = 1, density: float = 1.0) -> tuple[Tensor, Tensor]:
    start = row.repeat_interleave(len(near) // len(row))[:, None, None]
    block = torch.arange(near.shape[2], device=near.device)
    own = (block >= start // KEYS) & (block * KEYS < start + own)
    worth = torch.where(own, math.inf, torch.where(near.isnan(), -math.inf, near))
    always, held = own.sum(-1), (worth > -math.inf).sum(-1)
    # The share in float32, as everywhere: the density's rounding may decide.
    counts = always + ((held - always).float() * density).ceil().int()
    return counts.int(), worth.sort(dim=-1, descending=True, stable=True).indices.int()


def signatures(x: Tensor, planes: Tensor) -> Tensor:
    return _bucket(_wide(x).transpose(0, 1) @ planes.to(_wide(x).dtype))


def keep_text(query: Tensor, key: Tensor, count: Tensor, planes: Tensor, always: Tensor, *, bits: int = 8) -> Tensor:
    keep = always != 0
    for table in planes.to(_wide(query).dtype).split(bits, dim=1):
        mine, theirs = _bucket(_wide(query).transpose(0, 1) @ table), _bucket(_wide(key) @ table)
        keep = keep | (theirs[:, :, None] == mine[:, None]).any(-1)
    return torch.where(keep, count, 0.0)


def text_mass(query: Tensor, key: Tensor, count: Tensor, *, quantised: bool = True) -> Tensor:
    sample = _wide(query)[:: -(-len(query) // SAMPLES)].transpose(0, 1)
    x, y = (_rounded(sample), _rounded(_wide(key))) if quantised else (sample, _wide(key))
    logits = x @ y.transpose(1, 2) * key.shape[-1] ** -0.5 + count[:, None].log()
    return logits.softmax(-1).mean(1)


def _rounded(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round() * scale


def condense_text(mass: Tensor, key: Tensor, value: Tensor, count: Tensor, *, share: float = 0.95,
                  ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    most, order = mass.sort(dim=-1, descending=True, stable=True)
    fewest = most.cumsum(-1) - most < share
    keep = torch.zeros_like(fewest).scatter(1, order, fewest)
    rest = torch.where(keep | (count == 0), 0.0, mass)
    part = rest / torch.where(rest.sum(-1, keepdim=True) > 0, rest.sum(-1, keepdim=True), 1.0)
    entropy = (torch.special.xlogy(part, count) - torch.special.xlogy(part, part)).sum(-1, keepdim=True)
    weight = torch.where((part > 0).any(-1, keepdim=True), entropy.exp(), 0.0)
    mean_key = part[:, None] @ _wide(key)
    mean_value = part[:, None] @ (_wide(value) / count.clamp(min=1)[..., None])
    return (
        torch.cat([key, mean_key.to(key.dtype)], 1),
        torch.cat([value * keep[..., None], (mean_value * weight[..., None]).to(value.dtype)], 1),
        torch.cat([torch.where(keep, count, 0.0), weight], 1),
    )


def _bucket(projections: Tensor) -> Tensor:
    return sum((projections[..., bit] > 0).int() << bit for bit in range(projections.shape[-1]))


def _codes(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.int8)


def _words(codes: Tensor) -> Tensor:
    return codes.contiguous().view(torch.int32)
