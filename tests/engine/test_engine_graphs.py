"""Recorded chunks are the chunks: by CUDA graphs on a GPU; on a CPU by a recorder that does as they do, with the
kernels in Triton's interpreter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import random_world
import torch
from rerun import Recorder
from torch import Tensor

from fastar_backend.attention import TextCache, guard
from fastar_backend.attention.flat_cache import FlatCaches
from fastar_backend.config import AttentionConfig
from fastar_backend.engine import runtime as runtime_module
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.graphs import CudaRecorder
from fastar_backend.engine.snapshot import Snapshot
from fastar_backend.engine.stream import Chunk, ChunkRequest, StreamOptions
from fastar_backend.model.world import World, load_world

CUDA = torch.cuda.is_available()
FASTAR = AttentionConfig(budget_frames=6, recent_frames=4, merge_threshold=0.5, dense_steps=0.0)
RING = 3  # chunks: the newest 4 latent frames and the chunk's own 2
SHORT = FASTAR.model_copy(update={"budget_frames": 4, "recent_frames": 2})  # a ring of SHORT_RING chunks
SHORT_RING = 2


class CudaRecording(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.real = CudaRecorder()

    def record(self, act: Callable[[], tuple[Tensor, ...]]):
        self.count += 1
        return self.real.record(act)


class KernelText(TextCache):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        if self.groups is None:
            self.use_kernel()


def make_world(folder: Path, layers: int) -> World:
    changed = copy.deepcopy(random_world.CONFIG)
    heads = {"dim": 32, "heads": 1}  # of 32: what the kernels take
    changed["model"] |= heads | {"layers": layers, "latent_height": 2, "latent_width": 4}
    changed["sampler"]["steps"] = [1000.0]
    random_world.write(folder, changed)
    return load_world(str(folder), "cuda" if CUDA else "cpu", torch.bfloat16 if CUDA else torch.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world") / "random", layers=2)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory) -> World:
    """For what is the same in every layer."""
    return make_world(tmp_path_factory.mktemp("world") / "small", layers=1)


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch):
    if not CUDA:  # there, the portable caches would be taken
        make = lambda shape, attention, layers, portable=False: FlatCaches(shape, attention, layers)  # noqa: E731
        monkeypatch.setattr(runtime_module, "make_caches", make)
        monkeypatch.setattr(runtime_module, "TextCache", KernelText)


def engines(world, attention: AttentionConfig = FASTAR) -> tuple[StreamEngine, StreamEngine, Recorder]:
    """One that computes every chunk, one that replays."""
    recorder = CudaRecording() if CUDA else Recorder()
    plain, recorded = (StreamEngine(world, attention, recorder=own) for own in (None, recorder))
    recorder.engine = recorded
    return plain, recorded, recorder


def same(a: Chunk, b: Chunk) -> None:
    assert isinstance(a, Chunk), a
    assert isinstance(b, Chunk), b
    error = np.abs(a.frames.astype(int) - b.frames)
    assert error.mean() < (0.5 if CUDA else 1e-3), error.mean()
    for name in ("chunk", "first_frame", "density", "cache_tokens", "merged_tokens", "text_tokens"):
        assert getattr(a.stats, name) == pytest.approx(getattr(b.stats, name), rel=1e-3), name


ACTIONS = ["forward", "turn_left", "", "attack+forward"]


def advance(plain: StreamEngine, recorded: StreamEngine, *streams: int, action: str = "") -> None:
    requests = [ChunkRequest(stream, (action,)) for stream in streams]
    for a, b in zip(plain.step(requests), recorded.step(requests), strict=True):
        same(a, b)


def test_recorded_chunks_are_the_chunks(world):
    plain, recorded, recorder = engines(world, FASTAR.model_copy(update={"select_text": True}))
    for engine in (plain, recorded):
        engine.open(1, "a dark maze", StreamOptions(seed=1))
    counts = []
    for chunk in range(3 * RING):
        advance(plain, recorded, 1, action=ACTIONS[chunk % 4])
        counts.append(recorder.count)
    full = next(index for index, count in enumerate(counts) if count)
    assert RING < full <= 2 * RING, "the first chunk at each place is computed"
    assert counts[-1] == counts[full + RING - 1] == RING, "one at each place of the ring, ever"


def test_what_changes_between_chunks(small_world):
    """The prompt, all at once and blended; another stream's fork; a snapshot: none records anew."""
    plain, recorded, recorder = engines(small_world, SHORT)
    both = (plain, recorded)
    for engine in both:
        engine.open(1, "a dark maze", StreamOptions(seed=3))
    for _ in range(2 * SHORT_RING):
        advance(plain, recorded, 1)
    assert recorder.count == SHORT_RING
    for engine in both:
        engine.control(1, "prompt", "a round arena", blend_chunks=2)
    for _ in range(3):
        advance(plain, recorded, 1)
    for engine in both:
        engine.fork(1, 2, seed=5)
        engine.control(1, "prompt", "maze", 0)
    advance(plain, recorded, 1, 2)
    advance(plain, recorded, 2)
    advance(plain, recorded, 1)
    assert recorder.count == SHORT_RING, "neither the prompt nor a fork's first chunks are a reason to record anew"
    taken = [Snapshot.from_bytes(engine.snapshot(2).to_bytes()) for engine in both]
    advance(plain, recorded, 2)
    for engine, snapshot in zip(both, taken, strict=True):
        engine.restore(3, snapshot)
    advance(plain, recorded, 3, 1)


def test_another_density_records_anew(small_world):
    plain, recorded, recorder = engines(small_world, SHORT)
    for engine in (plain, recorded):
        engine.open(1, "a dark maze", StreamOptions(seed=3))
    for _ in range(2 * SHORT_RING):
        advance(plain, recorded, 1)
    before = recorder.count
    assert before == SHORT_RING
    for engine in (plain, recorded):
        engine.control(1, "density", 0.5)
    for _ in range(2 * SHORT_RING + 1):
        advance(plain, recorded, 1, action="forward")
    assert recorder.count == before + SHORT_RING


def test_each_set_of_layers_that_is_watched_has_its_recordings(world, monkeypatch):
    """What heads and queries a recording looks at: test_attention_guard."""
    layers = world.config.model.layers
    monkeypatch.setattr(guard, "LAYERS", 1)
    plain, recorded, recorder = engines(world)
    options = StreamOptions(seed=1, attention=FASTAR.model_copy(update={"guard": "observe", "sparse_density": 0.5}))
    for engine in (plain, recorded):
        engine.open(1, "a dark maze", options)
    for _ in range(RING + 2 * math.lcm(RING, layers)):  # the start filled some: the last are replays, of other samples
        a, b = (engine.step([ChunkRequest(1, ("",))])[0] for engine in (plain, recorded))
        same(a, b)
        assert a.stats.guard_recall == pytest.approx(b.stats.guard_recall, abs=0.05 if CUDA else 1e-4)
    assert recorder.count == math.lcm(RING, layers)
