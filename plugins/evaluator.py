"""Runs an exported graph on the CPU, as TensorRT does on a GPU: nodes of domain `fastar` by their plain reference, all
others by ONNX Runtime. For tests; float32 and float16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from fastar_backend.errors import InvalidInput
from plugins import ops  # registers the operators
from plugins.export import DOMAIN, IR_VERSION, OPSET
from plugins.table import OPERATORS

assert ops
AFTER = ".after"
TYPES = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16, TensorProto.INT32: torch.int32}
Values = dict[str, Tensor]


class Evaluator:
    """One graph (`Executor` of plugins/runner.py)."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidInput for a graph in bfloat16, which ONNX Runtime does not know on a CPU."""
        model = onnx.load(str(path))
        graph = model.graph
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        if self.metadata.get("fastar.dtype") == "bf16":
            raise InvalidInput("dtype", f"{path.name} is in bf16", "fp32 or fp16 on the CPU")
        self.inputs = {value.name: TYPES[value.type.tensor_type.elem_type] for value in graph.input}
        self.outputs = [value.name for value in graph.output]
        self.weights = {weight.name: weight for weight in graph.initializer}
        self.infos = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
        self.constants = {name: _tensor(self.weights[name]) for name in self._operators_weights(graph.node)}
        self.uses = Counter(name for node in graph.node for name in node.input)
        self.uses.update(self.outputs)
        self.steps = [self._step(group) for group in _groups(graph.node, {"", *self.inputs, *self.weights})]

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        """tensors: all inputs, and the outputs that are not in place, by name; written are those and the inputs that
        have an output in place, which nobody binds. Raises InvalidInput for what is missing or of another type."""
        for name, dtype in self.inputs.items():
            if name not in tensors or tensors[name].dtype != dtype:
                got = tensors[name].dtype if name in tensors else "nothing"
                raise InvalidInput(name, f"bound is {got}", f"a tensor of {dtype}")
        values: Values = self.constants | {name: tensors[name] for name in self.inputs}
        with torch.inference_mode():
            for step in self.steps:
                step(values)
            for name in self.outputs:
                bound = name.removesuffix(AFTER)
                if bound not in tensors:
                    raise InvalidInput(name, "nothing is bound", "a tensor to write to")
                tensors[bound].copy_(values[name])

    def _operators_weights(self, nodes: Sequence[NodeProto]) -> set[str]:
        return {name for node in nodes if node.domain == DOMAIN for name in node.input if name in self.weights}

    def _step(self, group: Sequence[NodeProto]) -> Callable[[Values], None]:
        return _operator(group[0]) if group[0].domain == DOMAIN else self._session(group)

    def _session(self, nodes: Sequence[NodeProto]) -> Callable[[Values], None]:
        """Standard nodes that need nothing from outside but `values`."""
        made = {name for node in nodes for name in node.output}
        uses = Counter(name for node in nodes for name in node.input if name)
        used = uses.keys() - made
        weights = [self.weights[name] for name in used & self.weights.keys()]
        inputs = sorted(used - self.weights.keys())
        wanted = sorted(name for name in made if self.uses[name] > uses[name])
        infos = [[self.infos[name] for name in names] for names in (inputs, wanted)]
        graph = helper.make_graph(nodes, "part", *infos, weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

        def run(values: Values) -> None:
            given = {name: values[name].contiguous().numpy() for name in inputs}
            values.update(zip(wanted, map(torch.from_numpy, session.run(wanted, given)), strict=True))

        return run


def _groups(nodes: Sequence[NodeProto], known: set[str]) -> Iterator[list[NodeProto]]:
    """The nodes in an order in which they can run: as many standard ones together as do not wait for an operator."""
    pending = list(nodes)
    while pending:
        ready, waiting = [], []
        for node in pending:  # which are in some such order already
            able = node.domain != DOMAIN and known.issuperset(node.input)
            (ready if able else waiting).append(node)
            known.update(node.output if able else ())
        if ready:
            yield ready
        able = [node for node in waiting if node.domain == DOMAIN and known.issuperset(node.input)]
        done = {node.name for node in able}
        pending = [node for node in waiting if node.name not in done]
        for node in able:
            known.update(node.output)
            yield [node]


def _operator(node: NodeProto) -> Callable[[Values], None]:
    function, kinds = getattr(torch.ops.fastar, node.op_type), OPERATORS[node.op_type].attributes
    attributes = {given.name: type(kinds[given.name])(helper.get_attribute_value(given)) for given in node.attribute}

    def run(values: Values) -> None:
        made = function(*(values[name] for name in node.input), **attributes)
        values.update(zip(node.output, made if isinstance(made, tuple) else (made,), strict=True))

    return run


def _tensor(weight: TensorProto) -> Tensor:
    return torch.from_numpy(numpy_helper.to_array(weight).copy())
