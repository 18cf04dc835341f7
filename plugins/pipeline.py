"""From a world to a folder that `fastar serve --runtime tensorrt --engine FOLDER` runs: graphs exported, plugins made
known to TensorRT, engines built, engine.json."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastar_backend.attention.flat_cache import TOGETHER
from fastar_backend.config import AttentionConfig
from fastar_backend.errors import InvalidInput
from fastar_backend.model.world import World, load_world
from plugins import engines, step
from plugins.engines import Metadata, Progress, Range
from plugins.runner import plan_for

DTYPES = {name: dtype for dtype, name in engines.TYPES.items()}
PLUGINS = ("auto", "qdp", "library")


def load(world: str, precision: str) -> World:
    """On the CPU, in that type ("auto": its own), unfused. Raises InvalidInput, WeightsError."""
    if precision not in ("auto", *DTYPES):
        raise InvalidInput("precision", f"got {precision!r:.40}", ", ".join(("auto", *DTYPES)))
    return load_world(world, "cpu", DTYPES.get(precision))


def precision_of(world: World) -> str:
    return engines.TYPES[world.dit.head.head.weight.dtype]


def plan_of(world: World, attention: AttentionConfig) -> step.Plan:
    """Raises InvalidInput for what an engine's streams cannot be."""
    return plan_for(world, attention, world.dit.head.head.weight.dtype)


def ranges_of(plan: step.Plan, batch: int = 1) -> dict[str, Range]:
    """Of the dynamic dimensions: B streams; R rows, which follow from the budget; G heads of all layers of a stream,
    which `update` takes in parts."""
    heads = plan.config.model.layers * plan.config.model.heads
    return {
        "B": Range(1, 1, batch),
        "R": Range(plan.rows, plan.rows, plan.rows),
        "G": Range(min(heads, heads % TOGETHER or TOGETHER), min(heads, TOGETHER), heads),
    }


def profiles_of(plan: step.Plan, ranges: Mapping[str, Range]) -> dict[str, dict[str, list[tuple[int, ...]]]]:
    """Graph -> input -> its least, most likely and largest shape."""
    sizes = [{name: getattr(r, part) for name, r in ranges.items()} for part in ("least", "likely", "most")]
    return {
        graph: {b.name: [b.size(**size) for size in sizes] for b in step.bindings(plan, graph) if not b.output}
        for graph in plan.graphs
    }


def arch_of(capability: str | None) -> int:
    """Of the architectures that kernels are compiled for, the one a GPU runs. Raises InvalidInput."""
    from plugins.aot import ARCHS

    allowed = f"one of {', '.join(map(str, ARCHS))}"
    if capability is None:
        raise InvalidInput("arch", "none was given, and there is no GPU", allowed)
    arch = int(capability.replace(".", ""))  # exactly: 8.6 has less shared memory than 8.0
    if arch not in ARCHS:
        raise InvalidInput("arch", f"the GPU's is {arch}", allowed)
    return arch


def compiled_for(plan: step.Plan) -> dict[str, list[float]]:
    """Values of what kernels have compiled in, beside the head dimension."""
    return {
        "C": [plan.shape.rope_split[0] // 2], "density": [plan.attention.sparse_density], "renew": [True, False]
    }  # fmt: skip


def register(trt: Any, plugins: str, plan: step.Plan, precision: str, out: Path, library: Path | None,
             arch: int | None) -> Path | None:  # fmt: skip
    """Makes the operators known to this process's TensorRT, by `plugins` (of PLUGINS). library: one that is built;
    None: it is built, into out/plugins. Returns the library that an engine needs, if it needs one."""
    if plugins == "auto":
        plugins = "library" if library or engines.is_rtx(trt) else "qdp"
    arch = arch or arch_of(engines.here(trt).capability)
    if plugins == "qdp":
        from plugins import qdp

        qdp.register(engines.with_plugin(trt), qdp.for_arch(arch))
        return None
    if library is None:
        from plugins import build

        dim = plan.config.model.head_dim
        library = build.library(out / "plugins", [arch], [precision], [dim], values=compiled_for(plan))
    engines.load_library(trt, library)
    return library


def make(
    trt: Any, world: World, attention: AttentionConfig, out: Path, *, plugins: str = "auto", batch: int = 1,
    library: Path | None = None, arch: int | None = None, timing_cache: Path | None = None,
    progress: Progress = lambda graph, phase, share: None,
) -> Metadata:  # fmt: skip
    """All engines of a stream of this attention, in `out`. Raises InvalidInput, BuildError."""
    from plugins.export import export  # onnx is not needed where engines are run

    if plugins not in PLUGINS:
        raise InvalidInput("plugins", f"got {plugins!r:.40}", ", ".join(PLUGINS))
    (out / engines.METADATA).unlink(missing_ok=True)  # whatever happens: no old description beside new engines
    plan, precision = plan_of(world, attention), precision_of(world)
    ranges = ranges_of(plan, batch)
    needed = register(trt, plugins, plan, precision, out, library, arch)
    graphs = [graph for graph in plan.graphs if graph != "prompt"]  # which the host makes, once a prompt
    files = export(world, attention, out / "onnx", graphs, precision, lambda graph: progress(graph, "Exporting", 0.0))
    built = list(engines.build(trt, files, out, profiles_of(plan, ranges), timing_cache, progress).values())
    if needed:
        built.append(Path(shutil.copy(needed, out / needed.name)))
    return engines.write(
        out, engines.here(trt), needed.name if needed else "qdp", world, attention, precision, ranges, built
    )
