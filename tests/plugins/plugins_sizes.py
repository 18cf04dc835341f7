"""Random sizes that an operator of the table takes, and what the table then says of its tensors."""

from __future__ import annotations

import random
from typing import Any

from plugins.table import Operator, evaluate

HEAD_DIM, TURNED = 64, 12  # D and C, as the library of the tests was compiled
LIBRARY: dict[str, Any] = {  # what the tests compile; both of `renew`: what whole graphs have
    "archs": [90], "types": ["fp16", "bf16"], "head_dims": [HEAD_DIM],
    "values": {"renew": [True, False]},
}  # fmt: skip
FIXED = {"D": HEAD_DIM, "W": HEAD_DIM // 4, "C": TURNED}


def attributes(operator: Operator, rng: random.Random, most: int = 20) -> dict[str, Any]:
    """Random whole ones, up to `most`; those that are compiled in have their defaults."""
    compiled = set(operator.constants.values())
    return {name: default if name in compiled or type(default) is not int else rng.randint(1, most)
            for name, default in operator.attributes.items()}  # fmt: skip


def symbols(operator: Operator, chosen: dict[str, Any], rng: random.Random) -> dict[str, int]:
    """Random sizes by symbol, which fulfil `divides` and `at_most`."""
    for _ in range(10_000):
        values = {name: FIXED.get(name) or rng.randint(1, 300) for name in operator.bindings()}
        for value, divisor in operator.divides.items():
            values[value] = evaluate(divisor, values | chosen) * rng.randint(1, 4)
        known = values | chosen
        fits = all(evaluate(value, known) <= evaluate(bound, known) for value, bound in operator.at_most.items())
        if fits and all(evaluate(v, known) % evaluate(d, known) == 0 for v, d in operator.divides.items()):
            return values
    raise AssertionError(f"{operator.name}: no sizes found")


def shapes(operator: Operator, chosen: dict[str, Any], rng: random.Random) -> list[tuple[int, ...]]:
    """Of inputs, then outputs, of a half type."""
    values = symbols(operator, chosen, rng) | chosen | operator.tiles(False)
    inputs = [tuple(evaluate(dim, values) for dim in argument.dims) for argument in operator.inputs]
    return inputs + [tuple(evaluate(dim, values) for dim in argument.dims) for argument in operator.outputs]


def types(operator: Operator, half: str) -> list[str]:
    """Of inputs, then outputs."""
    kinds = {"half": half, "f32": "float32", "i32": "int32"}
    return [kinds[argument.kind] for argument in (*operator.inputs, *operator.outputs)]
