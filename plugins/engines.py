"""Engines from ONNX graphs, by TensorRT or TensorRT-RTX (one interface; the latter builds without a GPU), and the
description that lies beside them: engine.json, checked before an engine is loaded.

TensorRT's own module is looked for when it is needed: nothing here imports it."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.snapshot import fingerprint
from fastar_backend.errors import FastarError, InvalidInput
from fastar_backend.model.world import World
from plugins.table import table_hash

MODULES = ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings")
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
METADATA = "engine.json"
VERSION = 1
ALIASES = "ALIASED_PLUGIN_IO_10_03"  # the preview feature by which plugins write in place
Progress = Callable[[str, str, float], None]  # graph, phase, share done 0..1


class BuildError(FastarError):
    """TensorRT cannot read a graph, or cannot build an engine of it; the text is TensorRT's."""

    code = "FAILED_PRECONDITION"


@dataclasses.dataclass(frozen=True)
class Range:
    """Sizes of a dynamic dimension: least, most likely and most."""

    least: int
    likely: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.likely <= self.most:
            raise InvalidInput("range", f"{self.least}, {self.likely}, {self.most}", "1 <= least <= likely <= most")


@dataclasses.dataclass(frozen=True)
class Place:
    """What an engine is bound to beside its world. gpu, capability: None where there is no GPU (TensorRT-RTX builds
    for all)."""

    tensorrt: str  # "tensorrt" or "tensorrt_rtx"
    version: str
    gpu: str | None
    capability: str | None


@dataclasses.dataclass(frozen=True)
class Metadata:
    place: Place
    plugins: str  # "qdp": kernels are in the engine; "library": beside it
    table: str  # plugins.table.table_hash
    world: str
    fingerprint: str
    attention: dict[str, Any]
    precision: str
    ranges: dict[str, Range]
    sha256: dict[str, str]  # file -> of its bytes
    version: int = VERSION

    @property
    def graphs(self) -> dict[str, str]:
        """Graph -> file."""
        return {name.removesuffix(".engine"): name for name in self.sha256 if name.endswith(".engine")}

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Metadata:
        """Raises TypeError, KeyError, ValueError, AttributeError where something is missing or unknown."""
        place, ranges = Place(**values["place"]), {k: Range(**v) for k, v in values["ranges"].items()}
        if values["precision"] not in TYPES.values():
            raise ValueError(f"precision {values['precision']!r:.40}")
        return cls(**(values | {"place": place, "ranges": ranges}))


def tensorrt(field: str, wanted: Sequence[str] = ()) -> Any:
    """The first of TensorRT's modules (or of those wanted) that is installed. Raises InvalidInput, naming `field`."""
    reasons = []
    for name in wanted or MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name}: {error.msg.splitlines()[0] if error.msg else error}")
    raise InvalidInput(
        field,
        f"tensorrt, and TensorRT is not installed here ({'; '.join(reasons)})",
        "torch, or an image with TensorRT",
    )


def with_plugin(trt: Any) -> Any:
    """The module with its `plugin` (quick deployable plugins) loaded, if it has any."""
    if trt.__name__ == "tensorrt_bindings":  # whose plugin module imports it by the name of the package around it
        sys.modules.setdefault("tensorrt", trt)
    with contextlib.suppress(ImportError):
        importlib.import_module(f"{trt.__name__}.plugin")
    return trt


def is_rtx(trt: Any) -> bool:
    return "rtx" in trt.__name__


def here(trt: Any) -> Place:
    name, capability = None, None
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
    return Place("tensorrt_rtx" if is_rtx(trt) else "tensorrt", trt.__version__, name, capability)


# Building


def logger(trt: Any, errors: list[str]) -> Any:
    """Collects TensorRT's errors."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                errors.append(message.strip())

    return Log()


def monitor(trt: Any, graph: str, progress: Progress) -> Any:
    """Tells `progress` of TensorRT's phases."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = max(steps, 1)
            progress(graph, phase, 0.0)

        def step_complete(self, phase: str, step: int) -> bool:
            progress(graph, phase, min(1.0, (step + 1) / self.steps[phase]))
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            progress(graph, phase, 1.0)

    return Monitor()


def build(
    trt: Any, files: Mapping[str, Path], out: Path, profiles: Mapping[str, Mapping[str, Sequence[Sequence[int]]]],
    timing_cache: Path | None = None, progress: Progress | None = None, aliases: bool = True,
) -> dict[str, Path]:  # fmt: skip
    """One engine for each ONNX file: graph -> out/graph.engine. Plugins are registered by the caller.

    profiles: graph -> input -> its least, most likely and largest shape. timing_cache: read if it is there, then
    written. aliases: plugins may write in place. Raises BuildError."""
    check_loadable(trt)
    out.mkdir(parents=True, exist_ok=True)
    built = {}
    for graph, path in files.items():
        data = build_one(trt, graph, path, profiles[graph], timing_cache, progress or (lambda *_: None), aliases)
        built[graph] = out / f"{graph}.engine"
        built[graph].write_bytes(data)
    return built


def check_loadable(trt: Any) -> None:
    """TensorRT-RTX loads its own library by a name without a version, and ends the process where there is none. Raises
    BuildError."""
    if not is_rtx(trt):
        return
    try:
        ctypes.CDLL("libtensorrt_rtx.so")
    except OSError:
        raise BuildError(
            "engine: TensorRT-RTX looks for libtensorrt_rtx.so, and LD_LIBRARY_PATH, as this process was started with, "
            "has none; allowed: a folder there with a link of that name to libtensorrt_rtx.so.1"
        ) from None


def build_one(
    trt: Any, graph: str, path: Path, profile: Mapping[str, Sequence[Sequence[int]]], timing_cache: Path | None,
    progress: Progress, aliases: bool = True,
) -> bytes:  # fmt: skip
    errors: list[str] = []
    log = logger(trt, errors)
    builder = trt.Builder(log)
    network = builder.create_network(flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise BuildError(
            f"engine: {graph}: {'; '.join(parse_errors(parser)) or text(errors)}; allowed: see docs/tensorrt.md"
        )
    config = builder.create_builder_config()
    if aliases:
        config.set_preview_feature(getattr(trt.PreviewFeature, ALIASES), True)
    shapes = builder.create_optimization_profile()
    for name, (least, likely, most) in profile.items():
        shapes.set_shape(name, tuple(least), tuple(likely), tuple(most))
    config.add_optimization_profile(shapes)
    watching = monitor(trt, graph, progress)  # kept: the configuration does not
    config.progress_monitor = watching
    cache = None
    if timing_cache is not None:
        cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.exists() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise BuildError(f"engine: {graph} cannot be built: {text(errors)}; allowed: see docs/tensorrt.md")
    if cache is not None:
        timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(data)


def flags(trt: Any) -> int:
    """Types are as the graph says; plugins of both kinds, kernels embedded."""
    names = ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")
    known = trt.NetworkDefinitionCreationFlag.__members__
    return sum(1 << int(known[name]) for name in names if name in known)


def parse_errors(parser: Any) -> list[str]:
    """With the names of the nodes."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        found.append(f"node {error.node_name()!r} ({error.node_operator()}): {error.desc().strip()}")
    return found


def text(errors: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(errors)) or "TensorRT gives no reason"


def load_library(trt: Any, library: Path) -> None:
    """Registers the C++ plugins (plugins/csrc). Raises BuildError."""
    if not library.is_file():
        raise BuildError(f"engine: no plugin library {library}; allowed: one of `python -m plugins.build`")
    log = logger(trt, [])
    trt.init_libnvinfer_plugins(log, "")
    if not trt.get_plugin_registry().load_library(str(library)):
        raise BuildError(f"engine: TensorRT cannot load the plugin library {library}; allowed: one built for it")


# What lies beside an engine


def write(folder: Path, place: Place, plugins: str, world: World, attention: AttentionConfig, precision: str,
          ranges: Mapping[str, Range], files: Sequence[Path]) -> Metadata:  # fmt: skip
    """engine.json, last: a folder with it is whole. files: engines, and the plugin library if there is one."""
    metadata = Metadata(
        place, plugins, table_hash(), world.config.name, fingerprint(world), attention.model_dump(mode="json"),
        precision, dict(ranges), {file.name: sha256(file) for file in files},
    )  # fmt: skip
    (folder / METADATA).write_text(json.dumps(dataclasses.asdict(metadata), indent=1))
    return metadata


def read(folder: Path) -> Metadata:
    """Raises InvalidInput."""
    path, allowed = folder / METADATA, "a folder of `fastar engine build`"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput("engine_dir", f"cannot read {path}: {error}", allowed) from None
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise InvalidInput("engine_dir", f"{path} is not of version {VERSION}", allowed)
    try:
        return Metadata.parse(values)
    except (TypeError, KeyError, ValueError, AttributeError, InvalidInput) as error:
        raise InvalidInput("engine_dir", f"{path} is broken ({error!s:.80})", allowed) from None


def check(metadata: Metadata, folder: Path, place: Place, world: World, attention: AttentionConfig,
          dtype: torch.dtype) -> None:  # fmt: skip
    """Raises InvalidInput: what the engine was built for, and what is there, of the first that differs."""
    for name, file in {name: folder / name for name in metadata.sha256}.items():
        if not file.is_file() or sha256(file) != metadata.sha256[name]:
            raise InvalidInput("engine_dir", f"{file} is {'torn' if file.is_file() else 'missing'}", "build it anew")
    pairs = {
        "TensorRT": (f"{metadata.place.tensorrt} {metadata.place.version}", f"{place.tensorrt} {place.version}"),
        "a GPU of compute capability": (metadata.place.capability, place.capability),
        "the GPU": (metadata.place.gpu, place.gpu),
        "the table of plugins": (metadata.table, table_hash()),
        "world": (metadata.world, world.config.name),
        "the world's weights, in this type,": (metadata.fingerprint, fingerprint(world)),
        "precision": (metadata.precision, TYPES[dtype]),
    }
    if metadata.place.tensorrt == "tensorrt_rtx":  # whose engines are finished on the GPU that runs them
        pairs = {name: pair for name, pair in pairs.items() if "GPU" not in name}
    for what, (built, found) in pairs.items():
        if built != found:
            raise InvalidInput(
                "engine_dir", f"{folder} was built for {what} {built!s:.40}, and here it is {found!s:.40}",
                "an engine built for this (`fastar engine build`)",
            )  # fmt: skip
    stated, asked = metadata.attention, attention.model_dump(mode="json")
    for name in sorted(stated.keys() | asked.keys()):
        if stated.get(name) != asked.get(name):
            raise InvalidInput(
                f"attention.{name}", f"got {asked.get(name)}", f"{stated.get(name)}, for which {folder} was built"
            )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def deserialize(trt: Any, folder: Path, metadata: Metadata) -> dict[str, Any]:
    """Graph -> ICudaEngine, on the current GPU. Raises FastarError with TensorRT's reason."""
    if metadata.plugins != "qdp":
        load_library(trt, folder / metadata.plugins)
    errors: list[str] = []
    log = logger(trt, errors)
    runtime = trt.Runtime(log)
    engines = {}
    for graph, file in metadata.graphs.items():
        engines[graph] = runtime.deserialize_cuda_engine((folder / file).read_bytes())
        if engines[graph] is None:
            raise FastarError(f"tensorrt: cannot load {folder / file}: {text(errors)}; allowed: build it here")
    return engines
