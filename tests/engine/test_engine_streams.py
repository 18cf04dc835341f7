"""Streams of the engine: alone, interleaved and batched they are the same; what is asked happens at its chunk."""

from __future__ import annotations

import gc
import re
import weakref

import numpy as np
import pytest
import torch

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import Chunk, ChunkRequest, ChunkStats, StreamOptions
from fastar_backend.engine.warm_up import costs
from fastar_backend.errors import AtCapacity, FastarError, InvalidInput, UnknownStream
from fastar_backend.model.world import World

SMALL = AttentionConfig(budget_frames=6, recent_frames=4)
POLICIES = {
    "fastar": SMALL,
    "sparse": AttentionConfig(budget_frames=6, recent_frames=3, sparse_density=0.5, sparse_block=12),
    "lsh": AttentionConfig(budget_frames=6, recent_frames=4, index="lsh"),
    "window": AttentionConfig(kind="window", budget_frames=4),
    "dense": AttentionConfig(kind="dense"),
}
EACH_POLICY = pytest.mark.parametrize("policy", [pytest.param(POLICIES[name], id=name) for name in POLICIES])
ACTIONS = ("", "forward", "turn_left", "forward+attack")
CHUNKS = 7


@pytest.fixture
def engine(world: World) -> StreamEngine:
    return StreamEngine(world, SMALL, max_streams=4)


def ok(result: Chunk | FastarError) -> Chunk:
    assert isinstance(result, Chunk), result
    return result


def request(stream: int, chunk: int) -> ChunkRequest:
    """Different streams do different things; stream 2 changes its prompt on the way."""
    prompt = "an arena" if (stream, chunk) == (2, 3) else None
    return ChunkRequest(stream, (ACTIONS[(stream + chunk) % len(ACTIONS)],), prompt)


def open_streams(engine: StreamEngine, streams: range) -> None:
    prompts = {1: "a dark maze", 2: "a round arena", 3: "nothing known"}
    for stream in streams:
        engine.open(stream, prompts[stream], StreamOptions(seed=stream))


def frames_of(engine: StreamEngine, chunks: int = 3, start: str = "nothing", prompt: str = "a maze", seed: int = 0,
              actions: tuple[str, ...] = ("",)) -> np.ndarray:  # fmt: skip
    engine.open(9, prompt, StreamOptions(seed=seed, start=start))
    video = [ok(engine.step([ChunkRequest(9, actions)])[0]).frames for _ in range(chunks)]
    engine.close(9)
    return np.concatenate(video)


def worst(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@EACH_POLICY
def test_interleaved_and_batched_streams_are_solo_streams(world, policy):
    solo = {}
    for stream in range(1, 4):
        engine = StreamEngine(world, policy)
        open_streams(engine, range(stream, stream + 1))
        solo[stream] = [ok(engine.step([request(stream, chunk)])[0]).frames for chunk in range(CHUNKS)]
    assert worst(solo[1][0], solo[2][0]) > 20, "streams must differ, or the test shows nothing"

    interleaved = StreamEngine(world, policy)
    open_streams(interleaved, range(1, 4))
    for chunk in range(CHUNKS):
        for stream in (2, 3, 1) if chunk % 2 else (1, 2, 3):
            frames = ok(interleaved.step([request(stream, chunk)])[0]).frames
            assert worst(frames, solo[stream][chunk]) <= 1

    batched = StreamEngine(world, policy)
    open_streams(batched, range(1, 4))
    done = dict.fromkeys(range(1, 4), 0)
    for turn in range(CHUNKS + 2):  # stream 1 pauses on the way, so the streams' chunks differ within a batch
        who = [stream for stream in (3, 1, 2) if done[stream] < CHUNKS and not (stream == 1 and turn in (2, 3))]
        for stream, result in zip(who, batched.step([request(s, done[s]) for s in who]), strict=True):
            chunk = ok(result)
            assert chunk.stream_id == stream
            assert chunk.stats.batch == len(who)
            assert worst(chunk.frames, solo[stream][done[stream]]) <= 1
            done[stream] += 1
    assert set(done.values()) == {CHUNKS}


def test_mixed_policies_share_a_batch(world):
    engine = StreamEngine(world, SMALL)
    for stream, name in enumerate(POLICIES):
        engine.open(stream, "a maze", StreamOptions(attention=POLICIES[name]))
    for _ in range(CHUNKS):
        chunks = [ok(result) for result in engine.step([ChunkRequest(s, ("forward",)) for s in range(len(POLICIES))])]
    alone = StreamEngine(world, POLICIES["window"])
    alone.open(0, "a maze")
    for _ in range(CHUNKS):
        (last,) = alone.step([ChunkRequest(0, ("forward",))])
    assert worst(chunks[3].frames, ok(last).frames) <= 1
    assert chunks[3].stats.cache_tokens == ok(last).stats.cache_tokens
    assert chunks[4].stats.density == 1


def test_same_seed_same_video_other_seed_other_video(engine):
    first = frames_of(engine, seed=5)
    assert np.array_equal(first, frames_of(engine, seed=5))
    assert worst(first, frames_of(engine, seed=6)) > 20
    assert worst(first, frames_of(engine, seed=2**63 - 1)) > 20


def test_a_stream_does_not_depend_on_global_randomness(engine):
    torch.manual_seed(1)
    first = frames_of(engine)
    torch.manual_seed(2)
    assert np.array_equal(first, frames_of(engine))


def test_prompt_change_takes_effect_at_its_chunk(engine):
    for stream in (1, 2):
        engine.open(stream, "a maze", StreamOptions(start="nothing"))
    for chunk in range(5):
        prompt = "a round arena" if chunk == 2 else None
        first, second = (ok(r) for r in engine.step([ChunkRequest(1, ("",)), ChunkRequest(2, ("",), prompt)]))
        assert first.stats.prompt_applied is False
        assert second.stats.prompt_applied is (chunk == 2)
        assert (worst(first.frames, second.frames) > 1) == (chunk >= 2)


def test_new_prompt_equals_opening_with_it(engine):
    engine.open(1, "a maze", StreamOptions(start="nothing"))
    (changed,) = engine.step([ChunkRequest(1, ("",), "a round arena")])
    engine.open(2, "a round arena", StreamOptions(start="nothing"))
    (opened,) = engine.step([ChunkRequest(2, ("",))])
    assert np.array_equal(ok(changed).frames, ok(opened).frames)


def test_actions_take_effect_at_their_chunk_and_latent_frame(engine):
    base = frames_of(engine, chunks=2)
    for actions in [("", "forward"), ("forward", ""), ("forward",), ("forward+attack",)]:
        engine.open(1, "a maze", StreamOptions(start="nothing"))
        (same,) = engine.step([ChunkRequest(1, ("",))])
        (moved,) = engine.step([ChunkRequest(1, actions)])
        engine.close(1)
        assert np.array_equal(ok(same).frames, base[:4])
        assert worst(ok(moved).frames, base[4:]) > 1, actions
    held, each = frames_of(engine, actions=("forward",)), frames_of(engine, actions=("forward", "forward"))
    assert np.array_equal(held, each)


def test_starts(engine):
    videos = {name: frames_of(engine, start=name) for name in ("nothing", "auto", "maze", "arena")}
    assert np.array_equal(videos["auto"], videos["maze"]), "the prompt says maze"
    assert worst(videos["maze"], videos["nothing"]) > 1
    assert worst(videos["maze"], videos["arena"]) > 1
    lost = {name: frames_of(engine, start=name, prompt="somewhere else") for name in ("auto", "nothing")}
    assert np.array_equal(lost["auto"], lost["nothing"])


def test_start_frames_are_in_the_history_but_not_in_the_video(engine):
    engine.open(1, "a maze", StreamOptions(start="maze", attention=POLICIES["dense"]))
    chunk = ok(engine.step([ChunkRequest(1, ("",))])[0])
    assert chunk.stats.first_frame == 0
    assert chunk.stats.cache_tokens == (4 + 2) * 24


@pytest.mark.parametrize(
    ("actions", "field"),
    [
        ((), "ACTIONS"),
        (("", "", ""), "ACTIONS"),
        (("jump",), r"ACTIONS\[0\]"),
        (("", "forward+fly"), r"ACTIONS\[1\]"),
        (("+".join(["forward"] * 40),), r"ACTIONS\[0\]"),
    ],
)
def test_bad_actions_change_nothing(engine, actions, field):
    engine.open(1, "a maze")
    engine.open(2, "a maze")
    bad, good = engine.step([ChunkRequest(1, actions, "a round arena"), ChunkRequest(2, ("",))])
    assert isinstance(bad, InvalidInput)
    assert re.match(f"{field}: .*; allowed: ", str(bad))
    assert ok(good).stats.batch == 1
    (late,) = engine.step([ChunkRequest(1, ("",))])
    assert np.array_equal(ok(late).frames, ok(good).frames), "the stream goes on, its prompt unchanged"


@pytest.mark.parametrize("prompt", ["", "  \n", "x" * 4097, "ü" * 2049])
def test_bad_prompts(engine, prompt):
    with pytest.raises(InvalidInput, match="^PROMPT: "):
        engine.open(1, prompt)
    assert engine.stream_ids == ()
    engine.open(1, "x" * 4096)
    (result,) = engine.step([ChunkRequest(1, ("",), prompt)])
    assert isinstance(result, InvalidInput)
    assert ok(engine.step([ChunkRequest(1, ("",))])[0]).stats.chunk == 0


def test_bad_start_leaves_no_stream_behind(engine):
    with pytest.raises(InvalidInput, match=r"OPTIONS\.start"):
        engine.open(1, "a maze", StreamOptions(start="moon"))
    assert engine.stream_ids == ()


def test_ids_in_use_unknown_and_twice(engine):
    engine.open(1, "a maze")
    with pytest.raises(InvalidInput, match="1 is in use"):
        engine.open(1, "a maze")
    first, unknown, twice = engine.step([ChunkRequest(1, ("",)), ChunkRequest(7, ("",)), ChunkRequest(1, ("",))])
    assert ok(first).stats.chunk == 0
    assert isinstance(unknown, UnknownStream)
    assert unknown.code == "NOT_FOUND"
    assert isinstance(twice, InvalidInput)
    assert ok(engine.step([ChunkRequest(1, ("",))])[0]).stats.chunk == 1
    assert engine.step([]) == []


def test_capacity(engine):
    for stream in range(4):
        engine.open(stream, "a maze")
    with pytest.raises(AtCapacity, match="all 4 slots") as caught:
        engine.open(4, "a maze")
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert engine.close(2)
    engine.open(4, "a maze")
    assert engine.stream_ids == (0, 1, 3, 4)
    assert not engine.close(2)


def test_sweep_closes_only_idle_streams(engine, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    engine.open(1, "a maze")
    engine.open(2, "a maze")
    now = 1050.0
    ok(engine.step([ChunkRequest(2, ("",))])[0])
    now = 1061.0
    assert engine.sweep(60) == [1]
    assert engine.stream_ids == (2,)
    assert engine.sweep(60) == []


def test_a_stream_that_turns_nan_is_closed_and_others_go_on(world, engine):
    alone = StreamEngine(world, SMALL)
    for each in (engine, alone):
        each.open(1, "a maze", StreamOptions(seed=1))
        each.step([ChunkRequest(1, ("",))])
    engine.open(2, "a maze", StreamOptions(seed=2))
    engine.step([ChunkRequest(2, ("",))])
    with torch.inference_mode():
        engine.streams[2].caches[0].values.fill_(torch.nan)
    for chunk in range(CHUNKS):
        results = engine.step([ChunkRequest(2, ("",)), ChunkRequest(1, ("forward",))])
        if chunk == 0:
            assert "not finite" in str(results[0])
        else:
            assert isinstance(results[0], UnknownStream)
        (solo,) = alone.step([ChunkRequest(1, ("forward",))])
        assert worst(ok(results[1]).frames, ok(solo).frames) <= 1
    assert engine.stream_ids == (1,)


def test_a_failing_step_says_so_and_closes_what_it_touched(engine, monkeypatch):
    for stream in (1, 2):
        engine.open(stream, "a maze")

    def fail(*args: object) -> None:
        raise RuntimeError("secret prompt")

    monkeypatch.setattr(engine.world.decoder, "decode", fail)
    (result,) = engine.step([ChunkRequest(1, ("",))])
    assert isinstance(result, FastarError)
    assert "RuntimeError" in str(result)
    assert "secret" not in str(result)
    assert engine.stream_ids == (2,)
    monkeypatch.undo()
    assert ok(engine.step([ChunkRequest(2, ("",))])[0]).stats.chunk == 0


@EACH_POLICY
def test_close_frees_the_stream(world, policy):
    engine = StreamEngine(world, policy)
    engine.open(1, "a maze", StreamOptions(measure_recall=True))
    engine.step([ChunkRequest(1, ("",))])
    stream = engine.streams[1]
    alive = [weakref.ref(stream), weakref.ref(stream.caches[0].keys), weakref.ref(stream.text[0].keys)]
    del stream
    gc.disable()  # at once, not when the collector comes round
    try:
        engine.close(1)
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


def test_measuring_leaves_nothing_behind(engine):
    before = engine.stream_ids
    found = costs(engine, [1, 3])
    assert set(found) == {1, 3}
    assert all(seconds > 0 for seconds in found.values())
    assert engine.stream_ids == before


def test_stats(engine):
    engine.open(1, "a dark maze", StreamOptions(start="nothing", measure_recall=True))
    for index in range(CHUNKS):
        chunk = ok(engine.step([ChunkRequest(1, ("",))])[0])
        stats: ChunkStats = chunk.stats
        assert (stats.chunk, stats.first_frame, stats.frames, stats.batch) == (index, 4 * index, 4, 1)
        assert chunk.frames.shape == (4, 32, 48, 3)
        assert chunk.frames.dtype == np.uint8
        assert chunk.frames.flags.c_contiguous
        assert 0 < stats.density <= 1
        assert stats.recall is not None
        assert 0 < stats.recall <= 1 + 1e-5
        assert 1 <= stats.text_tokens <= 9
        assert stats.step_seconds > 0
        assert stats.cache_bytes > 0
    assert stats.cache_tokens <= 6 * 24
    assert stats.density < 0.8
    assert set(stats.as_json()) == {
        "chunk", "first_frame", "frames", "cache_tokens", "cache_bytes", "density", "recall", "merged_tokens",
        "text_tokens", "step_seconds", "batch", "prompt_applied", "phases", "guard_recall", "guard_error",
        "sparse_density",
    }  # fmt: skip


def test_dense_stats_and_recall(engine):
    engine.open(1, "a maze", StreamOptions(start="nothing", measure_recall=True, attention=POLICIES["dense"]))
    for index in range(4):
        stats = ok(engine.step([ChunkRequest(1, ("",))])[0]).stats
        assert stats.density == 1
        assert stats.recall == pytest.approx(1, abs=1e-5)
        assert stats.cache_tokens == 48 * (index + 1)
        assert stats.merged_tokens == 0
        assert stats.text_tokens == 9


def test_recall_is_not_measured_unless_asked_for(engine):
    engine.open(1, "a maze")
    assert ok(engine.step([ChunkRequest(1, ("",))])[0]).stats.recall is None


@pytest.mark.parametrize("name", ["window", "fastar", "sparse"])
def test_80_chunks_in_constant_memory(world, name):
    """Far beyond `rope_max_distance` (3 latent frames here), and no byte more than after the first chunk."""
    engine = StreamEngine(world, POLICIES[name])
    engine.open(1, "a maze", StreamOptions(seed=3))
    stats = []
    for chunk in range(80):
        result = ok(engine.step([request(1, chunk)])[0])
        stats.append(result.stats)
        assert result.frames.std() > 5, "the picture has not died"
    assert len({s.cache_bytes for s in stats}) == 1
    assert max(s.cache_tokens for s in stats) <= POLICIES[name].budget_frames * 24
    assert stats[-1].density < 0.05
    cache = engine.streams[1].caches[0]
    assert cache.history_frames == 164
    assert cache.keys.isfinite().all()
    assert cache.keys.abs().max() < 100


def test_limit_of_bytes_admits_what_it_promises(world):
    """A budget that `open` accepts must run: bounded caches never exceed `stream_bytes`."""
    model = world.config.model
    token_bytes = 2 * model.dim * model.layers * 4
    limit = 8 * model.frame_tokens * token_bytes
    engine = StreamEngine(world, SMALL, stream_bytes=limit)
    for budget in range(2, 5):
        attention = AttentionConfig(budget_frames=budget, recent_frames=1)
        engine.open(1, "a maze", StreamOptions(attention=attention, start="nothing"))
        ok(engine.step([ChunkRequest(1, ("",))])[0])
        engine.close(1)
    for budget in (8, 9, 4096):  # 8 frames would fit without the chunk and the bookkeeping
        attention = AttentionConfig(budget_frames=budget, recent_frames=1)
        with pytest.raises(InvalidInput, match="budget_frames"):
            engine.open(1, "a maze", StreamOptions(attention=attention, start="nothing"))
    assert engine.stream_ids == ()


def test_dense_stream_ends_at_its_limit_of_bytes(world):
    engine = StreamEngine(world, POLICIES["dense"], stream_bytes=1 << 20)
    engine.open(1, "a maze", StreamOptions(start="nothing"))
    engine.open(2, "a maze", StreamOptions(start="nothing", attention=POLICIES["window"]))
    for _ in range(60):
        dense, window = engine.step([ChunkRequest(1, ("",)), ChunkRequest(2, ("",))])
        ok(window)
        if isinstance(dense, AtCapacity):
            break
    else:
        pytest.fail("dense attention grew without bound")
    assert engine.stream_ids == (2,)
