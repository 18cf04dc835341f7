"""Streams whose graphs an executor runs, against PyTorch's: the same frames, statistics, forks, snapshots, errors."""

from __future__ import annotations

import copy
import types
from typing import Any

import numpy as np
import pytest
import random_world
import torch
from plugins_eager import EagerExecutor

from fastar_backend.attention import TextCache
from fastar_backend.attention.flat_cache import FlatCaches
from fastar_backend.config import AttentionConfig, ExecutionConfig
from fastar_backend.engine import runtime as runtime_module
from fastar_backend.engine.engine import StreamEngine, cache_shape
from fastar_backend.engine.runtime import TorchRuntime, make_runtime
from fastar_backend.engine.snapshot import Snapshot
from fastar_backend.engine.stream import Chunk, ChunkRequest, StreamOptions
from fastar_backend.engine.warm_up import costs
from fastar_backend.errors import FastarError, InvalidInput
from fastar_backend.model.world import World, load_world
from plugins import engines, runner, step

DENSE = AttentionConfig(budget_frames=6, recent_frames=4, merge_threshold=0.5)
CONFIGS = {
    "fastar": DENSE,
    "sinks": AttentionConfig(budget_frames=8, recent_frames=4, sink_frames=2, merge_threshold=0.5, merge_early=True),
    "window": AttentionConfig(kind="window", budget_frames=4),
}
SPARSE = DENSE.model_copy(update={"sparse_density": 0.3, "dense_steps": 0.0})
STATS = ("chunk", "first_frame", "density", "cache_tokens", "merged_tokens", "text_tokens", "cache_bytes")


class KernelText(TextCache):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.groups is None and self.bias is not None:
            self.use_kernel()


class FlatRuntime(TorchRuntime):
    """The GPU's own path, its kernels in Triton's interpreter."""

    def caches(self, attention, portable):
        return FlatCaches(self.shape, attention, self.world.config.model.layers)

    def text(self, *args):
        return KernelText(*args)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    changed = copy.deepcopy(random_world.CONFIG)
    changed["model"] |= {"dim": 64, "heads": 2, "latent_height": 1}  # heads of 32: the least that the graphs take
    changed["sampler"]["steps"] = [1000.0]
    return load_world(str(random_world.write(tmp_path_factory.mktemp("world") / "random", changed)), "cpu")


def runtime(world: World, attention: AttentionConfig) -> runner.EngineRuntime:
    plan = runner.plan_for(world, attention, torch.float32)
    executors = {graph: EagerExecutor(plan, world.dit, graph) for graph in plan.graphs}
    return runner.EngineRuntime(world, cache_shape(world), attention, executors)


def both(world: World, attention: AttentionConfig) -> tuple[StreamEngine, StreamEngine]:
    """By kernels, and by graphs."""
    mine = FlatRuntime(world, cache_shape(world)), runtime(world, attention)
    return tuple(StreamEngine(world, attention, runtime=each) for each in mine)


def advance(engines: tuple[StreamEngine, ...], *streams: int, action: str = "", bytes: bool = True) -> None:
    """bytes: of the caches are compared, too."""
    requests = [ChunkRequest(stream, (action,)) for stream in streams]
    for a, b in zip(*(engine.step(requests) for engine in engines), strict=True):
        assert isinstance(a, Chunk), a
        assert isinstance(b, Chunk), b
        error = np.abs(a.frames.astype(int) - b.frames)
        assert error.mean() < 0.05, error.mean()
        for name in STATS if bytes else STATS[:-1]:
            assert getattr(a.stats, name) == pytest.approx(getattr(b.stats, name), rel=1e-4), name


def test_graphs_make_the_frames_that_kernels_make(world):
    """Through merging: the start fills the ring."""
    pair = both(world, DENSE)
    for engine in pair:
        engine.open(1, "a dark maze", StreamOptions(seed=1))
    for action in ("forward", "turn_left", "attack+forward"):
        advance(pair, 1, action=action)
    theirs, mine = (engine.streams[1].caches for engine in pair)
    assert mine.merged > 0
    for name in FlatCaches.TENSORS:
        assert torch.allclose(getattr(mine, name).float(), getattr(theirs, name).float(), atol=1e-3), name


@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_make_the_frames_of_the_portable_path(world, name):
    """Until something is merged."""
    attention = CONFIGS[name]
    pair = StreamEngine(world, attention), StreamEngine(world, attention, runtime=runtime(world, attention))
    for engine in pair:
        engine.open(1, "a dark maze", StreamOptions(seed=1, start="nothing"))
    for action in ("forward", "turn_left", "")[: 2 if name == "sinks" else 3]:
        advance(pair, 1, action=action, bytes=False)


def frames(engine: StreamEngine, *streams: int, action: str = "forward") -> list[np.ndarray]:
    results = engine.step([ChunkRequest(stream, (action,)) for stream in streams])
    assert all(isinstance(result, Chunk) for result in results), results
    return [result.frames for result in results]


def test_streams_keep_apart(world):
    """Two at a time are as each alone; a fork, and a snapshot restored, go on as their source; each has its memory."""
    engine, alone = (StreamEngine(world, DENSE, runtime=runtime(world, DENSE)) for _ in range(2))
    for stream in (1, 2):
        engine.open(stream, "a dark maze", StreamOptions(seed=stream))
    alone.open(1, "a dark maze", StreamOptions(seed=1))
    for _ in range(3):
        first, _ = frames(engine, 1, 2)
        assert np.array_equal(first, frames(alone, 1)[0])
    engine.close(2)
    engine.control(1, "prompt", "a round arena with two towers", blend_chunks=2)
    engine.fork(1, 3)
    engine.restore(4, Snapshot.from_bytes(engine.snapshot(1).to_bytes()))
    frames(engine, 3)  # ahead of the others: they must not notice
    one, four = frames(engine, 1, 4)
    assert np.array_equal(one, four)
    again, three = frames(engine, 1)[0], frames(engine, 3)[0]
    assert np.array_equal(again, three)
    assert not np.array_equal(again, one)
    assert len({engine.streams[number].caches.keys.data_ptr() for number in (1, 3, 4)}) == 3


def test_sparse_passes_are_counted_as_kernels_count_them(world):
    """Which blocks are chosen differs (a graph chooses anew in every pass), how many does not; and a pass that kernels
    choose for anew is the same pass."""
    pair = both(world, SPARSE)
    for engine in pair:
        engine.open(1, "a dark maze", StreamOptions(seed=1))
    for _ in range(2):
        (a,), (b,) = (engine.step([ChunkRequest(1, ("forward",))]) for engine in pair)
        assert b.stats.density == pytest.approx(a.stats.density, rel=1e-6)
    flat, graphs = (engine.streams[1] for engine in pair)
    with torch.inference_mode():
        x, actions, outs = torch.randn(1, *pair[0].latent_shape), torch.zeros(1, 2, 3), []
        for name in FlatCaches.TENSORS:
            getattr(graphs.caches, name).copy_(getattr(flat.caches, name))
        for engine, stream in zip(pair, (flat, graphs), strict=True):
            stream.begin_caches()
            outs.append(engine._forward([stream], x, 0.7, actions, progress=0.5, write=False))
    assert torch.allclose(*outs, atol=1e-4), (outs[0] - outs[1]).abs().max()


def test_a_warm_up_runs_the_graphs(world):
    engine = StreamEngine(world, DENSE, max_streams=2, runtime=runtime(world, DENSE))
    assert set(costs(engine, [1, 2], steps=1)) == {1, 2}
    assert all(engine.runtime.executors[name].runs for name in ("denoise", "write", "begin", "update"))


def test_what_an_engine_was_not_built_for_is_refused_by_name(world):
    engine = StreamEngine(world, DENSE, runtime=runtime(world, DENSE))
    engine.open(1, "a maze")
    with pytest.raises(InvalidInput, match=r"attention\.budget_frames: got 8; allowed: 6, for which the engine"):
        engine.open(2, "a maze", StreamOptions(attention=DENSE.model_copy(update={"budget_frames": 8})))
    with pytest.raises(InvalidInput, match=r"OPTIONS\.measure_recall: got true; allowed: false where runtime"):
        engine.open(2, "a maze", StreamOptions(measure_recall=True))
    with pytest.raises(InvalidInput, match=r"CONTROL\.sparse_density: got 0\.5; allowed: 1\.0"):
        engine.control(1, "density", 0.5)
    with pytest.raises(InvalidInput, match=r"attention\.kind: got window; allowed: fastar"):
        StreamEngine(world, CONFIGS["window"], runtime=runtime(world, DENSE))
    with pytest.raises(InvalidInput, match=r"attention\.guard: got observe; allowed: off"):
        runtime(world, DENSE.model_copy(update={"guard": "observe", "sparse_density": 0.5}))
    with pytest.raises(InvalidInput, match=r"attention\.select_text: got True; allowed: False where TensorRT"):
        runtime(world, DENSE.model_copy(update={"select_text": True}))
    with pytest.raises(InvalidInput, match="engine_dir: has no begin; allowed"):
        runner.EngineRuntime(world, cache_shape(world), DENSE, {"denoise": None, "write": None, "update": None})


# Without TensorRT, or without a GPU


def test_without_tensorrt_the_setting_is_named(world, monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "MODULES", ("no_such_tensorrt",))
    execution = ExecutionConfig(runtime="tensorrt", engine_dir=tmp_path)
    with pytest.raises(InvalidInput, match="runtime: tensorrt, and TensorRT is not installed here .*no_such_tensorrt"):
        make_runtime(world, cache_shape(world), DENSE, execution)
    monkeypatch.setattr(runtime_module, "RUNNER", "plugins.no_such_runner")
    with pytest.raises(InvalidInput, match=r"runtime: tensorrt needs the module plugins\.no_such_runner, which is not"):
        make_runtime(world, cache_shape(world), DENSE, execution)


def test_a_world_is_loaded_in_its_engines_type(world, tiny_world, monkeypatch, tmp_path):
    """Before anything else is asked of the engine."""
    place = engines.Place("tensorrt", "10", "a GPU", "9.0")
    engines.write(tmp_path, place, "qdp", world, DENSE, "bf16", {}, [])
    seen = []

    def load(world, shape, attention, folder):
        seen.append((shape.dtype, folder))
        return TorchRuntime(world, shape)

    monkeypatch.setattr(engines, "tensorrt", lambda field: types.ModuleType("tensorrt"))
    monkeypatch.setattr(runner, "load", load)
    execution = ExecutionConfig(runtime="tensorrt", engine_dir=tmp_path)
    engine = StreamEngine.load(str(tiny_world), attention=DENSE, execution=execution)
    assert seen == [(torch.bfloat16, tmp_path)]
    assert engine.dtype == torch.bfloat16
    (tmp_path / engines.METADATA).write_text("{}")
    with pytest.raises(InvalidInput, match="engine_dir: "):
        StreamEngine.load(str(tiny_world), attention=DENSE, execution=execution)


def test_an_engine_needs_a_gpu(world, monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "tensorrt", lambda field: types.ModuleType("tensorrt"))
    with pytest.raises(InvalidInput, match="device: got cpu; allowed: cuda where runtime is tensorrt"):
        runner.load(world, cache_shape(world), DENSE, tmp_path)


class Context:
    """An IExecutionContext that remembers what it was told."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] < 9

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.runs += 1
        return stream == 77


class Engine:
    def __init__(self) -> None:
        self.made: list[Context] = []

    def create_execution_context(self) -> Context:
        self.made.append(Context())
        return self.made[-1]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 2), (2, 2), (8, 2)]


def test_tensorrt_is_handed_the_caches_memory(world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=77))
    plan = step.plan(world.config, DENSE, torch.float32)
    bindings, engine = step.bindings(plan, "update"), Engine()
    executor = runner.TensorRTExecutor(engine, bindings, "update")
    tensors = {b.name: torch.zeros(b.size(G=4), dtype=b.type(torch.float32)) for b in bindings if not b.alias}
    executor.run(tensors)
    executor.run(tensors)
    (context,) = engine.made
    assert context.runs == 2
    assert context.shapes == {b.name: tuple(tensors[b.name].shape) for b in bindings if not b.output}
    for binding in bindings:
        there = context.addresses[binding.name] == tensors[binding.alias or binding.name].data_ptr()
        assert there != binding.copied, binding.name
    with pytest.raises(FastarError, match=r"update\.keys has shape \[9, .*allowed: \[1, 2\] to \[8, 2\]"):
        executor.run({b.name: torch.zeros(b.size(G=9), dtype=b.type(torch.float32)) for b in bindings if not b.alias})
    with pytest.raises(ValueError, match="update: keys is not contiguous"):
        executor.run(tensors | {"keys": tensors["keys"].transpose(0, 1)})


@pytest.mark.parametrize("merging", [False, True])
def test_the_embedded_world(doom_world, merging):
    """Against PyTorch's portable path: equal before anything is merged, close after."""
    attention = AttentionConfig(budget_frames=6, recent_frames=4)
    torch_engine = StreamEngine(doom_world, attention)
    graphs = StreamEngine(doom_world, attention, runtime=runtime(doom_world, attention))
    start = "auto" if merging else "nothing"
    for engine in (torch_engine, graphs):
        engine.open(1, "a corridor with torches", StreamOptions(seed=3, start=start))
    for _ in range(2):
        (a,), (b,) = (engine.step([ChunkRequest(1, ("forward",))]) for engine in (torch_engine, graphs))
        error = np.abs(a.frames.astype(int) - b.frames)
        assert error.max() <= (8 if merging else 1)
        assert error.mean() < (0.5 if merging else 1e-3)
        assert b.stats.density == pytest.approx(a.stats.density)
        assert b.stats.cache_tokens == pytest.approx(a.stats.cache_tokens)
    assert (graphs.streams[1].caches.merged > 0) == merging


@pytest.mark.slow  # the export of all its layers takes half a minute, a chunk some seconds
def test_the_embedded_world_from_its_onnx_files(doom_world, tmp_path):
    """A rollout of 14 chunks: graphs as files, run by an evaluator, against the modules they were made of."""
    pytest.importorskip("onnxruntime", reason="extra trt-test")
    from plugins.evaluator import Evaluator
    from plugins.export import export

    attention = AttentionConfig(budget_frames=6, recent_frames=4)
    eager = runtime(doom_world, attention)
    files = export(doom_world, attention, tmp_path, list(eager.executors), "fp32")
    graphs = {graph: Evaluator(path) for graph, path in files.items() if graph != "prompt"}
    from_files = runner.EngineRuntime(doom_world, cache_shape(doom_world), attention, graphs)
    pair = tuple(StreamEngine(doom_world, attention, runtime=each) for each in (eager, from_files))
    for engine in pair:
        engine.open(1, "a corridor with torches", StreamOptions(seed=3, start="nothing"))
    for chunk in range(14):
        advance(pair, 1, action="forward" if chunk % 3 else "turn_left")
    assert pair[1].streams[1].caches.merged > 0
