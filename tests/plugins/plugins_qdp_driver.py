"""Calls the plugins of plugins/qdp.py as TensorRT's builder does, through the Python code of TensorRT 11.4's bindings,
and prints what it was told, as JSON. For a process of its own:

    plugins_qdp_driver.py FOLDER < [{operator, type, attributes, shapes, compile}, ...]

The bindings want libnvinfer, which has no wheel; FOLDER gets libraries of that name whose functions are those of
libnvinfer_lean, and for the builder and the parser, which are not called here, functions that give nothing. What only
the builder can make, expressions of dimensions and launch parameters, are objects of this file."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MISSING = """
void* createInferBuilder_INTERNAL(void* log, int version) { return 0; }
void* createNvOnnxParser_INTERNAL(void* network, void* log, int version) { return 0; }
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* log, int version) { return 0; }
void* getBuilderPluginRegistry(int capability) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void* log, char const* name) { return 1; }
"""


def bindings(folder: Path) -> Any:
    """The module of TensorRT's bindings."""
    lean = Path(importlib.util.find_spec("tensorrt_lean_libs").origin).parent
    (folder / "missing.c").write_text(MISSING)
    for name in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        source = folder / "missing.c" if name == "libnvinfer" else "/dev/null"
        command = ["cc", "-shared", "-fPIC", "-o", f"{folder}/{name}.so.11", f"-Wl,-soname,{name}.so.11", "-x", "c"]
        command += [source, "-x", "none", "-Wl,--no-as-needed", f"-L{lean}", "-l:libnvinfer_lean.so.11"]
        subprocess.run([*command, f"-Wl,-rpath,{lean}"], check=True)
        ctypes.CDLL(f"{folder}/{name}.so.11")
    import tensorrt_bindings

    from plugins import engines

    return engines.with_plugin(tensorrt_bindings)


class Number:
    """An IDimensionExpr of a known value; `constant`: known at build time."""

    def __init__(self, value: int, constant: bool = True) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def is_size_tensor(self) -> bool:
        return False

    def get_constant_value(self) -> int:
        assert self.constant, "a dynamic dimension's value was asked for at build time"
        return self.value


class Builder:
    """An IExprBuilder."""

    def __init__(self, trt: Any) -> None:
        kinds = trt.DimensionOperation
        self.operations = {
            kinds.SUM: lambda a, b: a + b, kinds.SUB: lambda a, b: a - b, kinds.PROD: lambda a, b: a * b,
            kinds.FLOOR_DIV: lambda a, b: a // b, kinds.CEIL_DIV: lambda a, b: -(-a // b),
        }  # fmt: skip

    def constant(self, value: int) -> Number:
        return Number(value)

    def operation(self, kind: Any, a: Number, b: Number) -> Number:
        return Number(self.operations[kind](a.value, b.value), a.constant and b.constant)


def stand_in(trt: Any) -> None:
    """Replaces the bindings' classes whose objects only the builder makes or reads."""
    trt.IDimensionExpr = Number
    trt.DimsExprs = lambda length: [None] * length
    trt.plugin._tensor.SymExprImpl = lambda symbol: SimpleNamespace(expr=symbol._expr)


class Extras(list):
    @property
    def nbSymExprs(self) -> int:  # noqa: N802
        return len(self)

    @nbSymExprs.setter
    def nbSymExprs(self, length: int) -> None:  # noqa: N802
        self[:] = [None] * length


def described(trt: Any, dtype: Any, dims: list[int]) -> Any:
    desc = trt.DynamicPluginTensorDesc()
    desc.desc = trt.PluginTensorDesc()
    desc.desc.type, desc.desc.format, desc.desc.dims = dtype, trt.TensorFormat.LINEAR, trt.Dims(dims)
    desc.min = desc.max = desc.opt = trt.Dims(dims)
    return desc


def drive(trt: Any, case: dict[str, Any]) -> dict[str, Any]:
    """One plugin from creation to launch."""
    from plugins.table import OPERATORS

    name, build = case["operator"], trt.TensorRTPhase.BUILD
    operator = OPERATORS[name]
    half = {"fp16": trt.DataType.HALF, "bf16": trt.DataType.BF16, "fp32": trt.DataType.FLOAT}[case["type"]]
    kinds = {"half": half, "f32": trt.DataType.FLOAT, "i32": trt.DataType.INT32}
    types = [kinds[argument.kind] for argument in operator.inputs]
    for at, kind in case.get("wrong", {}).items():
        types[int(at)] = getattr(trt.DataType, kind)
    fields = []
    for key, value in case["attributes"].items():
        import numpy as np

        from_onnx = {bool: (np.int8, "INT8"), int: (np.int64, "INT64"), float: (np.float64, "FLOAT64")}[type(value)]
        fields.append(trt.PluginField(key, np.array([value], from_onnx[0]), getattr(trt.PluginFieldType, from_onnx[1])))
    creator = trt.get_plugin_registry().get_creator(name, "1", "fastar")
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(name, "fastar", trt.PluginFieldCollection(fields), build, request)

    made = list(plugin.get_output_data_types(types, [len(shape) for shape in case["shapes"]]))
    builder, dynamic = Builder(trt), set(case["dynamic"])
    dims = [
        [Number(size, dim not in dynamic) for size, dim in zip(shape, argument.dims, strict=True)]
        for shape, argument in zip(case["shapes"], operator.inputs, strict=True)
    ]
    shapes = [[dim.value for dim in shape] for shape in plugin.get_output_shapes(dims, [], builder)]
    both = [described(trt, *pair) for pair in zip([*types, *made], [*case["shapes"], *shapes], strict=True)]
    combinations = plugin.get_supported_format_combinations(both, len(types))
    plugin.configure_plugin(both[: len(types)], both[len(types) :])
    plugin.set_tactic(0)
    launch, extras = SimpleNamespace(), Extras()
    plugin.get_launch_params(dims, both, len(types), launch, extras, builder)
    entry, code = plugin.get_kernel([d.desc for d in both[: len(types)]], [d.desc for d in both[len(types) :]])
    return {
        "types": [kind.name for kind in made], "shapes": shapes,
        "aliases": [plugin.get_aliased_input(at) for at in range(len(made))],
        "combinations": [[desc.type.name, desc.format.name] for desc in combinations],
        "tactics": plugin.get_valid_tactics(), "extras": [extra.expr.value for extra in extras],
        "launch": {key: value.expr.value for key, value in vars(launch).items()},
        "entry": entry, "code": code.decode(),
    }  # fmt: skip


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from plugins import aot, qdp

    trt = bindings(Path(sys.argv[1]))
    stand_in(trt)
    asked: list[Any] = []

    @dataclasses.dataclass
    class Fake:
        name: str
        ptx: str = "// none"
        warps: int = 4
        shared: int = 12345
        tiles: Any = dataclasses.field(default_factory=dict)

    def compile(operator: Any, type: str, values: dict[str, Any]) -> Any:
        asked.append([operator.name, type, values])
        if real:
            return aot.compile_kernel(operator, type, 90, values)
        return Fake(operator.name, tiles=operator.tiles(type == "fp32"))

    qdp.register(trt, compile)
    answers = []
    for case in json.load(sys.stdin):
        real = case.get("compile", False)
        asked.clear()
        try:
            answers.append(drive(trt, case) | {"asked": asked[:]})
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps({"version": trt.__version__, "answers": answers}))


if __name__ == "__main__":
    main()
