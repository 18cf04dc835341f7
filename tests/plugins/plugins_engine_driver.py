"""A process with TensorRT-RTX: builds whole graphs that are wrong in one thing each, and prints each error as JSON.

    plugins_engine_driver.py FOLDER [LIBRARY] < [{"graph", "change", "aliases", "profiles"}, ...]

change: "" or what is done to the graph before: "dtype NAME" (an input becomes int32), "rank NAME" (one dimension more).
Without LIBRARY no plugin is known. LD_LIBRARY_PATH must have libtensorrt_rtx.so (docs/tensorrt.md)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
from onnx import TensorProto

from plugins import engines


def changed(model: onnx.ModelProto, change: str) -> onnx.ModelProto:
    what, _, name = change.partition(" ")
    for value in model.graph.input:
        if value.name == name:
            if what == "dtype":
                value.type.tensor_type.elem_type = TensorProto.INT32
            else:
                value.type.tensor_type.shape.dim.add().dim_value = 1
    return model


def main() -> None:
    folder, trt = Path(sys.argv[1]), engines.tensorrt("test", ("tensorrt_rtx_bindings",))
    engines.check_loadable(trt)
    if len(sys.argv) > 2:
        engines.load_library(trt, Path(sys.argv[2]))
    errors = []
    for case in json.load(sys.stdin):
        path = folder / f"{case['graph']}.onnx"
        wrong = folder / "wrong.onnx"
        onnx.save(changed(onnx.load(path, load_external_data=False), case["change"]), wrong)
        try:
            data = engines.build_one(
                trt, case["graph"], wrong, case["profile"], None, lambda *_: None, case.get("aliases", True)
            )
            errors.append(f"built, {len(data)} bytes")
        except engines.BuildError as error:
            errors.append(str(error))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
