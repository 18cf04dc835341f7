"""Laws of the table of operators: what everything else is generated from."""

from __future__ import annotations

import inspect

import plugins_cases
import pytest
import torch

from fastar_backend.attention.ann_ca import SAMPLES
from fastar_backend.kernels import ops as kernel_ops
from plugins.table import LAUNCH, OPERATORS, evaluate

ALL = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


@ALL
def test_signature_is_inputs_extras_outputs_constexprs(operator):
    names = operator.kernel.arg_names
    inputs = [argument.name for argument in operator.inputs]
    outputs = [argument.name for argument in operator.outputs]
    assert names[: len(inputs)] == inputs
    start = len(inputs) + len(operator.extras)
    assert names[start : start + len(outputs)] == outputs
    values = dict.fromkeys("DCW", 32) | dict(operator.attributes)
    constants = [
        name for name, p in inspect.signature(operator.kernel.fn).parameters.items() if p.annotation != p.empty
    ]
    assert names[start + len(outputs) :] == constants
    for wide in (False, True):
        assert set(operator.constexprs(values, wide)) == set(constants)
        assert set(operator.launch_options(wide)) <= set(LAUNCH)


@ALL
def test_all_expressions_follow_from_inputs_attributes_and_tiles(operator):
    inputs, attributes = plugins_cases.CASES[operator.name]()
    shapes = [inputs[argument.name].shape for argument in operator.inputs]
    for wide in (False, True):
        values = operator.values(shapes, attributes, wide)
        expressions = [dim for argument in (*operator.inputs, *operator.outputs) for dim in argument.dims]
        expressions += [*operator.grid, *operator.constants.values(), *operator.extras]
        expressions += [*operator.divides, *operator.divides.values(), *operator.at_most, *operator.at_most.values()]
        for expression in expressions:
            assert evaluate(expression, values) >= 0
    assert set(attributes) <= set(operator.attributes)
    used = " ".join([*operator.extras, *map(str, operator.constants.values()), *operator.divides.values()])
    assert all(name in used.split() for name in operator.attributes), "an attribute changes something"


@ALL
def test_an_output_in_place_is_like_its_input(operator):
    inputs = {argument.name: argument for argument in operator.inputs}
    aliases = [argument.alias for argument in operator.outputs if argument.alias]
    assert len(aliases) == len(set(aliases))
    for argument in operator.outputs:
        if argument.alias:
            assert (argument.kind, argument.dims) == (inputs[argument.alias].kind, inputs[argument.alias].dims)
            assert argument.name == f"{argument.alias}_after"


@ALL
def test_precision_follows_from_the_type(operator):
    for wide, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        found = operator.constexprs(dict.fromkeys("DCW", 32) | dict(operator.attributes), wide)
        assert found.get("PRECISION", kernel_ops.precision(dtype)) == kernel_ops.precision(dtype)


def test_numbers_are_those_of_the_pytorch_path():
    for wide, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        for name, tiles in (("attend", kernel_ops.tiles(dtype)), ("attend_sparse", kernel_ops.sparse_tiles(dtype))):
            expected = {"BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys, "num_warps": tiles.warps}
            assert OPERATORS[name].tiled[wide] == expected | {"num_stages": tiles.stages}
        blocks = [OPERATORS[name].tiles(wide)["BLOCK_M"] for name in ("attend_sparse", "block_means")]
        assert blocks[0] == blocks[1], "means are of the blocks that are attended from"
    assert OPERATORS["near_blocks"].constants["BLOCK_N"] == kernel_ops.KEY_BLOCK
    assert OPERATORS["choose_blocks"].constants["KEYS"] == kernel_ops.KEY_BLOCK
    assert {OPERATORS["text_mass"].tiles(wide)["BLOCK_M"] for wide in (False, True)} == {SAMPLES}


@pytest.mark.parametrize(
    ("expression", "result"),
    [("N", 7), ("cdiv(N, 4) * 2 + 1", 5), ("N // 4", 1), ("N - 2 * K", 1), (128, 128), ("cdiv(N, K)", 3)],
)
def test_expressions(expression, result):
    assert evaluate(expression, {"N": 7, "K": 3}) == result


@pytest.mark.parametrize("expression", ["N / 2", "f(N)", "N.real", "__import__('os')", "N if K else 0", "cdiv(N)"])
def test_other_expressions_are_refused(expression):
    with pytest.raises(ValueError, match="only"):
        evaluate(expression, {"N": 7, "K": 3})
