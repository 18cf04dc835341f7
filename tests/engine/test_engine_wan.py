"""A world of the Wan2.1 family, loaded from its files, through the engine: its decoder remembers, its first chunk is
shorter, it has neither buttons nor starts."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny_wan
import torch
from torch import Tensor

from fastar_backend.attention import bytes_of_caches, make_caches
from fastar_backend.config import AttentionConfig, ExecutionConfig
from fastar_backend.engine import checks
from fastar_backend.engine import engine as module
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.snapshot import Snapshot
from fastar_backend.engine.stream import Chunk, ChunkRequest, StreamOptions
from fastar_backend.errors import InvalidInput
from fastar_backend.model.fp8 import Fp8Linear

FASTAR = AttentionConfig(budget_frames=7, recent_frames=3, sink_frames=1)
KINDS = {
    "fastar": FASTAR,
    "window": AttentionConfig(kind="window", budget_frames=6, sink_frames=3),
    "dense": AttentionConfig(kind="dense"),
    "paper": AttentionConfig.paper_recipe(6, 3),
}
PROMPT, OTHER = "a maze of metal rooms", "a dark grey hall"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Read-only."""
    return {kind: tiny_wan.write(tmp_path_factory.mktemp("wan") / kind, kind) for kind in ("wan", "taehv")}


@pytest.fixture(params=["wan", "taehv"])
def folder(request, folders) -> Path:
    return folders[request.param]


def load(folder: Path, **more) -> StreamEngine:
    return StreamEngine.load(str(folder), "cpu", FASTAR, **more)


def step(engine: StreamEngine, *streams: int, prompt: str | None = None) -> list[Chunk]:
    chunks = engine.step([ChunkRequest(stream, ("",), prompt) for stream in streams])
    assert all(isinstance(chunk, Chunk) for chunk in chunks), chunks
    return chunks


def frames(engine: StreamEngine, stream: int, count: int) -> np.ndarray:
    return np.concatenate([step(engine, stream)[0].frames for _ in range(count)])


def held(thing: object, seen: set[int] | None = None) -> dict[int, int]:
    """Address -> bytes of every tensor's memory that is reachable through attributes, lists and dictionaries."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return {}
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return {thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()}
    if isinstance(thing, dict):
        inner = list(thing.values())
    elif isinstance(thing, list | tuple):
        inner = list(thing)
    elif type(thing).__module__.startswith("fastar_backend"):
        inner = list(vars(thing).values())
    else:
        return {}
    return {address: size for each in inner for address, size in held(each, seen).items()}


def test_the_first_chunk_has_nine_frames_and_the_others_twelve(folder):
    engine = load(folder)
    assert engine.world_info()["chunk_frames"] == 12
    engine.open(1, PROMPT)
    first = 0
    for number, count in enumerate((9, 12, 12)):
        (chunk,) = step(engine, 1)
        assert chunk.frames.shape == (count, 32, 48, 3)
        assert chunk.frames.dtype == np.uint8
        assert chunk.frames.std() > 5, "something to see"
        assert (chunk.stats.chunk, chunk.stats.first_frame, chunk.stats.frames) == (number, first, count)
        first += count


def test_only_no_action(folder):
    engine = load(folder)
    engine.open(1, PROMPT)
    (error,) = engine.step([ChunkRequest(1, ("forward",))])
    assert str(error).startswith("ACTIONS[0]: unknown button 'forward'; allowed: \"\" alone")
    step(engine, 1)
    (chunk,) = engine.step([ChunkRequest(1, ("", "", ""))])
    assert chunk.stats.chunk == 1


def test_prompts_and_seeds_matter_and_repeat(folder):
    """Stream 2 gets another prompt at its second chunk; 3 has another seed; 4 is 1 again."""
    engine = load(folder, deterministic=True)
    for stream, seed in ((1, 7), (2, 7), (3, 8), (4, 7)):
        engine.open(stream, PROMPT, StreamOptions(seed=seed))
    first = [chunk.frames for chunk in step(engine, 1, 2, 3, 4)]
    assert np.array_equal(first[0], first[1])
    assert np.array_equal(first[0], first[3])
    assert not np.array_equal(first[0], first[2])
    (changed,) = step(engine, 2, prompt=OTHER)
    assert changed.stats.prompt_applied
    after = [changed.frames, *(chunk.frames for chunk in step(engine, 1, 4))]
    assert np.array_equal(after[1], after[2])
    assert not np.array_equal(after[0], after[1])


def test_the_decoder_remembers(folder):
    """A stream whose decoder forgets the first chunk shows other frames of the same latents."""
    engine = load(folder, deterministic=True)
    for stream in (1, 2):
        engine.open(stream, PROMPT, StreamOptions(seed=4))
    step(engine, 1, 2)
    assert engine.streams[1].decoded
    engine.streams[2].decoded = {name: torch.zeros_like(value) for name, value in engine.streams[2].decoded.items()}
    right, wrong = step(engine, 1, 2)
    assert not np.array_equal(right.frames, wrong.frames)


@pytest.mark.parametrize(("decoder", "kind"), [("wan", "fastar"), *(("taehv", kind) for kind in KINDS)])
@pytest.mark.parametrize("before", [0, 4])
def test_a_snapshot_goes_on_in_another_engine_to_the_bit(folders, decoder, kind, before):
    engine, other = (load(folders[decoder]) for _ in range(2))
    engine.open(1, PROMPT, StreamOptions(seed=3, attention=KINDS[kind]))
    if before:
        frames(engine, 1, before)
    data = engine.snapshot(1).to_bytes()
    want = frames(engine, 1, 2)
    other.restore(5, Snapshot.from_bytes(data))
    assert np.array_equal(frames(other, 5, 2), want)
    assert len(want) == (24 if before else 21)


def test_forks_part(folder):
    engine = load(folder)
    engine.open(1, PROMPT, StreamOptions(seed=3))
    frames(engine, 1, 3)
    engine.fork(1, 2)
    engine.fork(1, 3, seed=99)
    want = frames(engine, 1, 2)
    assert np.array_equal(frames(engine, 2, 2), want)
    assert not np.array_equal(frames(engine, 3, 2), want)


def test_two_streams_in_a_batch_are_as_two_alone(folder):
    """To two steps of a pixel's 255: sums are rounded otherwise. One is three chunks further."""
    alone, together = load(folder), load(folder)
    for engine in (alone, together):
        engine.open(1, PROMPT, StreamOptions(seed=1))
        frames(engine, 1, 3)
        engine.open(2, OTHER, StreamOptions(seed=2))
    for count in (9, 12):
        batch = step(together, 1, 2)
        for chunk in batch:
            (solo,) = step(alone, chunk.stream_id)
            assert np.abs(chunk.frames.astype(int) - solo.frames).max() <= 2
        assert [len(chunk.frames) for chunk in batch] == [12, count]


@pytest.mark.parametrize("kind", ["fastar", "window", "paper"])
def test_the_promised_bytes_are_what_a_stream_holds(folder, kind):
    """But for what lives during a chunk: a logit bias per key, and reports; both are small beside real keys."""
    engine, options = load(folder), StreamOptions(attention=KINDS[kind])
    engine.open(1, PROMPT, options)
    for _ in range(5):
        step(engine, 1)
        stream = engine.streams[1]
        found = held([stream.caches, stream.decoded])
        assert sum(found.values()) <= 1.05 * engine.bytes_of(options)
        assert stream.cache_bytes == engine.bytes_of(options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_caches_are_those_of_fresh_caches(folders, kind, dtype):
    shape = dataclasses.replace(load(folders["wan"]).shape, dtype=dtype)
    caches = make_caches(shape, KINDS[kind], layers=3)
    assert bytes_of_caches(shape, KINDS[kind], 3) == caches.nbytes
    found = held(caches)
    assert 0.9 * caches.nbytes < sum(found.values()) <= caches.nbytes + 1024
    assert bytes_of_caches(shape, KINDS[kind], 6) == 2 * caches.nbytes


def test_a_stream_runs_on_beyond_any_trained_length(folders):
    """Sixty chunks are 180 latent frames: ten times what Wan's positions were trained on."""
    engine = load(folders["taehv"])
    engine.open(1, PROMPT)
    step(engine, 1)
    steady = sum(held([engine.streams[1].caches, engine.streams[1].decoded]).values())
    seen = []
    for number in range(1, 64):
        (chunk,) = step(engine, 1)  # a result that is not finite is an error
        assert len(chunk.frames) == 12
        assert chunk.stats.cache_bytes == engine.bytes_of(StreamOptions())
        seen.append(chunk.frames.std())
        if number % 20 == 0:
            assert sum(held([engine.streams[1].caches, engine.streams[1].decoded]).values()) <= 1.05 * steady
    assert engine.streams[1].latent_frame == 192
    assert min(seen) > 5
    assert chunk.stats.cache_tokens == 7 * engine.shape.frame_tokens
    assert chunk.stats.density < 0.1


def test_in_bfloat16_and_fp8(folders):
    """It runs, as finite as ever, and near."""
    first = []
    for dtype, precision in ((torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.float32, "fp8")):
        engine = load(folders["wan"], dtype=dtype, execution=ExecutionConfig(precision=precision))
        assert engine.dtype == dtype
        assert isinstance(engine.world.dit.blocks[1].ffn[2], Fp8Linear) == (precision == "fp8")
        engine.open(1, PROMPT)
        first.append(frames(engine, 1, 2).astype(float))
    for other in first[1:]:
        assert 0 < np.abs(other - first[0]).mean() < 0.3 * first[0].std()


# Checks at load time


def test_no_gpu(folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "load_world", None)  # is not reached
    with pytest.raises(InvalidInput, match="^device: got cuda, and PyTorch sees no GPU; allowed: cpu, or auto"):
        StreamEngine.load(str(folders["wan"]), "cuda")


@pytest.mark.parametrize("kind", ["fastar", "window"])
def test_a_budget_below_a_chunk(folders, kind):
    small = AttentionConfig(kind=kind, budget_frames=2, recent_frames=2)
    with pytest.raises(InvalidInput, match="^attention.budget_frames: got 2; allowed: at least 3, a chunk's"):
        StreamEngine.load(str(folders["wan"]), "cpu", small)
    StreamEngine.load(str(folders["wan"]), "cpu", AttentionConfig(kind=kind, budget_frames=3, recent_frames=3))


def test_memory_that_holds_no_stream(folders, monkeypatch):
    engine = load(folders["wan"])
    for budget in (4, 6):
        fits = engine.bytes_of(StreamOptions(attention=FASTAR.model_copy(update={"budget_frames": budget})))
        monkeypatch.setattr(checks, "free_bytes", lambda device, fits=fits: fits)
        with pytest.raises(InvalidInput, match=rf"^attention.budget_frames: 7 take .*; allowed: at most {budget}$"):
            load(folders["wan"])
    monkeypatch.setattr(checks, "free_bytes", lambda device: 1000)
    for attention in (FASTAR, KINDS["dense"]):
        with pytest.raises(InvalidInput, match="1000 are free on cpu; allowed: more free memory$"):
            StreamEngine.load(str(folders["wan"]), "cpu", attention)


def test_memory_that_holds_some_streams(folders, monkeypatch, caplog):
    one = load(folders["wan"]).bytes_of(StreamOptions())
    monkeypatch.setattr(checks, "free_bytes", lambda device: 3 * one + one // 2)
    with caplog.at_level(logging.WARNING):
        load(folders["wan"], max_streams=3)
        assert not caplog.records
        load(folders["wan"], max_streams=8)
    assert [record.message.split(":")[:2] for record in caplog.records] == [["streams", " 3 of 8 fit"]]


def test_free_bytes():
    assert 1 << 20 < checks.free_bytes(torch.device("cpu")) < 1 << 50
