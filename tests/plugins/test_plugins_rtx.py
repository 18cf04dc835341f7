"""TensorRT-RTX builds engines of every plugin on a machine without a GPU, and refuses what a plugin refuses."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from plugins_sizes import attributes, shapes, types

from plugins.table import OPERATORS

HALVES = ("float16", "bfloat16")


def case(name: str, half: str = "float16", **changes) -> dict:
    """A graph of one operator with random sizes. changes: of the case, or types and shapes by an input's name."""
    operator, rng = OPERATORS[name], random.Random()
    chosen = attributes(operator, rng)
    inputs = [argument.name for argument in operator.inputs]
    every = shapes(operator, chosen, rng)
    made = {"operator": name, "attributes": {key: value if type(value) is float else int(value)
                                             for key, value in chosen.items()},
            "types": types(operator, half), "shapes": [list(shape) for shape in every[: len(inputs)]],
            "in_place": True, "outputs": [list(shape) for shape in every[len(inputs) :]]}  # fmt: skip
    for kind in ("types", "shapes"):
        for argument, value in changes.pop(kind, {}).items():
            made[kind][inputs.index(argument)] = value
    return made | changes


QUANTISE = {"shapes": {"x": [3, "n", 64]}, "range": [1, 100, 300]}
RIGHT = {f"{name}-{half}": case(name, half) for name in OPERATORS for half in HALVES}
RIGHT["unknown"] = case("quantise", **QUANTISE) | {"outputs": [[3, -1, 16]]}
RIGHT["default"] = case("turn_into") | {"attributes": {}}  # then row is 0
WRONG = {
    "type": (case("attend", types={"count": "int32"}), "fastar: attend: count: type int32; allowed: float32"),
    "half": (case("attend", types={"value": "bfloat16"}), "fastar: attend: value: type bfloat16; allowed: float16, "),
    "float32": (case("quantise", "float32"), "fastar: quantise: x: type float32; allowed: bfloat16, float16, as "),
    "rank": (case("attend", shapes={"first": [1, 1]}), "fastar: attend: first: rank 2; allowed: 1 [G]"),
    "size": (case("attend", shapes={"value": [3, 7, 96]}), "fastar: attend: value: dimension "),
    "head": (case("quantise", shapes={"x": [3, 7, 32]}), "fastar: quantise: no kernel with D=32; allowed: D=64, "),
    "bound": (case("near_blocks", shapes={"mean": [2, 5, 64], "key": [2, 100, 64], "count": [2, 100]}),
              "fastar: near_blocks: R is 100; allowed: a multiple of 128"),
    "in place": (case("append", in_place=False), "kALIASED_PLUGIN_IO_10_03 not enabled"),
    "renew": (case("merge", attributes={"renew": 2}), "fastar: merge: renew: 2.000000; allowed: 0 or 1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def built(plugin_library, tmp_path_factory) -> dict[str, dict]:
    """Results of all cases, from one process."""
    rtx = pytest.importorskip("tensorrt_rtx_libs", reason="extra trt-test")
    pytest.importorskip("onnx", reason="extra trt-test")
    links = tmp_path_factory.mktemp("libraries")
    for path in Path(rtx.__file__).parent.glob("lib*.so.1"):  # the parser opens it by the name without a version
        (links / path.name.removesuffix(".1")).symlink_to(path)
    given = {**RIGHT, **{name: wrong for name, (wrong, _) in WRONG.items()}}
    searched = os.pathsep.join(filter(None, [str(links), os.environ.get("LD_LIBRARY_PATH")]))
    script = Path(__file__).with_name("plugins_rtx.py")
    done = subprocess.run([sys.executable, str(script), str(plugin_library)], input=json.dumps(list(given.values())),
                          capture_output=True, text=True, timeout=300, check=False,
                          env=os.environ | {"LD_LIBRARY_PATH": searched, "PYTHONPATH": os.getcwd()})  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(given, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", RIGHT)
def test_an_engine_is_built(built, name):
    assert built[name].get("errors") is None
    assert built[name]["shapes"] == RIGHT[name]["outputs"]
    assert built[name]["bytes"] > 1000


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_with_the_plugins_words(built, name):
    assert any(WRONG[name][1] in error for error in built[name].get("errors", [])), built[name]
