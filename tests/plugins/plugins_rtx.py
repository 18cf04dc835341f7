"""A process with TensorRT-RTX, which needs no GPU to build: each case is a graph of one operator, built into an engine.

`python plugins_rtx.py LIBRARY < cases.json`. A case: operator, types (of inputs, outputs), shapes (of inputs; a name: a
dimension that is not known, then `range`: its least, usual and greatest size), attributes, in_place (whether in-place
outputs are allowed). Prints a list of results as JSON: the outputs' shapes and the engine's size, or errors (the
parser's, and what the plugins wrote to standard error)."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import tensorrt_rtx_bindings as trt
from onnx import TensorProto, helper

from plugins.table import OPERATORS

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16,
         "int32": TensorProto.INT32, "int64": TensorProto.INT64}  # fmt: skip


class Log(trt.ILogger):
    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)


def model(case: dict[str, Any]) -> bytes:
    operator = OPERATORS[case["operator"]]
    names = [argument.name for argument in (*operator.inputs, *operator.outputs)]
    shapes = case["shapes"] + [None] * len(operator.outputs)
    infos = [helper.make_tensor_value_info(name, TYPES[kind], shape)
             for name, kind, shape in zip(names, case["types"], shapes, strict=True)]  # fmt: skip
    count = len(operator.inputs)
    inputs, outputs = infos[:count], infos[count:]
    node = helper.make_node(operator.name, names[:count], names[count:], domain="fastar", **case["attributes"])
    graph = helper.make_graph([node], "one", inputs, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("fastar", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def build(case: dict[str, Any]) -> dict[str, Any]:
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model(case)):
        return {"errors": [parser.get_error(at).desc() for at in range(parser.num_errors)] + log.errors}
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, case["in_place"])
    if any(isinstance(dim, str) for shape in case["shapes"] for dim in shape):
        profile = builder.create_optimization_profile()
        for at in range(network.num_inputs):
            dims = network.get_input(at).shape
            sizes = [tuple(size if dim < 0 else dim for dim in dims) for size in case["range"]]
            profile.set_shape(network.get_input(at).name, *sizes)
        config.add_optimization_profile(profile)
    shapes = [list(network.get_output(at).shape) for at in range(network.num_outputs)]
    engine = builder.build_serialized_network(network, config)
    return {"errors": log.errors} if engine is None else {"shapes": shapes, "bytes": engine.nbytes}


def main() -> None:
    trt.get_plugin_registry().load_library(sys.argv[1])
    results = []
    with tempfile.TemporaryFile() as written:  # plugins have no logger of RTX's: their messages are on standard error
        kept = os.dup(2)
        os.dup2(written.fileno(), 2)
        for case in json.load(sys.stdin):
            start = os.lseek(written.fileno(), 0, os.SEEK_END)
            result = build(case)
            text = os.pread(written.fileno(), 1 << 20, start).decode()
            if "errors" in result:
                result["errors"] = [line for line in text.splitlines() if line.startswith("fastar: ")] + result[
                    "errors"
                ]
            results.append(result)
        os.dup2(kept, 2)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
