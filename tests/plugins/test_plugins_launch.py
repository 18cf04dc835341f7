"""What a plugin's enqueue gives to CUDA's driver, by the record of a fake one: the kernel for type and GPU, the grid,
shared memory, and the parameters in their order."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from plugins_sizes import attributes, shapes, types

from plugins import aot
from plugins.table import OPERATORS, evaluate

HALVES = {"float16": "fp16", "bfloat16": "bf16"}


def case(name: str, half: str) -> dict:
    """Random sizes and addresses; outputs in place have their inputs' addresses."""
    operator, rng = OPERATORS[name], random.Random()
    chosen = attributes(operator, rng)
    addresses = [16 * rng.randint(1, 1 << 40) for _ in (*operator.inputs, *operator.outputs)]
    names, count = [argument.name for argument in operator.inputs], len(operator.inputs)
    for at, argument in enumerate(operator.outputs, start=count):
        addresses[at] = addresses[names.index(argument.alias)] if argument.alias else addresses[at]
    kinds = "P" * count + "I" * len(operator.extras) + "P" * len(operator.outputs)
    return {"operator": name, "attributes": {key: value if type(value) is float else int(value)
                                             for key, value in chosen.items()},
            "types": types(operator, half), "shapes": shapes(operator, chosen, rng), "addresses": addresses,
            "parameters": kinds}  # fmt: skip


def wanted(given: dict, half: str, kernels: list[aot.Kernel]) -> str:
    """By the table."""
    operator, count = OPERATORS[given["operator"]], len(OPERATORS[given["operator"]].inputs)
    values = operator.values(given["shapes"][:count], given["attributes"], wide=False)
    constants = {name: evaluate(text, values) for name, text in operator.constants.items()}
    kind = aot.own_type(operator, HALVES[half])
    (kernel,) = [kernel for kernel in kernels
                 if (kernel.operator, kernel.type, kernel.constants) == (operator.name, kind, constants)]  # fmt: skip
    x, y = (evaluate(text, values | kernel.tiles) for text in operator.grid)
    extras = [evaluate(text, values) for text in operator.extras]
    parameters = [*given["addresses"][:count], *extras, *given["addresses"][count:]]
    line = [kernel.name, x, y, 1, 32 * kernel.warps, 1, 1, kernel.shared, 1, 1, "0x77", *parameters]
    return " ".join(map(str, line))


@pytest.fixture(scope="session")
def launch(plugin_library, tmp_path_factory):
    """Launches cases on a made-up GPU: their records."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler built the library"
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True, timeout=60)

    def launch(cases: list[dict], arch: int = 90, **environment: str) -> list[str]:
        environment |= {"LD_LIBRARY_PATH": str(folder), "FAKE_ARCH": str(arch), "PYTHONPATH": os.getcwd()}
        script = Path(__file__).with_name("plugins_launches.py")
        done = subprocess.run([sys.executable, str(script), str(plugin_library)], input=json.dumps(cases), text=True,
                              capture_output=True, timeout=120, env=os.environ | environment, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return launch


def test_every_launch_is_the_tables(launch, plugin_library):
    kernels = aot.read(plugin_library.parents[1] / "kernels")
    halves = [half for half in HALVES for _ in range(3) for _ in OPERATORS]
    cases = [case(name, half) for half in HALVES for _ in range(3) for name in OPERATORS]
    for given, half, line in zip(cases, halves, launch(cases), strict=True):
        assert line == wanted(given, half, kernels), given


def test_a_gpu_without_a_kernel_is_named(launch):
    for arch, name in ((80, "8.0"), (103, "10.3"), (120, "12.0")):
        (line,) = launch([case("quantise", "float16")], arch)
        assert line == (f"quantise: no kernel for a GPU of compute capability {name}; "
                        "allowed: 9.0, as compiled into this library")  # fmt: skip


def test_what_the_driver_says_is_said(launch):
    (line,) = launch([case("quantise", "float16")], FAKE_FAILURE="1")
    assert line.startswith("quantise: cuLaunchKernel: made up")
