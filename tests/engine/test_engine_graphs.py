"""Recorded chunks are the chunks: by CUDA graphs on a GPU; on a CPU by a recorder that does as they do, with the
kernels in Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import random_world
import torch
from torch import Tensor

from fastar_backend.attention import TextCache
from fastar_backend.attention.flat_cache import FlatCaches
from fastar_backend.config import AttentionConfig
from fastar_backend.engine import runtime as runtime_module
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.graphs import CudaRecorder
from fastar_backend.engine.snapshot import Snapshot
from fastar_backend.engine.stream import Chunk, ChunkRequest, StreamOptions
from fastar_backend.model.world import load_world

CUDA = torch.cuda.is_available()
FASTAR = AttentionConfig(budget_frames=6, recent_frames=4, merge_threshold=0.5, dense_steps=0.0)
RING = 3  # chunks: the newest 4 latent frames and the chunk's own 2


class Rerun:
    """What a CUDA graph does, on any device: recording does no work; a replay does it on the same tensors."""

    def __init__(self, act: Callable[[], tuple[Tensor, ...]], state: list[Tensor]) -> None:
        before = [tensor.clone() for tensor in state]
        self.act, self.outputs = act, act()
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        for output in self.outputs:
            output.fill_(-1)

    def replay(self) -> None:
        for mine, fresh in zip(self.outputs, self.act(), strict=True):
            mine.copy_(fresh)


class Recorder:
    def __init__(self) -> None:
        self.engine: StreamEngine | None = None
        self.count = 0
        self.real = CudaRecorder() if CUDA else None

    def record(self, act: Callable[[], tuple[Tensor, ...]]):
        self.count += 1
        if self.real:
            return self.real.record(act)
        caches = [stream.caches for stream in self.engine.streams.values()]
        return Rerun(act, [getattr(cache, name) for cache in caches for name in FlatCaches.TENSORS])


class KernelText(TextCache):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        if self.groups is None:
            self.use_kernel()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    changed = copy.deepcopy(random_world.CONFIG)
    changed["model"] |= {"dim": 32, "heads": 1, "latent_height": 2}  # heads of 32: what the kernels take
    changed["sampler"]["steps"] = [1000.0]
    folder: Path = random_world.write(tmp_path_factory.mktemp("world") / "random", changed)
    return load_world(str(folder), "cuda" if CUDA else "cpu", torch.bfloat16 if CUDA else torch.float32)


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch):
    if not CUDA:  # there, the portable caches would be taken
        make = lambda shape, attention, layers, portable=False: FlatCaches(shape, attention, layers)  # noqa: E731
        monkeypatch.setattr(runtime_module, "make_caches", make)
        monkeypatch.setattr(runtime_module, "TextCache", KernelText)


def engines(world, attention: AttentionConfig = FASTAR) -> tuple[StreamEngine, StreamEngine, Recorder]:
    """One that computes every chunk, one that replays."""
    recorder = Recorder()
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


def test_what_changes_between_chunks(world):
    """The prompt, all at once and blended; another stream's fork; a snapshot: none records anew."""
    plain, recorded, recorder = engines(world)
    both = (plain, recorded)
    for engine in both:
        engine.open(1, "a dark maze", StreamOptions(seed=3))
    for _ in range(2 * RING + 2):
        advance(plain, recorded, 1)
    assert recorder.count == RING
    for engine in both:
        engine.control(1, "prompt", "a round arena", blend_chunks=3)
    for _ in range(4):
        advance(plain, recorded, 1)
    for engine in both:
        engine.fork(1, 2, seed=5)
        engine.control(1, "prompt", "maze", 0)
    advance(plain, recorded, 1, 2)
    advance(plain, recorded, 2)
    advance(plain, recorded, 1)
    assert recorder.count == RING, "the prompt is no reason to record anew, and the fork's chunks are computed first"
    taken = [Snapshot.from_bytes(engine.snapshot(2).to_bytes()) for engine in both]
    advance(plain, recorded, 2)
    for engine, snapshot in zip(both, taken, strict=True):
        engine.restore(3, snapshot)
    advance(plain, recorded, 3, 1)


@pytest.mark.slow  # half a minute of chunks in the interpreter
def test_another_density_records_anew(world):
    plain, recorded, recorder = engines(world)
    for engine in (plain, recorded):
        engine.open(1, "a dark maze", StreamOptions(seed=3))
    for _ in range(2 * RING + 2):
        advance(plain, recorded, 1)
    before = recorder.count
    assert before == RING
    for engine in (plain, recorded):
        engine.control(1, "density", 0.5)
    for _ in range(2 * RING + 1):
        advance(plain, recorded, 1, action="forward")
    assert recorder.count == before + RING


def test_what_is_not_recorded(world):
    plain, recorded, recorder = engines(world)
    options = StreamOptions(seed=1, attention=FASTAR.model_copy(update={"guard": "observe", "sparse_density": 0.5}))
    for engine in (plain, recorded):
        engine.open(1, "a dark maze", options)
    for _ in range(2 * RING + 2):
        advance(plain, recorded, 1)
    assert recorder.count == 0, "the guard samples something else in every chunk"
