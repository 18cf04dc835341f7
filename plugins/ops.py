"""The operators of plugins/table.py in PyTorch: `torch.ops.fastar.NAME(*inputs, **attributes)`, pure functions. On the
CPU they are the plain reference, also in float64 throughout; on CUDA the kernels. `launch` runs a kernel in place.
Importing this registers them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastar_backend.errors import InvalidInput
from plugins import reference
from plugins.table import OPERATORS, Argument, Operator, evaluate

HALF = (torch.float16, torch.bfloat16, torch.float32)


def _type(operator: Operator, tensors: Sequence[Tensor]) -> torch.dtype:
    """What `half` is in this call; for an operator that has none, what its other floats are."""
    kinds = dict(zip((argument.kind for argument in reversed(operator.inputs)), reversed(tensors), strict=False))
    found = kinds.get("half", kinds.get("f32"))
    return torch.float32 if found is None else found.dtype


def _dtype(argument: Argument, half: torch.dtype) -> torch.dtype:
    if argument.kind == "i32":
        return torch.int32
    return half if argument.kind == "half" or half == torch.float64 else torch.float32


def _values(operator: Operator, tensors: Sequence[Tensor], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the inputs: types, and the dimensions that are known (a symbolic one adds no guard).

    Raises InvalidInput. Returns what the table's expressions may name."""
    half = _type(operator, tensors)
    for argument, tensor in zip(operator.inputs, tensors, strict=True):
        field = f"{operator.name}.{argument.name}"
        if argument.kind == "half" and half not in (*HALF, torch.float64):
            raise InvalidInput(field, f"is {half}", "float16, bfloat16, float32")
        if tensor.dtype != (wanted := _dtype(argument, half)):
            raise InvalidInput(field, f"is {tensor.dtype}", f"{wanted}, beside {half}")
        if tensor.dim() != len(argument.dims):
            raise InvalidInput(field, f"has shape {list(tensor.shape)}", f"[{', '.join(argument.dims)}]")
    values = operator.values([tensor.shape for tensor in tensors], attributes, half.itemsize > 2)
    for argument, tensor in zip(operator.inputs, tensors, strict=True):
        for dim, size in zip(argument.dims, tensor.shape, strict=True):
            _check(f"{operator.name}.{argument.name}", dim, size, "==", evaluate(dim, values))
    for value, divisor in operator.divides.items():
        _check(operator.name, value, evaluate(value, values), "a multiple of", evaluate(divisor, values))
    for value, bound in operator.at_most.items():
        _check(operator.name, value, evaluate(value, values), "at most", evaluate(bound, values))
    return values


def _check(field: str, name: str, value: Any, relation: str, other: Any) -> None:
    if type(value) is not int or type(other) is not int:
        return
    if not {"==": value == other, "at most": value <= other}.get(relation, other > 0 and value % max(other, 1) == 0):
        raise InvalidInput(field, f"{name} is {value}", f"{relation} {other}")


def _outputs(operator: Operator, tensors: Sequence[Tensor], values: Mapping[str, Any]) -> list[Tensor]:
    """Not filled in."""
    half = _type(operator, tensors)
    return [
        tensors[0].new_empty([evaluate(dim, values) for dim in argument.dims], dtype=_dtype(argument, half))
        for argument in operator.outputs
    ]


def _result(outputs: Sequence[Tensor]) -> Any:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def launch(name: str, tensors: Sequence[Tensor], attributes: Mapping[str, Any], outputs: Sequence[Tensor]) -> None:
    """Runs an operator's kernel on CUDA tensors (or, in Triton's interpreter, on the CPU's). All are contiguous; an
    output in place is the input itself. Raises InvalidInput."""
    operator = OPERATORS[name]
    values = _values(operator, tensors, attributes)
    wide = _type(operator, tensors).itemsize > 2
    inputs = {argument.name: tensor for argument, tensor in zip(operator.inputs, tensors, strict=True)}
    if torch.float64 in {tensor.dtype for tensor in tensors}:
        raise InvalidInput(name, "float64", "float16, bfloat16, float32: the kernels know no other")
    for argument, tensor in zip(operator.outputs, outputs, strict=True):
        field, shape = f"{name}.{argument.name}", [evaluate(dim, values) for dim in argument.dims]
        if list(tensor.shape) != shape or tensor.dtype != _dtype(argument, _type(operator, tensors)):
            raise InvalidInput(field, f"is {tensor.dtype} {list(tensor.shape)}", f"{argument.kind} {shape}")
        if argument.alias and tensor.data_ptr() != inputs[argument.alias].data_ptr():
            raise InvalidInput(field, "is not in place", f"the tensor of {argument.alias}")
    for argument, tensor in zip((*operator.inputs, *operator.outputs), (*tensors, *outputs), strict=True):
        if not tensor.is_contiguous():
            raise InvalidInput(f"{name}.{argument.name}", f"has strides {tensor.stride()}", "contiguous tensors")
    grid = tuple(evaluate(size, values) for size in operator.grid)
    operator.kernel[grid](
        *tensors, *(values[extra] for extra in operator.extras), *outputs,
        **operator.constexprs(values, wide), **operator.launch_options(wide),
    )  # fmt: skip


def _by_kernel(operator: Operator, tensors: Sequence[Tensor], attributes: Mapping[str, Any]) -> Any:
    given = {argument.name: tensor.contiguous() for argument, tensor in zip(operator.inputs, tensors, strict=True)}
    outputs = _outputs(operator, tensors, _values(operator, tensors, attributes))
    for at, argument in enumerate(operator.outputs):
        if argument.alias:
            outputs[at] = given[argument.alias] = given[argument.alias].clone()
    launch(operator.name, list(given.values()), attributes, outputs)
    return _result(outputs)


def _by_reference(operator: Operator, tensors: Sequence[Tensor], attributes: Mapping[str, Any]) -> Any:
    values = _values(operator, tensors, attributes)
    function = getattr(reference, operator.name)
    sizes = {name: values[name] for name in ("BLOCK_M",) if name in inspect.signature(function).parameters}
    return function(*tensors, **attributes, **sizes)


def _fake(operator: Operator, tensors: Sequence[Tensor], attributes: Mapping[str, Any]) -> Any:
    return _result(_outputs(operator, tensors, _values(operator, tensors, attributes)))


def schema(operator: Operator) -> str:
    """Attributes may be given by name or after the inputs."""
    parameters = [f"Tensor {argument.name}" for argument in operator.inputs]
    parameters += [f"{type(default).__name__} {name}={default}" for name, default in operator.attributes.items()]
    returns = ", ".join("Tensor" for _ in operator.outputs)
    return f"{operator.name}({', '.join(parameters)}) -> {f'({returns})' if len(operator.outputs) > 1 else returns}"


def _implementation(operator: Operator, run: Any) -> Any:
    count = len(operator.inputs)

    def call(*args: Any, **named: Any) -> Any:
        args += tuple(named.pop(argument.name) for argument in operator.inputs[len(args) :])
        attributes = dict(operator.attributes) | dict(zip(operator.attributes, args[count:], strict=False)) | named
        return run(operator, args[:count], attributes)

    return call


library = torch.library.Library("fastar", "DEF")
for _operator in OPERATORS.values():
    library.define(schema(_operator), tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_operator.name, _implementation(_operator, _by_reference), "CPU")
    library.impl(_operator.name, _implementation(_operator, _by_kernel), "CUDA")
    torch.library.register_fake(f"fastar::{_operator.name}", _implementation(_operator, _fake), lib=library)
