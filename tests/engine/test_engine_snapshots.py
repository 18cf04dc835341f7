"""Snapshots, forks and controls: the same frames afterwards, to the bit; nothing torn or foreign gets in."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.snapshot import VERSION, Snapshot
from fastar_backend.engine.stream import ChunkRequest, StreamOptions
from fastar_backend.errors import InvalidInput, SnapshotError, UnknownStream

SMALL = AttentionConfig(budget_frames=6, recent_frames=3)
KINDS = {
    "fastar": SMALL,
    "window": AttentionConfig(kind="window", budget_frames=4, sink_frames=1),
    "dense": AttentionConfig(kind="dense"),
    "paper": AttentionConfig.paper_recipe(6, 2),
}


@pytest.fixture
def engine(world) -> StreamEngine:
    return StreamEngine(world, SMALL, max_streams=40, deterministic=True)


def chunks(engine, stream, count, actions=("forward", "", "turn_left")) -> np.ndarray:
    """frames of `count` chunks, [frames, height, width, 3]."""
    result = []
    for index in range(count):
        (chunk,) = engine.step([ChunkRequest(stream, (actions[index % len(actions)],))])
        result.append(chunk.frames)
    return np.concatenate(result)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 1, 9])
def test_a_restored_stream_goes_on_to_the_bit(engine, kind, before):
    engine.open(1, "a dark maze", StreamOptions(seed=3, attention=KINDS[kind]))
    if before:
        chunks(engine, 1, before)
    data = engine.snapshot(1, {"mine": [1, None]}).to_bytes()
    expected = chunks(engine, 1, 4)
    snapshot = Snapshot.from_bytes(data)
    assert (snapshot.chunk, snapshot.extra) == (before, {"mine": [1, None]})
    engine.restore(2, snapshot)
    assert np.array_equal(chunks(engine, 2, 4), expected)
    engine.restore(3, snapshot)
    assert np.array_equal(chunks(engine, 3, 4), expected), "a snapshot may be used again"


def test_in_another_process(engine, tiny_world, tmp_path):
    engine.open(1, "a dark maze", StreamOptions(seed=3))
    chunks(engine, 1, 5)
    (tmp_path / "snapshot").write_bytes(engine.snapshot(1).to_bytes())
    expected = chunks(engine, 1, 3)
    code = f"""
import sys, numpy as np, torch
torch.set_num_threads(1)
from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.snapshot import Snapshot
from fastar_backend.engine.stream import ChunkRequest
engine = StreamEngine.load({str(tiny_world)!r}, deterministic=True)
engine.restore(7, Snapshot.from_bytes(open({str(tmp_path / "snapshot")!r}, "rb").read()))
frames = [engine.step([ChunkRequest(7, (a,))])[0].frames for a in ("forward", "", "turn_left")]
np.save({str(tmp_path / "frames.npy")!r}, np.concatenate(frames))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert np.array_equal(np.load(tmp_path / "frames.npy"), expected)


def test_a_snapshot_is_not_touched_by_what_follows(engine):
    engine.open(1, "a dark maze", StreamOptions(seed=3))
    chunks(engine, 1, 6)
    snapshot = engine.snapshot(1)
    before = snapshot.to_bytes()
    chunks(engine, 1, 3)
    assert snapshot.to_bytes() == before


def test_forks_share_memory_until_one_goes_on(engine):
    engine.open(1, "a dark maze", StreamOptions(seed=3))
    engine.open(9, "a dark maze", StreamOptions(seed=3))
    for stream in (1, 9):
        chunks(engine, stream, 6)
    engine.fork(1, 2)
    engine.fork(2, 3)
    caches = [engine.streams[stream].caches[0] for stream in (1, 2, 3)]
    assert len({cache.keys.data_ptr() for cache in caches}) == 1
    expected = chunks(engine, 9, 4)
    assert np.array_equal(chunks(engine, 2, 4), expected)
    assert caches[1].keys.data_ptr() != caches[0].keys.data_ptr() == caches[2].keys.data_ptr()
    engine.close(2)
    assert np.array_equal(chunks(engine, 3, 4), expected)
    assert np.array_equal(chunks(engine, 1, 4), expected)
    engine.fork(1, 4, seed=99)
    assert not np.array_equal(chunks(engine, 4, 2), chunks(engine, 1, 2))


def test_torn_snapshots_are_refused(engine):
    engine.open(1, "a dark maze")
    chunks(engine, 1, 3)
    data = engine.snapshot(1).to_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(SnapshotError, match=r"torn \(\d+ bytes, its .*\); allowed: an earlier one"):
            Snapshot.from_bytes(data[:cut])
    for place in rng.integers(8, len(data), 60):
        torn = bytearray(data)
        torn[place] ^= 0x10
        if data[place : place + 1] in b" \t":  # white space of the JSON means nothing
            continue
        with pytest.raises(SnapshotError):
            Snapshot.from_bytes(bytes(torn))
    with pytest.raises(SnapshotError):
        Snapshot.from_bytes(rng.bytes(1000))


def test_foreign_snapshots_are_refused(engine, doom_world):
    engine.open(1, "a dark maze")
    chunks(engine, 1, 2)
    snapshot = engine.snapshot(1)
    with pytest.raises(SnapshotError, match="of another world .'random'.; allowed: those of 'doom'"):
        StreamEngine(doom_world, SMALL).restore(1, snapshot)
    other = Snapshot(snapshot.header | {"version": VERSION + 1}, snapshot.tensors).to_bytes()
    with pytest.raises(SnapshotError, match=f"has version {VERSION + 1}; allowed: version {VERSION}, of this release"):
        Snapshot.from_bytes(other)
    bent = json.loads(json.dumps(snapshot.header))
    bent["stream"]["caches"][0]["times"] = list(range(999))
    with pytest.raises(SnapshotError, match="does not fit"):
        engine.restore(5, Snapshot(bent, snapshot.tensors))
    assert engine.stream_ids == (1,)


def test_streams_that_measure_recall_have_no_snapshot(engine):
    engine.open(1, "a dark maze", StreamOptions(measure_recall=True))
    with pytest.raises(InvalidInput, match="measures recall"):
        engine.snapshot(1)
    with pytest.raises(UnknownStream):
        engine.snapshot(2)


def test_no_prompt_text_in_a_snapshot(engine):
    engine.open(1, "a dark maze with xylophones")
    engine.control(1, "prompt", "round xylophones", blend_chunks=3)
    chunks(engine, 1, 2)
    assert b"xylophone" not in engine.snapshot(1).to_bytes()


def test_a_blended_prompt_arrives_in_so_many_chunks(engine):
    for stream, blend in ((1, 0), (2, 3)):
        engine.open(stream, "a dark maze", StreamOptions(seed=1))
        engine.control(stream, "prompt", "a round arena", blend)
    new = engine.world.text(["a round arena"])[0]
    for index in range(3):
        chunks(engine, 1, 1)
        chunks(engine, 2, 1)
        assert torch.equal(engine.streams[1].prompt, new)
        assert torch.equal(engine.streams[2].prompt, new) == (index == 2)
    half = engine.streams[2].origin
    assert torch.equal(half, engine.world.text(["a dark maze"])[0])


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("prompt", "", "CONTROL.prompt: it is empty"),
        ("prompt", 3, "CONTROL.prompt: got int"),
        ("density", 0, "CONTROL.density: got 0; allowed: more than 0, at most 1"),
        ("density", True, "CONTROL.density: got True"),
        ("seed", -1, "CONTROL.seed: got -1"),
        ("speed", 1, "CONTROL: got 'speed'; allowed: prompt, density, seed"),
    ],
)
def test_wrong_controls_change_nothing(engine, kind, value, said):
    engine.open(1, "a dark maze", StreamOptions(seed=1))
    engine.open(2, "a dark maze", StreamOptions(seed=1))
    with pytest.raises(InvalidInput, match=said.replace(".", r"\.")):
        engine.control(1, kind, value)
    assert np.array_equal(chunks(engine, 1, 2), chunks(engine, 2, 2))


def test_density_is_each_streams_own(engine):
    for stream in (1, 2):
        engine.open(stream, "a dark maze", StreamOptions(seed=1))
        chunks(engine, stream, 6)
    engine.control(1, "density", 0.3)
    sparse, full = (engine.step([ChunkRequest(stream, ("",))])[0].stats.density for stream in (1, 2))
    assert sparse < full
    engine.restore(3, Snapshot.from_bytes(engine.snapshot(1).to_bytes()))
    assert np.array_equal(chunks(engine, 3, 2), chunks(engine, 1, 2))
    engine.open(4, "a dark maze", StreamOptions(attention=KINDS["window"]))
    with pytest.raises(InvalidInput, match="attention is window; allowed: fastar"):
        engine.control(4, "density", 0.5)


@pytest.mark.parametrize("kind", ["fastar", "window", "paper"])
def test_the_promised_bytes_are_what_it_takes(engine, kind):
    options = StreamOptions(attention=KINDS[kind])
    engine.open(1, "a dark maze", options)
    assert engine.streams[1].cache_bytes == engine.bytes_of(options)
    chunks(engine, 1, 12)
    assert engine.streams[1].cache_bytes == engine.bytes_of(options)


def test_growing_streams_book_the_whole_limit(engine):
    assert engine.bytes_of(StreamOptions(attention=KINDS["dense"])) == engine.stream_bytes
    assert engine.bytes_of(StreamOptions(measure_recall=True)) == engine.stream_bytes
