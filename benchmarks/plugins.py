"""Every TensorRT plugin on a GPU, without TensorRT: right first, then timed.

`python -m benchmarks.plugins --out DIR` on a GPU of compute capability 9.0 or newer. The thin host (plugins/host.py)
enqueues each plugin, in place where it works in place, also from a CUDA graph; the outputs are compared with
plugins/reference.py in float64 on fresh random inputs (the tests' cases, with the served head dimension). Then it is
timed at the sizes of one layer of Wan2.1-1.3B (480x832), beside the same operator launched from PyTorch; both from CUDA
graphs, so that only the GPU's time counts. No speed is reported for a plugin that is wrong. `--dry-run` needs no GPU:
it builds the library, all inputs and outputs, and has the plugins check them.
"""

from __future__ import annotations

import inspect
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastar_backend.errors import FastarError, InvalidInput
from plugins import ops, reference
from plugins.build import library
from plugins.host import Host, Plugin
from plugins.table import OPERATORS, Operator, evaluate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "plugins"))
import plugins_cases as cases

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = {"f32": torch.float32, "i32": torch.int32}
POISON = {"half": float("nan"), "f32": float("nan"), "i32": -123456789}
TOLERANCE = {"fp16": 4e-3, "bf16": 3e-2}  # of the norm
MAY_DIFFER = {"quantise", "signatures", "keep_text", "nearest"}  # in 1 % of values: they decide by what was rounded
HEADS, FRAME, CHUNK, LAYERS = 12, 1560, 3, 30
QUERIES, ROWS, SLOTS = FRAME * CHUNK, 110 * 128, 4 * FRAME  # 9 latent frames in all, up to whole key blocks
BLOCKS, KEYS = -(-QUERIES // 128), ROWS // 128
SPEED: dict[str, dict[str, int]] = {
    "attend": {"n": QUERIES, "rows": ROWS},
    "attend_sparse": {"n": QUERIES, "rows": ROWS, "block": 128},
    "append": {"n": QUERIES, "rows": ROWS, "streams": 1},
    "turn": {"n": QUERIES},
    "turn_into": {"n": QUERIES, "rows": ROWS, "frames": CHUNK},
    "quantise": {"n": FRAME},
    "nearest": {"groups": 3, "n": FRAME, "slots": SLOTS},
    "place": {"pairs": FRAME, "n": FRAME, "slots": SLOTS, "rows": ROWS},
    "merge": {"n": FRAME, "slots": SLOTS, "rows": ROWS},
    "arrange": {"n": QUERIES},
    "block_means": {"n": QUERIES},
    "near_blocks": {"lines": BLOCKS, "rows": ROWS},
    "choose_blocks": {"lines": BLOCKS, "blocks": KEYS, "streams": 1},
    "signatures": {"n": QUERIES, "bits": 8},
    "keep_text": {"n": QUERIES, "tokens": 512},
    "text_mass": {"n": QUERIES, "tokens": 512},
    "condense_text": {"tokens": 512},
}
CHECKED: dict[str, dict[str, int]] = {"attend_sparse": {"n": 300, "block": 128}, "block_means": {"n": 300}}


def turned(head_dim: int) -> int:
    """Pairs of dimensions that are turned in time, as in Wan."""
    return (head_dim - 4 * (head_dim // 6)) // 2


def drawn(
    name: str, head_dim: int, dtype: torch.dtype, sizes: Mapping[str, int]
) -> tuple[list[Tensor], dict[str, Any]]:
    """Random inputs on the CPU, in the operator's order, and its attributes."""
    make = cases.CASES[name]
    fitting = {"dim": head_dim, "turned": turned(head_dim)}
    known = inspect.signature(make).parameters
    inputs, attributes = make(**{key: value for key, value in fitting.items() if key in known} | dict(sizes))
    return list(cases.cast(OPERATORS[name], inputs, dtype).values()), attributes


def compiled_in(names: list[str], head_dim: int) -> dict[str, list[float]]:
    """What the library must be compiled for beside types and head dimensions, so that it has what `drawn` draws."""
    found: dict[str, set[float]] = {"C": {turned(head_dim)}}
    for name in names:
        _, attributes = drawn(name, head_dim, torch.float16, CHECKED.get(name, {}))
        for key, value in attributes.items():
            if key in OPERATORS[name].constants.values():
                found.setdefault(key, set()).add(value)
    return {key: sorted(values) for key, values in found.items()}


def outputs_for(operator: Operator, inputs: list[Tensor], attributes: Mapping[str, Any]) -> list[Tensor]:
    """Poison, and in place the inputs themselves."""
    given = dict(zip((argument.name for argument in operator.inputs), inputs, strict=True))
    half = next((given[argument.name].dtype for argument in operator.inputs if argument.kind == "half"), None)
    values = operator.values([tensor.shape for tensor in inputs], attributes, wide=False)
    made = []
    for argument in operator.outputs:
        if argument.alias:
            made.append(given[argument.alias])
            continue
        shape, dtype = [evaluate(dim, values) for dim in argument.dims], KINDS.get(argument.kind, half)
        made.append(torch.full(shape, POISON[argument.kind], dtype=dtype, device=inputs[0].device))
    return made


class Call:
    """One plugin with its tensors on a device, to be enqueued."""

    def __init__(self, host: Host, name: str, inputs: list[Tensor], attributes: Mapping[str, Any]) -> None:
        self.plugin: Plugin = host.create(name, attributes)
        self.name, self.attributes = name, attributes
        self.inputs = [tensor.clone() for tensor in inputs]
        self.outputs = outputs_for(OPERATORS[name], self.inputs, attributes)
        self.given = [tensor.clone() for tensor in self.inputs]
        tensors = [*self.inputs, *self.outputs]
        self.types = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
        self.shapes = [tuple(tensor.shape) for tensor in tensors]
        self.addresses = [tensor.data_ptr() for tensor in tensors]
        count = len(self.inputs)
        if self.plugin.types(self.types[:count]) != self.types[count:]:
            raise InvalidInput(name, "the plugin's output types", str(self.types[count:]))
        if self.plugin.shapes(self.shapes[:count]) != self.shapes[count:]:
            raise InvalidInput(name, "the plugin's output shapes", str(self.shapes[count:]))
        self.plugin.prepare(self.types, self.shapes)

    def restore(self) -> None:
        for tensor, before in zip(self.inputs, self.given, strict=True):
            tensor.copy_(before)

    def enqueue(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        self.plugin.run(self.types, self.shapes, self.addresses, stream)

    def launch(self) -> None:
        """The same from PyTorch."""
        ops.launch(self.name, self.inputs, self.attributes, self.outputs)


def error(name: str, outputs: list[Tensor], inputs: list[Tensor], attributes: Mapping[str, Any]) -> float:
    """The largest relative error of the outputs, in the norm; infinite where whole numbers differ, or infinities."""
    operator = OPERATORS[name]
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    block = {"BLOCK_M": operator.tiles(False)["BLOCK_M"]} if name in ("attend_sparse", "block_means") else {}
    wanted = getattr(reference, name)(*exact, **attributes, **block)
    worst = 0.0
    for out, right in zip(outputs, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        out = out.cpu()
        if name == "quantise":  # words of four
            out, right = out.view(torch.int8), right.view(torch.int8)
        whole = not right.is_floating_point()
        if whole or name in MAY_DIFFER - {"nearest"}:
            differ = (out != right).double().mean().item()
            worst = max(worst, float("inf") if differ > (0.01 if name in MAY_DIFFER else 0) else 0)
            continue
        out, finite = out.double(), right.isfinite()
        if not torch.equal(out.isfinite(), finite) or not torch.equal(out[~finite], right[~finite]):
            return float("inf")
        worst = max(worst, ((out - right)[finite].norm() / right[finite].norm().clamp_min(1e-3)).item())
    return worst


def captured(act: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        act()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Median by events, after a warm-up."""
    times = []
    for at in range(repeats + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times += [start.elapsed_time(stop)] if at >= 3 else []
    return statistics.median(times)


def verify(host: Host, name: str, kind: str, head_dim: int) -> dict[str, float | bool]:
    """Errors of a plugin that is enqueued, and from a CUDA graph."""
    inputs, attributes = drawn(name, head_dim, TYPES[kind], CHECKED.get(name, {}))
    call = Call(host, name, [tensor.cuda() for tensor in inputs], attributes)
    call.enqueue()
    torch.cuda.synchronize()
    direct = error(name, call.outputs, inputs, attributes)
    once = [tensor.clone() for tensor in call.outputs]
    graph = captured(call.enqueue)
    same = True
    for _ in range(2):
        call.restore()
        for argument, tensor in zip(OPERATORS[name].outputs, call.outputs, strict=True):
            if not argument.alias:
                tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        same &= all(torch.equal(a, b) for a, b in zip(once, call.outputs, strict=True))
    return {"error": direct, "graph_equal": same, "right": same and direct <= TOLERANCE[kind]}


def timed(host: Host, name: str, kind: str, head_dim: int, repeats: int) -> dict[str, float]:
    inputs, attributes = drawn(name, head_dim, TYPES[kind], {"groups": HEADS} | SPEED[name])
    call = Call(host, name, [tensor.cuda() for tensor in inputs], attributes)
    call.launch()  # compiles, outside of the graph
    torch.cuda.synchronize()
    return {"plugin_ms": milliseconds(captured(call.enqueue), repeats),
            "pytorch_ms": milliseconds(captured(call.launch), repeats)}  # fmt: skip


def arch_here() -> int:
    """Raises InvalidInput where there is no fitting GPU."""
    if not torch.cuda.is_available():
        raise InvalidInput("GPU", "none", "compute capability 9.0 or newer; --dry-run needs none")
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        raise InvalidInput("GPU", f"compute capability {major}.{minor}", "9.0 or newer")
    return major * 10 + minor


def main(
    out: Annotated[Path, typer.Option(help="Folder for plugins.json, and the library's build.")] = Path("out"),
    head_dim: Annotated[int, typer.Option(help="A power of two.")] = 128,
    type: Annotated[str, typer.Option(help=f"Comma-separated; of {', '.join(TYPES)}.")] = "fp16,bf16",
    operator: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of which the median is taken.")] = 50,
    built: Annotated[Path | None, typer.Option(help="libfastar_plugins.so, made already.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Builds and checks without a GPU.")] = False,
) -> None:
    """Checks and times the TensorRT plugins."""
    try:
        names, kinds = operator or list(OPERATORS), type.split(",")
        for field, given, allowed in (("operator", names, OPERATORS), ("type", kinds, TYPES)):
            if unknown := [item for item in given if item not in allowed]:
                raise InvalidInput(field, ", ".join(unknown), ", ".join(allowed))
        arch = 90 if dry_run else arch_here()
        values = compiled_in(names, head_dim)
        made = built or library(out / "build", [arch], kinds, [head_dim], values=values, operators=names)
        host = Host(made)
        results = run(host, names, kinds, head_dim, repeats, dry_run)
    except FastarError as failure:
        raise SystemExit(f"error: {failure}") from None
    out.mkdir(parents=True, exist_ok=True)
    device = "none" if dry_run else torch.cuda.get_device_name()
    (out / "plugins.json").write_text(
        json.dumps({"device": device, "head_dim": head_dim, "results": results}, indent=1)
    )
    show(results)
    if any(result.get("right") is False for result in results):
        raise SystemExit("error: not every plugin is right")


def run(
    host: Host, names: list[str], kinds: list[str], head_dim: int, repeats: int, dry_run: bool
) -> list[dict[str, Any]]:
    results = []
    for name, kind in itertools.product(names, kinds):
        result: dict[str, Any] = {"operator": name, "type": kind}
        if dry_run:
            for sizes in (CHECKED.get(name, {}), {"groups": HEADS} | SPEED[name]):
                Call(host, name, *drawn(name, head_dim, TYPES[kind], sizes))
            result["accepted"] = True
        else:
            result |= verify(host, name, kind, head_dim)
            if result["right"]:
                result |= timed(host, name, kind, head_dim, repeats)
        results.append(result)
    return results


def show(results: list[dict[str, Any]]) -> None:
    table = Table("operator", "type", "right", "error", "plugin ms", "PyTorch ms")
    for result in results:
        numbers = [f"{result[key]:.3g}" if key in result else "-" for key in ("error", "plugin_ms", "pytorch_ms")]
        table.add_row(
            result["operator"],
            result["type"],
            {None: "not run", True: "yes", False: "NO"}[result.get("right")],
            *numbers,
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
