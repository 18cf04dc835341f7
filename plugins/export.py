"""Graphs (plugins/step.py) as ONNX files, their operators as nodes of domain `fastar`.

A file stands for itself: its metadata say of which world (name and fingerprint of the weights), attention, graph, type
and table of operators it is; inputs and outputs are named as `bindings` has them, an output in place `<input>.after`.
All graphs of a folder share one file of weights, which are as PyTorch has them. B (streams) and R (rows of the caches,
a multiple of 128) are dynamic; of `begin` and `update`, G (heads) is.

Parts that repeat (a pass's layers) are traced once, without weights, and written out with the weights of each."""

from __future__ import annotations

import hashlib
import inspect
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, defs, helper
from torch import Tensor
from torch.export import Dim

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.snapshot import fingerprint
from fastar_backend.errors import InvalidInput
from fastar_backend.model.world import World, load_world
from plugins import step
from plugins.bindings import Binding
from plugins.table import OPERATORS, Operator, evaluate, table_hash

DOMAIN, VERSION = "fastar", 1
OPSET, IR_VERSION = 20, 10  # the first opset with Gelu; both known to TensorRT 10
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ELEMENT = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
           torch.int32: TensorProto.INT32}  # fmt: skip
WEIGHTS = "weights.bin"
INLINE_BYTES = 1 << 10  # larger weights go into WEIGHTS,
ALIGNED = 1 << 12  # each at a multiple of
# Whatever else the exporter might come up with has to be looked at before it goes to TensorRT: it knows neither float64
# nor complex numbers, and nothing whose size depends on data may be in a graph.
STANDARD = {
    "Add", "And", "Cast", "Concat", "Cos", "Expand", "GatherElements", "Gelu", "Greater", "GreaterOrEqual",
    "LayerNormalization", "Less", "MatMul", "Mul", "Not", "Or", "Pow", "Reciprocal", "ReduceMean", "ReduceSum",
    "Reshape", "ScatterElements", "Shape", "Sigmoid", "Sin", "Slice", "Sqrt", "Squeeze", "Sub", "TopK", "Transpose",
    "Unsqueeze", "Where",
}  # fmt: skip
ELEMENTS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT32, TensorProto.INT64,
            TensorProto.BOOL}  # fmt: skip


def export(world: str | World, attention: AttentionConfig, out_dir: Path, graphs: Sequence[str] | None = None,
           dtype: str = "fp16", progress: Callable[[str], None] = lambda graph: None) -> dict[str, Path]:  # fmt: skip
    """Writes the graphs, by default all that a stream of this attention runs, as `<graph>.onnx`; those of an earlier
    export to the folder are gone. Returns the files.

    world: a name or folder (`load_world`), or a world loaded in `dtype` (fp16, bf16, fp32) on the CPU, its blocks
    unfused. progress: called with each graph's name before it is made. Raises InvalidInput, WeightsError."""
    if dtype not in TYPES:
        raise InvalidInput("dtype", f"got {dtype!r:.40}", ", ".join(TYPES))
    if isinstance(world, str):
        world = load_world(world, "cpu", TYPES[dtype])
    weight = world.dit.head.head.weight
    if weight.dtype != TYPES[dtype] or weight.device.type != "cpu":
        problem = f"got {dtype}, and the world is {weight.dtype} on {weight.device}"
        raise InvalidInput("dtype", problem, "the type of a world that is on the CPU")
    plan = step.plan(world.config, attention, TYPES[dtype])
    made = {graph: step.make(plan, world.dit, graph) for graph in graphs or plan.graphs}  # what is wrong is said first
    out_dir.mkdir(parents=True, exist_ok=True)
    stated, files, traced = metadata(world, attention, dtype), {}, {}
    for graph in step.GRAPHS:  # their weights are about to go
        (out_dir / f"{graph}.onnx").unlink(missing_ok=True)
    with (out_dir / WEIGHTS).open("wb") as file:
        weights = _Weights(file)
        for graph, module in made.items():
            progress(graph)
            model = to_onnx(module, weights, traced)
            helper.set_model_props(model, stated | {"fastar.graph": graph})
            file.flush()
            files[graph] = out_dir / f"{graph}.onnx"
            onnx.save(model, str(files[graph]))
            check(files[graph], step.bindings(plan, graph))
    return files


def metadata(world: World, attention: AttentionConfig, dtype: str) -> dict[str, str]:
    """What an engine must not be separated from; the graph's name is added to each file."""
    return {
        "fastar.world": world.config.name, "fastar.fingerprint": fingerprint(world), "fastar.dtype": dtype,
        "fastar.attention": attention.model_dump_json(), "fastar.operators": table_hash(),
        "fastar.operators_version": str(VERSION),
    }  # fmt: skip


class _Weights:
    """One file for the weights of all graphs of a folder; equal ones are there once."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.known: dict[str, tuple[int, int]] = {}

    def proto(self, name: str, tensor: Tensor) -> TensorProto:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        proto = TensorProto(name=name, dims=tensor.shape, data_type=ELEMENT[tensor.dtype])
        if data.nbytes < INLINE_BYTES:
            proto.raw_data = data.tobytes()
            return proto
        digest = hashlib.sha256(data.data).hexdigest()
        if digest not in self.known:
            self.file.write(bytes(-self.file.tell() % ALIGNED))
            self.known[digest] = self.file.tell(), self.file.write(data.data)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in zip(("location", "offset", "length"), (WEIGHTS, *self.known[digest]), strict=True):
            proto.external_data.add(key=key, value=str(value))
        return proto


def to_onnx(module: step.Graph, weights: _Weights, traced: dict[str, GraphProto]) -> ModelProto:
    """The whole graph; its weights go to `weights`, and what had to be traced to `traced`, by `Graph.kind`."""
    whole = GraphProto(name=module.kind)
    infos: dict[str, ValueInfoProto] = {}
    shared: dict[Any, str] = {}  # names of what several parts have
    for label, part, outside in module.parts():
        if part.kind not in traced:
            traced[part.kind] = trace(part)
        graph, names = traced[part.kind], dict(outside)
        label = f"{label}." if label else ""
        for binding in (*part.inputs, *part.outputs):
            names.setdefault(binding.name, binding.name)
        own = dict(part.named_parameters()) | dict(part.named_buffers())
        for value in graph.input[len(part.inputs) :]:
            tensor = own[value.name]
            key = tensor.data_ptr(), tensor.dtype, tensor.shape
            if key not in shared:
                shared[key] = f"{label}{value.name}"
                whole.initializer.append(weights.proto(shared[key], tensor))
            names[value.name] = shared[key]
        for constant in graph.initializer:
            copy = TensorProto()
            copy.CopyFrom(constant)
            copy.ClearField("name")
            key = copy.SerializeToString(deterministic=True)
            if key not in shared:
                copy.name = shared[key] = f"{label}{constant.name}"
                whole.initializer.append(copy)
            names[constant.name] = shared[key]
        for node in graph.node:
            copy = whole.node.add()
            copy.CopyFrom(node)
            copy.name = f"{label}{node.name}"
            for side, values in ((copy.input, node.input), (copy.output, node.output)):
                side[:] = [names.setdefault(name, f"{label}{name}") if name else "" for name in values]
        for value in (*graph.input[: len(part.inputs)], *graph.value_info, *graph.output):
            info = infos.setdefault(names[value.name], ValueInfoProto())
            info.CopyFrom(value)
            info.name = names[value.name]
    whole.input.extend(infos.pop(binding.name) for binding in module.inputs)
    whole.output.extend(infos.pop(binding.name) for binding in module.outputs)
    whole.value_info.extend(infos.values())
    opsets = [helper.make_opsetid("", OPSET)]
    if any(node.domain == DOMAIN for node in whole.node):
        opsets.append(helper.make_opsetid(DOMAIN, VERSION))
    return helper.make_model(whole, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fastar")


def trace(part: step.Graph) -> GraphProto:
    """One part. Its inputs are the bindings, then the weights, so that nothing is folded into those."""
    symbols: dict[str, Any] = {"B": Dim("B", max=256), "R": 128 * Dim("K", max=1 << 16), "G": Dim("G", max=1 << 14)}
    half, sizes = part.plan.shape.dtype, {"B": 2, "R": 3 * 128, "G": 3}  # 1 would be taken for a constant
    example = tuple(torch.empty(b.size(**sizes), dtype=b.type(half)) for b in part.inputs)
    shapes = tuple(_dynamic(binding, symbols) for binding in part.inputs)
    table = {getattr(torch.ops.fastar, name).default: _translation(op) for name, op in OPERATORS.items()}
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own insides
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            model = torch.onnx.export(
                part, example, dynamo=True, opset_version=OPSET, custom_translation_table=table, verbose=False,
                optimize=False, dynamic_shapes={"tensors": shapes},
                input_names=[binding.name for binding in part.inputs],
                output_names=[binding.name for binding in part.outputs],
            ).model  # fmt: skip
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    own = {*dict(part.named_parameters()), *dict(part.named_buffers())}
    graph = model.graph
    for name in sorted(own & graph.initializers.keys()):
        weight = graph.initializers.pop(name)
        if weight.uses():
            weight.const_value = None
            graph.inputs.append(weight)
    onnxscript.optimizer.optimize_ir(model)
    proto = ir.serde.serialize_graph(graph)  # without PyTorch's source lines, and this machine's paths:
    for value in (*proto.node, *proto.value_info, *proto.input, *proto.output):
        del value.metadata_props[:]
    return proto


def _dynamic(binding: Binding, symbols: dict[str, Any]) -> dict[int, Any]:
    dims = enumerate(evaluate(dim, symbols) for dim in binding.shape)
    return {axis: dim for axis, dim in dims if not isinstance(dim, int)}


def schema(operator: Operator) -> defs.OpSchema:
    """The operator as ONNX declares one."""
    sides = [
        [defs.OpSchema.FormalParameter(tensor.name, f"T_{tensor.kind}") for tensor in side]
        for side in (operator.inputs, operator.outputs)
    ]
    types = {"half": ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"], "f32": ["tensor(float)"],
             "i32": ["tensor(int32)"]}  # fmt: skip
    kinds = sorted({tensor.kind for tensor in (*operator.inputs, *operator.outputs)})
    return defs.OpSchema(
        operator.name, DOMAIN, VERSION, inputs=sides[0], outputs=sides[1],
        type_constraints=[(f"T_{kind}", types[kind], "") for kind in kinds],
        attributes=[
            defs.OpSchema.Attribute(name, onnx.helper.make_attribute(name, _number(value)))
            for name, value in operator.attributes.items()
        ],
    )  # fmt: skip


def _number(value: float) -> float:
    return int(value) if isinstance(value, bool) else value  # ONNX has no attributes of bool


def register() -> None:
    """Makes the operators known to onnx's checker and shape inference, in this process."""
    for name, operator in OPERATORS.items():
        if not defs.has(name, DOMAIN):
            defs.register_schema(schema(operator))


def _translation(operator: Operator) -> Callable[..., Any]:
    """What the exporter calls for the PyTorch operator: one node."""
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), operator.name, schema(operator))

    def translate(*arguments: Any, **named: Any) -> Any:
        # All attributes, also those with their default: TensorRT's plugins need not know defaults.
        given = dict(zip(operator.attributes, arguments[len(operator.inputs) :], strict=False)) | named
        given = {name: _number(value) for name, value in (dict(operator.attributes) | given).items()}
        return node(*arguments[: len(operator.inputs)], **given)

    translate.__name__ = operator.name
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    tensors = [inspect.Parameter(tensor.name, either) for tensor in operator.inputs]
    numbers = [inspect.Parameter(name, either, default=value) for name, value in operator.attributes.items()]
    translate.__signature__ = inspect.Signature([*tensors, *numbers])
    translate.__annotations__ = {name: type(value) for name, value in operator.attributes.items()}
    return translate


def check(path: Path, bindings: Sequence[Binding]) -> None:
    """That the file is what `bindings` say and what TensorRT can read. Raises ValueError."""
    register()
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    domains = {(opset.domain, opset.version) for opset in model.opset_import}
    if not domains <= {("", OPSET), (DOMAIN, VERSION)}:
        raise ValueError(f"{path.name}: opsets {sorted(domains)}; allowed: {OPSET} and {DOMAIN} {VERSION}")
    graph = model.graph
    names = [value.name for value in (*graph.input, *graph.output)]
    if names != [binding.name for binding in bindings]:
        raise ValueError(f"{path.name}: inputs and outputs are {names}")
    for node in graph.node:
        if node.op_type not in (OPERATORS if node.domain == DOMAIN else STANDARD):
            raise ValueError(f"{path.name}: {node.name} is {node.domain or 'ONNX'}'s {node.op_type}: not known to work")
    found = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    found |= {weight.name: weight.data_type for weight in graph.initializer}
    for name, element in found.items():
        if element not in ELEMENTS:
            raise ValueError(f"{path.name}: {name} is of type {TensorProto.DataType.Name(element)}")
