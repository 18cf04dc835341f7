"""Random inputs of every operator: each case draws sizes' worth of fresh tensors in float64; `cast` rounds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plugins.table import OPERATORS, Operator

Case = tuple[dict[str, Tensor], dict[str, Any]]  # inputs by name, attributes


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def whole(low: int, high: int, *shape: int) -> Tensor:
    """int32 from low to below high."""
    return torch.randint(low, high, shape, dtype=torch.int32)


def permutations(groups: int, n: int, k: int | None = None) -> Tensor:
    """k of n numbers, in any order: int32 [groups, k]."""
    return torch.rand(groups, n).argsort(-1)[:, :k].int()


def codes(*shape: int) -> Tensor:
    """Random unit vectors, 127 long, as words: int32 [..., D // 4]."""
    x = normal(*shape)
    return (127 * x / x.norm(dim=-1, keepdim=True)).round().to(torch.int8).view(torch.int32)


def cache(groups: int, rows: int, dim: int) -> dict[str, Tensor]:
    """Groups' keys, sums and counts; about a third of the rows hold none, but the last one does."""
    count = whole(1, 9, groups, rows).double() * (torch.rand(groups, rows) < 0.7)
    count[:, -1] = 2
    held = (count > 0)[..., None]
    return {"key": normal(groups, rows, dim) * held, "value": normal(groups, rows, dim) * held, "count": count}


def turns(frames: int, lines: int, half: int) -> dict[str, Tensor]:
    angle = normal(lines, half)
    return {"lines": whole(0, lines, frames), "cos": angle.cos(), "sin": angle.sin()}


def attend(n: int = 33, groups: int = 3, rows: int = 45, dim: int = 16) -> Case:
    held = cache(groups, rows, dim)
    first = whole(0, rows, groups)
    free = torch.arange(rows) < first[:, None]
    held["count"].masked_fill_(free, 0)
    held["value"].masked_fill_(free[..., None], 0)
    return {"query": normal(n, groups, dim), **held, "first": first}, {}


def attend_sparse(n: int = 40, groups: int = 2, rows: int = 384, dim: int = 16, block: int = 32) -> Case:
    lines, most = -(-n // block), rows // 128
    chosen = torch.rand(groups, lines, most).argsort(-1).int()
    counts = whole(1, most + 1, groups, lines)
    held = cache(groups, rows, dim)
    held["count"][:, 127::128] = 1  # no block is empty
    order = permutations(groups, n)
    return {"query": normal(n, groups, dim), **held, "order": order, "counts": counts, "blocks": chosen}, {}


def append(n: int = 35, groups: int = 6, rows: int = 90, dim: int = 16, streams: int = 3) -> Case:
    row = whole(0, rows - n + 1, streams)
    return {"cache": normal(groups, rows, dim), "new": normal(n, groups, dim), "row": row}, {}


def turn(n: int = 69, groups: int = 3, dim: int = 16, frames: int = 3, turned: int = 3) -> Case:
    return {"source": normal(n, groups, dim), **turns(frames, 5, turned)}, {}


def turn_into(n: int = 35, groups: int = 3, rows: int = 50, dim: int = 16, frames: int = 5, turned: int = 8) -> Case:
    inputs = {"cache": normal(groups, rows, dim), "source": normal(groups, n, dim), **turns(frames, 4, turned)}
    return inputs, {"row": int(whole(0, rows - n + 1, 1))}


def quantise(n: int = 33, groups: int = 2, dim: int = 32) -> Case:
    x = normal(groups, n, dim)
    x[0, 0] = 0
    x[0, 1:] *= 1e-3 ** torch.rand(n - 1, 1)  # of any length
    return {"x": x}, {}


def nearest(n: int = 130, groups: int = 3, slots: int = 129, dim: int = 32) -> Case:
    first = torch.tensor([0, slots // 2, slots], dtype=torch.int32)
    return {"probe": codes(groups, n, dim), "code": codes(groups, slots, dim), "first": first}, {}


def new_and_held(groups: int, n: int, slots: int, rows: int, dim: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    new = {"new_value": normal(groups, n, dim), "new_key": normal(groups, n, dim), "new_code": codes(groups, n, dim)}
    held = cache(groups, rows, dim)
    held |= {"code": codes(groups, slots, dim), "stay": normal(groups, slots)}
    return new, {name: held[name] for name in ("key", "value", "code", "count", "stay")}


def place(pairs: int = 7, groups: int = 2, n: int = 9, slots: int = 11, rows: int = 16, dim: int = 32) -> Case:
    new, held = new_and_held(groups, n, slots, rows, dim)
    slot, newcomer = permutations(groups, slots, pairs), permutations(groups, n, pairs)
    inputs = {"slot": slot, "newcomer": newcomer, "replace": whole(0, 2, groups, pairs), **new}
    return inputs | {"new_stay": normal(n), **held}, {}


def merge(n: int = 19, groups: int = 2, slots: int = 6, rows: int = 10, dim: int = 32, renew: bool = True) -> Case:
    new, held = new_and_held(groups, n, slots, rows, dim)
    target, order = whole(0, slots + 1, groups, n).sort(dim=-1, stable=True)
    inputs = {"target": target, "order": order.int(), **new, "new_count": whole(1, 5, groups, n).double()}
    return inputs | {"new_stay": normal(n), **held}, {"renew": renew}


def arrange(n: int = 70, groups: int = 2) -> Case:
    return {"key": whole(-4, 9, groups, n)}, {}


def block_means(n: int = 70, groups: int = 2, dim: int = 16) -> Case:
    return {"query": normal(n, groups, dim), "order": permutations(groups, n)}, {}


def near_blocks(lines: int = 19, groups: int = 2, rows: int = 384, dim: int = 16) -> Case:
    held = cache(groups, rows, dim)
    held["count"][0, 128:256] = 0
    return {"mean": normal(groups, lines, dim), "key": held["key"], "count": held["count"]}, {}


def choose_blocks(lines: int = 2, groups: int = 2, blocks: int = 70, streams: int = 2, density: float = 0.3) -> Case:
    near = whole(-20, 20, groups, lines, blocks).double() / 4  # full of ties
    near[:, :, torch.rand(blocks) < 0.2] = -torch.inf  # holds no key
    own = 300
    return {"near": near, "row": whole(0, blocks * 128 - own + 1, streams)}, {"own": own, "density": density}


def signatures(n: int = 35, groups: int = 2, dim: int = 16, bits: int = 5) -> Case:
    return {"x": normal(n, groups, dim), "planes": normal(dim, bits)}, {}


def keep_text(n: int = 70, groups: int = 2, tokens: int = 67, dim: int = 16, tables: int = 2, bits: int = 4) -> Case:
    count = whole(0, 5, groups, tokens).double()
    inputs = {"query": normal(n, groups, dim), "key": normal(groups, tokens, dim), "count": count}
    inputs |= {"planes": normal(dim, tables * bits), "always": (torch.rand(groups, tokens) < 0.1).double()}
    return inputs, {"bits": bits}


def text_mass(n: int = 150, groups: int = 2, tokens: int = 67, dim: int = 16, quantised: bool = False) -> Case:
    key, query = (rounds_clearly(*shape, dim) if quantised else normal(*shape, dim) for shape in
                  ((groups, tokens), (n, groups)))  # fmt: skip
    return {"query": query, "key": key, "count": cache(groups, tokens, dim)["count"]}, {"quantised": quantised}


def rounds_clearly(*shape: int) -> Tensor:
    """Rows that 255 levels change, and in every type to the same levels."""
    level = whole(-126, 127, *shape) + 0.6 * torch.rand(shape, dtype=torch.float64) - 0.3
    level[..., 0] = 127
    return level * normal(*shape[:-1], 1) / 64


def condense_text(groups: int = 2, tokens: int = 67, dim: int = 16, share: float = 0.8) -> Case:
    held = cache(groups, tokens, dim)
    mass = whole(1, 5, groups, tokens) * (held["count"] > 0) / 64  # full of ties, and sums are exact
    return {"mass": mass, **held}, {"share": share}


CASES: dict[str, Callable[..., Case]] = {name: globals()[name] for name in OPERATORS}


def cast(operator: Operator, inputs: dict[str, Tensor], half: torch.dtype) -> dict[str, Tensor]:
    """In the operator's order and types."""
    wide = torch.float64 if half == torch.float64 else torch.float32
    types = {"half": half, "f32": wide, "i32": torch.int32}
    return {argument.name: inputs[argument.name].to(types[argument.kind]) for argument in operator.inputs}
