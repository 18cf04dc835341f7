"""The operators as TensorRT's quick deployable plugins: `register` hands TensorRT, for each one, its outputs' shapes,
the types it takes and, at build time, a compiled kernel, which becomes part of the engine. Such an engine needs no file
of ours where it runs.

Everything is made from plugins/table.py; kernels are compiled by plugins/aot.py for the GPU that the engine is for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy.typing  # noqa: F401 (TensorRT 11.4 uses it without importing it, for plugins with attributes)

from fastar_backend.errors import InvalidInput
from plugins.table import OPERATORS, Argument, Operator, evaluate

NAMESPACE = "fastar"


class Compiled(Protocol):
    """A kernel as plugins/aot.py has it."""

    name: str
    ptx: str
    warps: int
    shared: int  # bytes of dynamic shared memory
    tiles: Mapping[str, int]  # that it was compiled with: the grid depends on them


Compile = Callable[[Operator, str, Mapping[str, Any]], Compiled]  # operator, type, values of the constants' names


def register(trt: Any, compile: Compile, operators: Mapping[str, Operator] = OPERATORS) -> None:
    """Makes the operators known to TensorRT's plugin registry, in this process. trt: the module `tensorrt`, with its
    `plugin`; compile: e.g. `for_arch(90)`. Raises InvalidInput where this TensorRT has no such plugins."""
    plugin = getattr(trt, "plugin", None)
    if not hasattr(plugin, "aot_impl"):
        raise InvalidInput("plugins", "qdp, which this TensorRT does not have", "library (plugins/csrc)")
    for operator in operators.values():
        _Quick(trt, operator, compile).register()


def for_arch(arch: int) -> Compile:
    """Kernels for GPUs of that compute capability, e.g. 90."""
    from plugins.aot import compile_kernel  # not where kernels are interpreted

    return lambda operator, type, values: compile_kernel(operator, type, arch, values)


class _Quick:
    """One operator's three functions."""

    def __init__(self, trt: Any, operator: Operator, compile: Compile) -> None:
        self.trt, self.plugin, self.operator, self.compile = trt, trt.plugin, operator, compile
        self.id = f"{NAMESPACE}::{operator.name}"
        kinds = trt.DataType
        self.types = {kinds.HALF: "fp16", kinds.BF16: "bf16", kinds.FLOAT: "fp32"}
        self.fixed = {"f32": kinds.FLOAT, "i32": kinds.INT32}

    def register(self) -> None:
        plugin, desc = self.plugin, self.plugin.TensorDesc
        tensors = {argument.name: desc for argument in self.operator.inputs}
        attributes = {name: type(value) for name, value in self.operator.attributes.items()}
        outputs = {"outputs": tuple[(desc,) * len(self.operator.outputs)]}
        given, returned = tensors | attributes, (desc,) * len(self.operator.outputs)
        result = tuple[str, str, plugin.KernelLaunchParams, plugin.SymExprs]
        described = tuple[returned] if len(returned) > 1 else desc
        plugin.register(self.id)(_signed(self.describe, given, described))
        plugin.autotune(self.id)(_signed(self.autotune, given | outputs, list[plugin.AutoTuneCombination]))
        plugin.aot_impl(self.id)(_signed(self.kernel, given | outputs | {"tactic": int}, result))

    def describe(self, *descs: Any, **attributes: Any) -> Any:
        """The outputs' shapes and types from the inputs'."""
        operator, inputs = self.operator, descs[: len(self.operator.inputs)]
        half = self.half(inputs)
        values = operator.values([desc.shape_expr for desc in inputs], attributes, half == self.trt.DataType.FLOAT)
        names = [argument.name for argument in operator.inputs]
        made = []
        for output in operator.outputs:
            if output.alias:
                made.append(inputs[names.index(output.alias)].aliased())
            else:
                shape = tuple(evaluate(dim, values, self.plugin.cdiv) for dim in output.dims)
                made.append(self.plugin.from_shape_expr(shape, self.dtype(output, half)))
        return tuple(made) if len(made) > 1 else made[0]

    def autotune(self, *arguments: Any) -> list[Any]:
        """The one combination of types that the network has (it is strongly typed), all tensors contiguous."""
        half = self.half(arguments[: len(self.operator.inputs)])
        names = {"FLOAT": "FP32", "HALF": "FP16"}
        every = [self.dtype(argument, half).name for argument in (*self.operator.inputs, *self.operator.outputs)]
        return [self.plugin.AutoTuneCombination(", ".join(names.get(name, name) for name in every), "LINEAR")]

    def kernel(self, *arguments: Any) -> tuple[Any, ...]:
        """Entry, PTX, launch and int32 arguments for the inputs' types and constant dimensions."""
        operator, plugin = self.operator, self.plugin
        inputs = arguments[: len(operator.inputs)]
        attributes = dict(zip(operator.attributes, arguments[len(operator.inputs) : -2], strict=True))
        half = self.half(inputs)
        values = operator.values([desc.shape_expr for desc in inputs], attributes, half == self.trt.DataType.FLOAT)
        numbers = {name: self.number(name, values[name]) for name in self.constants()}
        made = self.compile(operator, self.types[half], numbers)
        values |= made.tiles
        # Symbolic integers know no `4 * x` with the number first: evaluate gives them symbols only.
        grid = [evaluate(size, values, plugin.cdiv) for size in operator.grid]
        launch = plugin.KernelLaunchParams(*grid, block_x=made.warps * 32, shared_mem=made.shared)
        extras = plugin.SymExprs(len(operator.extras))
        for at, extra in enumerate(operator.extras):
            extras[at] = plugin.SymInt32(evaluate(extra, values, plugin.cdiv))
        return made.name, made.ptx, launch, extras

    def constants(self) -> list[str]:
        """Names in the operator's constexprs: what a kernel is compiled for."""
        words = (word for text in self.operator.constants.values() for word in str(text).replace("*", " ").split())
        return [word for word in dict.fromkeys(words) if word.isidentifier()]

    def number(self, name: str, value: Any) -> Any:
        """Of a dimension that must be known at build time, or of an attribute."""
        if isinstance(value, self.plugin.ShapeExpr):
            if not value.is_constant:
                raise InvalidInput(f"{self.operator.name}.{name}", "is dynamic", "a dimension that is constant")
            return value.constant_value()
        return value

    def half(self, descs: Sequence[Any]) -> Any:
        """The network's type; float32 where no input has it. Raises InvalidInput for other types, naming the input."""
        half = None
        for argument, desc in zip(self.operator.inputs, descs, strict=True):
            if argument.kind == "half" and half is None and desc.dtype in self.types:
                half = desc.dtype
            wanted = self.fixed.get(argument.kind, half)
            if desc.dtype != wanted:
                kinds = "HALF, BF16, FLOAT" if wanted is None else wanted.name
                raise InvalidInput(f"{self.operator.name}.{argument.name}", f"is {desc.dtype.name}", kinds)
        return half or self.trt.DataType.FLOAT

    def dtype(self, argument: Argument, half: Any) -> Any:
        return self.fixed.get(argument.kind, half)


def _signed(function: Callable[..., Any], arguments: Mapping[str, Any], returned: Any) -> Callable[..., Any]:
    """With the signature that TensorRT reads."""

    @functools.wraps(function)
    def signed(*given: Any, **named: Any) -> Any:
        return function(*given, **named)

    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, either, annotation=of) for name, of in arguments.items()]
    signed.__signature__ = inspect.Signature(parameters, return_annotation=returned)
    return signed
