"""Tables from units made by hand, and the measurement of speed on a tiny world."""

from __future__ import annotations

import numpy as np
import pytest

from fastar_backend.attention.policies import POLICIES
from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import StreamOptions
from fastar_backend.errors import FastarError
from fastar_backend.evaluation import speed, tables
from fastar_backend.evaluation.statistics import estimate
from fastar_backend.evaluation.tables import Results


def unit(part: str, policy: str, scenario: str = "maze", kind: str = "walk", **result: object) -> dict:
    return {"part": part, "policy": policy, "scenario": scenario, "seed": 0, "kind": kind, "result": result}


def timed(policy: str, fps: dict[int, float]) -> dict:
    rest = {"cache_bytes": 1, "peak_bytes": 2, "reference": 3}
    rows = [{"frame": frame, "fps": value, **rest} for frame, value in fps.items()]
    return unit("speed", policy, rows=rows, stopped=None)


def test_speed_up_is_at_the_last_length_that_both_reach():
    results = Results([timed("dense", {24: 20, 240: 5}), timed("a", {24: 30, 240: 25, 960: 24})], ["dense", "a"])
    found = tables.speed(results, "a")
    assert (found["speedup"], found["speedup_frame"], found["fps"]) == (5, 240, 24)
    assert tables.speed(results, "dense")["speedup"] == 1


def test_who_is_ahead_is_better_and_no_slower():
    figures = {"mine": (30, 20), "good": (31, 20), "fast": (29, 90), "slow": (40, 19)}
    rows = {
        name: {"psnr": estimate([psnr]), "speed": timed(name, {24: 10, 240: fps})["result"]}
        for name, (psnr, fps) in figures.items()
    }
    rows["short"] = {"psnr": estimate([50]), "speed": timed("short", {24: 9})["result"]}
    assert tables.ahead(rows | {"dense": {"psnr": None, "speed": None}}, "mine") == ["good"]
    assert tables.ahead(rows, "none") == []


def test_horizon_is_one_chunk():
    errors = list(np.arange(1.0, 41.0))
    one = unit("rollout", "a", chunk_frames=4, truth={"squared_error": errors}, dense={"squared_error": errors})
    found = tables.horizons(Results([one], ["a"]), "a")["truth"]
    assert list(found) == [1, 4]  # chunk 16 is not reached
    assert found[4].mean == pytest.approx(10 * np.log10(255**2 / np.mean([13, 14, 15, 16])))


def test_drift_is_over_the_games_mean():
    looks = {name: [2.0] * 5 + [1.0] * 5 for name in ("sharpness", "brightness", "contrast")}
    true = {name: [4.0] * 5 + [2.0] * 5 for name in looks}
    near = {"squared_error": [100.0, 300.0], "ssim": [0.5], "flip": [0.25]}
    with_truth, alone = (
        unit("drift", "a", frames=40, looks=looks, truth_looks=true, truth=near),
        unit("drift", "b", frames=40, looks=looks),
    )
    results = Results([with_truth, alone], ["a", "b"])
    assert tables.drift(results, "a")["sharpness"] == pytest.approx([2 / 3] * 5 + [1 / 3] * 5, abs=1e-4)
    assert tables.drift(results, "a")["truth"] == {
        "frames": 2, "psnr": pytest.approx(10 * np.log10(255**2 / 200)), "ssim": 0.5, "flip": 0.25,
    }  # fmt: skip
    assert tables.drift(results, "b")["contrast"] == [1.0] * 5 + [0.5] * 5
    assert tables.drift(results, "b")["truth"] is None


def test_following_is_pooled():
    turns = [{"turn": {"told": 3, "obeyed": 3}, "walk": {"told": 1, "obeyed": 0}}, {"turn": {"told": 5, "obeyed": 1}}]
    results = Results([unit("rollout", "a", str(i), following=row) for i, row in enumerate(turns)], ["a"])
    found = tables.following(results, "a")
    assert found["turn"] == {"rate": 0.5, "told": 8}
    assert found["all"] == {"rate": 4 / 9, "told": 9}
    assert "step aside" not in found


def test_gain_is_paired_by_chunk_and_scene():
    def seen(policy: str, scenario: str, errors: list[float]) -> dict:
        return unit("revisit", policy, scenario, "away", rows=[{"truth": e, "whole": e} for e in errors])

    units = [seen("window", "x", [10, 1000]), seen("a", "x", [1, 100]), seen("window", "y", [50]), seen("a", "y", [50])]
    found = tables.revisit(Results(units, ["window", "a"]), "a")
    assert found["truth_gain"].mean == pytest.approx(5)  # 10 dB in one scene, none in the other
    assert found["first_gain"] is None


@pytest.fixture
def engine(world) -> StreamEngine:
    return StreamEngine(world, AttentionConfig(), max_streams=1, stream_bytes=1 << 40)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_policy_can_be_filled(engine, policy):
    """To the length that is asked for, or until it is full; and a chunk can be made then."""
    config = POLICIES[policy](6, 2)
    engine.open(1, "a dark maze", StreamOptions(start="nothing", attention=config))
    stream = engine.streams[1]
    speed.fill(engine, stream, 40)
    assert stream.latent_frame == 40
    tokens, frame = stream.caches.stats().tokens, engine.shape.frame_tokens
    if config.kind in ("window", "flowcache", "fastar"):
        assert tokens <= 6 * frame
    else:
        assert tokens == 40 * frame
    frames, seconds, held = speed._timed(engine)
    assert (frames, held) == (4, stream.cache_bytes)
    assert seconds > 0


def test_speed_is_measured_in_a_process_of_its_own(tiny_world):
    found = speed.measure_speed(str(tiny_world), "cpu", AttentionConfig(kind="dense"), (8, 80), 1)
    assert [row["frame"] for row in found["rows"]] == [8, 80]
    short, long = found["rows"]
    assert long["cache_bytes"] > short["cache_bytes"]
    assert all(row["fps"] > 1 and row["peak_bytes"] > 50e6 and row["reference"] > 0 for row in found["rows"])
    with pytest.raises(FastarError, match="speed: no chunk was timed"):
        speed.measure_speed("/none", "cpu", AttentionConfig(kind="dense"), (8,), 1)
