"""The quick deployable plugins, through the Python code of TensorRT 11.4 that its builder calls."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fastar_backend.errors import InvalidInput
from plugins import qdp
from plugins.table import OPERATORS, Operator, evaluate

DRIVER = Path(__file__).parent / "plugins_qdp_driver.py"
NAMES = {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}
TYPES = list(NAMES)
COMPILED = "append"  # the one whose kernel is compiled here; tests of the compiler have the others

needs_bindings = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("tensorrt_bindings", "tensorrt_lean_libs")),
    reason="needs tensorrt-cu13-bindings and tensorrt-lean-cu13-libs: the extra trt-test",
)


def changed(default: float) -> float:
    """Another value of an attribute."""
    if isinstance(default, bool):
        return not default
    return default + 4 if isinstance(default, int) else default * 0.75


def case_of(operator: Operator, type: str, seed: int) -> dict:
    """Random sizes; those that a kernel is compiled for are constant, and all others dynamic."""
    draw = random.Random(seed)
    sizes = {symbol: draw.randrange(2, 200) for symbol in operator.bindings()}
    sizes |= {"D": 64, "W": 16, "C": 11, "R": 128 * draw.randrange(1, 9)} | operator.tiles(type == "fp32")
    shapes = [[evaluate(dim, sizes) for dim in argument.dims] for argument in operator.inputs]
    attributes = {name: changed(value) for name, value in operator.attributes.items()}
    dynamic = [dim for argument in operator.inputs for dim in argument.dims if dim not in ("D", "W", "C", "D//4")]
    return {"operator": operator.name, "type": type, "shapes": shapes, "attributes": attributes, "dynamic": dynamic,
            "compile": operator.name == COMPILED and type == "fp16"}  # fmt: skip


CASES = [case_of(operator, type, seed) for seed, operator in enumerate(OPERATORS.values()) for type in TYPES]
WRONG = [
    case_of(OPERATORS["attend"], "fp16", 1) | {"wrong": {"1": "FLOAT"}},  # the key, beside a query in half
    case_of(OPERATORS["attend"], "fp16", 1) | {"wrong": {"0": "INT8"}},
    case_of(OPERATORS["attend"], "bf16", 1) | {"wrong": {"4": "INT64"}},
    case_of(OPERATORS["attend"], "fp16", 1) | {"dynamic": ["D"]},
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, DRIVER, tmp_path_factory.mktemp("stubs")], input=json.dumps([*CASES, *WRONG]), text=True,
        capture_output=True, env=environment, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_bindings
@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda at: f"{CASES[at]['operator']}-{CASES[at]['type']}")
def test_what_tensorrt_is_told_is_the_table(answers, at):
    case, answer = CASES[at], answers["answers"][at]
    assert "error" not in answer, answer["error"]
    operator, wide = OPERATORS[case["operator"]], case["type"] == "fp32"
    values = operator.values(case["shapes"], case["attributes"], wide)
    kinds = {"half": NAMES[case["type"]], "f32": "FLOAT", "i32": "INT32"}
    inputs = [argument.name for argument in operator.inputs]
    assert answer["types"] == [kinds[output.kind] for output in operator.outputs]
    assert answer["shapes"] == [[evaluate(dim, values) for dim in output.dims] for output in operator.outputs]
    aliases = [inputs.index(output.alias) if output.alias else -1 for output in operator.outputs]
    assert answer["aliases"] == aliases
    every = [*operator.inputs, *operator.outputs]
    assert answer["combinations"] == [[kinds[argument.kind], "LINEAR"] for argument in every]
    assert answer["extras"] == [evaluate(extra, values) for extra in operator.extras]
    grid = [evaluate(size, values) for size in operator.grid]
    launch = answer["launch"]
    assert [launch["grid_x"], launch["grid_y"], launch["grid_z"]] == [*grid, 1]
    assert launch["block_y"] == launch["block_z"] == 1
    (asked,) = answer["asked"]
    if any(argument.kind == "half" for argument in operator.inputs):
        assert asked[:2] == [operator.name, case["type"]]
    known = {name: value for name, value in (values | {"D": 64, "W": 16, "C": 11}).items() if name in asked[2]}
    assert asked[2] == known
    assert operator.constexprs(asked[2], wide), "all that the kernel is compiled for is known"
    if case["compile"]:
        assert f".entry {answer['entry']}" in answer["code"]
        assert launch["block_x"] == 32 * operator.launch_options(wide)["num_warps"]
    else:
        assert (launch["block_x"], launch["shared_mem"]) == (128, 12345)


@needs_bindings
def test_it_is_tensorrts_own_code(answers):
    assert answers["version"].startswith("11.4.")


@needs_bindings
@pytest.mark.parametrize(
    ("at", "message"),
    [
        (0, "attend.key: is FLOAT; allowed: HALF"),
        (1, "attend.query: is INT8; allowed: HALF, BF16, FLOAT"),
        (2, "attend.first: is INT64; allowed: INT32"),
        (3, "attend.D: is dynamic; allowed: a dimension that is constant"),
    ],
)
def test_what_does_not_fit_is_said_by_name(answers, at, message):
    assert answers["answers"][len(CASES) + at]["error"] == f"InvalidInput: {message}"


def test_a_tensorrt_without_such_plugins_is_told_apart():
    with pytest.raises(InvalidInput, match="qdp, which this TensorRT does not have; allowed: library"):
        qdp.register(object(), lambda *_: None)
