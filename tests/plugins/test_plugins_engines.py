"""Whole graphs, exported by PyTorch, become engines: by TensorRT-RTX, which needs no GPU, with our C++ plugins."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import random_world
import torch
from typer.testing import CliRunner

from fastar_backend.cli import app
from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine, cache_shape
from fastar_backend.engine.stream import ChunkRequest, StreamOptions
from fastar_backend.errors import InvalidInput
from fastar_backend.model.world import World, load_world
from plugins import engines, pipeline
from plugins.engines import BuildError, Place, Range
from plugins.runner import EngineRuntime

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("plugins_engine_driver.py")
ATTENTION = AttentionConfig(budget_frames=6, recent_frames=4)
PLACE = Place("tensorrt", "10.13.2", "NVIDIA H200", "9.0")


@pytest.fixture(scope="module")
def small_world(tmp_path_factory) -> Path:
    """One layer with one head of 64, for which the library of the tests has kernels."""
    config = copy.deepcopy(random_world.CONFIG)
    config["model"] |= {"dim": 64, "heads": 1, "layers": 1}
    return random_world.write(tmp_path_factory.mktemp("world") / "small", config)


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a process that builds with TensorRT-RTX."""
    rtx = pytest.importorskip("tensorrt_rtx_libs", reason="extra trt-test")
    pytest.importorskip("onnx", reason="extra trt-test")
    links = tmp_path_factory.mktemp("libraries")
    for path in Path(rtx.__file__).parent.glob("lib*.so.1"):
        (links / path.name.removesuffix(".1")).symlink_to(path)
    return os.environ | {"LD_LIBRARY_PATH": str(links), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def fastar(*arguments: str | Path, environment: dict[str, str], timeout: int = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastar_backend.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def built(small_world, plugin_library, environment, tmp_path_factory) -> Path:
    """All graphs of a stream, by the command, in float16."""
    out = tmp_path_factory.mktemp("engine") / "small"
    done = fastar(
        "engine", "build", "--world", small_world, "--attention", ATTENTION.model_dump_json(), "--precision", "fp16",
        "--library", plugin_library, "--arch", "90", "--out", out, "--timing-cache", out.parent / "timing",
        environment=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 engines" in done.stdout
    return out


def test_a_stream_becomes_engines(built, small_world):
    import onnx

    metadata = engines.read(built)
    assert set(metadata.graphs) == {"denoise", "write", "begin", "update"}
    for file, digest in metadata.sha256.items():
        assert engines.sha256(built / file) == digest
        assert (built / file).stat().st_size > 1000
    assert (metadata.place.tensorrt, metadata.plugins) == ("tensorrt_rtx", "libfastar_plugins.so")
    assert metadata.place.version.startswith("1.7.1")
    assert metadata.precision == "fp16"
    assert (built.parent / "timing").stat().st_size > 0
    nodes = onnx.load(built / "onnx" / "write.onnx", load_external_data=False).graph.node
    assert {"attend", "append"} <= {node.op_type for node in nodes}
    done = CliRunner().invoke(app, ["engine", "check", str(built), "--world", str(small_world)])
    assert done.exit_code == 0, done
    assert "fits random, fp16, tensorrt_rtx 1.7.1" in done.stdout
    done = CliRunner().invoke(app, ["engine", "check", str(built)])
    assert "was built for world random, and here it is doom" in str(done.exception)


def test_the_graphs_that_were_built_make_a_streams_frames(built, small_world):
    """The very files, run by an evaluator on the CPU in place of TensorRT; through merging."""
    from plugins.evaluator import Evaluator

    world = load_world(str(small_world), "cpu", torch.float16)
    graphs = {name: Evaluator(built / "onnx" / f"{name}.onnx") for name in engines.read(built).graphs}
    runtime = EngineRuntime(world, cache_shape(world), ATTENTION, graphs)
    pair = StreamEngine(world, ATTENTION), StreamEngine(world, ATTENTION, runtime=runtime)
    for engine in pair:
        engine.open(1, "a dark maze", StreamOptions(seed=1, start="nothing"))
    for chunk in range(5):
        (a,), (b,) = (engine.step([ChunkRequest(1, ("forward",))]) for engine in pair)
        if chunk < 3:  # nothing is merged before
            assert np.abs(a.frames.astype(int) - b.frames).mean() < 0.5
        for name in ("density", "cache_tokens", "text_tokens"):
            assert getattr(b.stats, name) == pytest.approx(getattr(a.stats, name), rel=1e-3)
    assert pair[1].streams[1].caches.merged > 0


@pytest.fixture(scope="module")
def errors(built, small_world, plugin_library, environment) -> dict[str, str]:
    world = load_world(str(small_world), "cpu", torch.float16)
    plan = pipeline.plan_of(world, ATTENTION)
    profiles = pipeline.profiles_of(plan, pipeline.ranges_of(plan))
    cases = {
        "right": ("begin", "", {}),
        "dtype": ("denoise", "dtype count.0", {}),
        "rank": ("denoise", "rank first.0", {}),
        "aliases": ("begin", "", {"aliases": False}),
        "profile": ("begin", "", {"profile": profiles["begin"] | {"keys": [(1, 128, 64), (1, 128, 64), (1, 128, 32)]}}),
        "library": ("denoise", "", {}),
    }
    given = {
        name: {"graph": graph, "change": change, "profile": profiles[graph]} | other
        for name, (graph, change, other) in cases.items()
    }
    alone, found = given.pop("library"), {}
    for chosen, library in (({"library": alone}, ()), (given, (str(plugin_library),))):
        done = subprocess.run(
            [sys.executable, DRIVER, built / "onnx", *library], env=environment, text=True, capture_output=True,
            input=json.dumps(list(chosen.values())), timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found |= dict(zip(chosen, json.loads(done.stdout.splitlines()[-1]), strict=True))
    return found


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("right", ["built, "]),
        ("dtype", ["engine: denoise: node 'layer.0.", "(attend)"]),
        ("rank", ["engine: denoise: node 'layer.0.", "(attend)"]),
        ("aliases", ["engine: begin", "kALIASED_PLUGIN_IO_10_03 not enabled"]),
        ("profile", ["engine: begin cannot be built", "keys"]),
        ("library", ["engine: denoise: node 'layer.0.", "Plugin not found"]),
    ],
)
def test_what_is_wrong_with_a_graph_is_said_with_its_node(errors, name, texts):
    assert all(text in errors[name] for text in texts), errors[name]


def test_a_missing_library_of_tensorrt_rtx_is_said_before_it_ends_the_process(built, environment):
    done = subprocess.run(
        [sys.executable, DRIVER, built / "onnx"], env=environment | {"LD_LIBRARY_PATH": ""}, text=True, input="[]",
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert "BuildError: engine: TensorRT-RTX looks for libtensorrt_rtx.so" in done.stderr


@pytest.mark.slow  # half a minute of export, half a minute of building
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_embedded_world_becomes_engines(plugin_library, environment, tmp_path, precision):
    done = fastar(
        "engine", "build", "--precision", precision, "--library", plugin_library, "--arch", "90", "--out", tmp_path,
        environment=environment, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    metadata = engines.read(tmp_path)
    assert set(metadata.graphs) == {"denoise", "write", "begin", "update"}
    assert (tmp_path / "denoise.engine").stat().st_size > 10e6, "its weights are in it"


# engine.json


@pytest.fixture
def described(world, tmp_path) -> Path:
    (tmp_path / "denoise.engine").write_bytes(b"an engine")
    ranges = {"B": Range(1, 1, 2)}
    engines.write(tmp_path, PLACE, "qdp", world, ATTENTION, "fp32", ranges, [tmp_path / "denoise.engine"])
    return tmp_path


def check(folder: Path, world: World, place: Place = PLACE, attention: AttentionConfig = ATTENTION,
          dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
    engines.check(engines.read(folder), folder, place, world, attention, dtype)


def test_a_description_that_fits(described, world):
    check(described, world)
    assert engines.read(described).graphs == {"denoise": "denoise.engine"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "10.14"}, "built for TensorRT tensorrt 10.13.2, and here it is tensorrt 10.14"),
        ({"tensorrt": "tensorrt_rtx"}, "built for TensorRT tensorrt 10.13.2"),
        ({"capability": "10.0"}, "built for a GPU of compute capability 9.0, and here it is 10.0"),
        ({"gpu": "NVIDIA H100"}, "built for the GPU NVIDIA H200, and here it is NVIDIA H100"),
        ({"gpu": None, "capability": None}, "compute capability 9.0, and here it is None"),
    ],
)
def test_another_place_is_refused(described, world, change, message):
    with pytest.raises(InvalidInput, match=message):
        check(described, world, dataclasses.replace(PLACE, **change))


def test_another_world_attention_type_or_table_is_refused(described, world, doom_world, monkeypatch):
    with pytest.raises(InvalidInput, match="built for world random, and here it is doom"):
        check(described, doom_world)
    with pytest.raises(InvalidInput, match="built for precision fp32, and here it is fp16"):
        check(described, world, dtype=torch.float16)
    with pytest.raises(InvalidInput, match=r"attention\.merge_threshold: got 0\.5; allowed: 0\.95, for which"):
        check(described, world, attention=ATTENTION.model_copy(update={"merge_threshold": 0.5}))
    other = copy.deepcopy(world)
    with torch.no_grad():
        other.dit.head.head.bias[0] += 1
    with pytest.raises(InvalidInput, match="built for the world's weights, in this type, "):
        check(described, other)
    monkeypatch.setattr(engines, "table_hash", lambda: "0" * 64)
    with pytest.raises(InvalidInput, match="built for the table of plugins "):
        check(described, world)


def test_files_that_are_torn_missing_or_of_another_kind_are_refused(described, world, tmp_path):
    (described / "denoise.engine").write_bytes(b"an engin")
    with pytest.raises(InvalidInput, match=r"denoise\.engine is torn"):
        check(described, world)
    (described / "denoise.engine").unlink()
    with pytest.raises(InvalidInput, match=r"denoise\.engine is missing"):
        check(described, world)
    file = described / engines.METADATA
    values = json.loads(file.read_text())
    for broken, message in (
        (values | {"version": 99}, "is not of version 1"),
        ({k: v for k, v in values.items() if k != "sha256"}, "is broken"),
        (values | {"ranges": {"B": {"least": 3, "likely": 2, "most": 1}}}, "is broken .*1 <= least"),
        ([], "is not of version 1"),
    ):
        file.write_text(json.dumps(broken))
        with pytest.raises(InvalidInput, match=f"engine_dir: .*{message}"):
            engines.read(described)
    file.write_text("{")
    with pytest.raises(InvalidInput, match="engine_dir: cannot read"):
        engines.read(described)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "--attention", "dense"), "attention.kind: got dense; allowed: fastar or window"),
        (("build", "--attention", "fastar", "--precision", "fp8"), "precision: got 'fp8'; allowed: auto, fp16"),
        (("build", "--attention", "{"), "attention: is not JSON"),
        (("build", "--plugins", "none"), "plugins: got 'none'; allowed: auto, qdp, library"),
        (("export", "--attention", "radial"), "attention.kind: got radial; allowed: fastar or window"),
        (("check",), "engine_dir: cannot read"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings", reason="extra trt-test")
    command, *options = arguments
    where = [str(tmp_path)] if command == "check" else ["--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["engine", command, *where, *options])
    assert isinstance(done.exception, InvalidInput), done
    assert message in str(done.exception)


def test_an_unloadable_library_is_an_error_of_the_build(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="extra trt-test")
    with pytest.raises(BuildError, match="no plugin library"):
        engines.load_library(trt, tmp_path / "none.so")
