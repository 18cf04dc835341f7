"""The load test's figures from given times: against a viewer simulated in small steps, and by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import numpy as np
import pytest
from fastar_client.load.measure import StreamFigures, Totals, figures, over, totals
from fastar_client.load.plan import PlannedStream, share
from fastar_client.load.record import (
    COMPLETED,
    DISCONNECTED,
    FAILED,
    INTERRUPTED,
    REJECTED,
    STARVED,
    ChunkTime,
    ControlTime,
    StreamRecord,
)
from fastar_client.load.report import judge
from fastar_client.load.run import Probe
from fastar_client.load.scenario import Phase, Scenario, Slo
from fastar_client.load.slo import verdict
from fastar_client.load.workers import Outcome
from fastar_client.protocol import World

RANDOM = random.Random(random.SystemRandom().randrange(2**40))
TICK = 0.001


def scenario(fps: float = 20.0, **changed) -> Scenario:
    return Scenario((Phase(10, burst=1),), (10, 10), fps, **changed)


def record(
    received: list[float], frames: int | list[int] = 4, ended: float = 10.0, outcome: str = COMPLETED, **changed
) -> StreamRecord:
    """A stream that was due, and begun, at 0, to last 10 s. Its cache is full from the start."""
    counts = [frames] * len(received) if isinstance(frames, int) else frames
    chunks = [
        ChunkTime(max(t - 0.3, 0), t, t + 0.01, n, 100.0, 0.1, 1, None) for t, n in zip(received, counts, strict=True)
    ]
    number, slow = changed.pop("number", 0), changed.pop("slow_factor", None)
    return StreamRecord(PlannedStream(number, 0.0, 10.0, "", "", 0, slow_factor=slow), 0.0, ended, outcome,
                        chunks=chunks, **changed)  # fmt: skip


def punctual(chunks: int) -> list[float]:
    """When chunks of 4 frames come that are there 10 ms before a viewer at 20 FPS needs them."""
    return [1.05, *(1.04 + 0.2 * i for i in range(1, chunks))]


def some_record(**changed) -> StreamRecord:
    received, frames, at = [], [], RANDOM.uniform(0.1, 0.5)
    while at < 9.5:
        received.append(round(at, 3) + RANDOM.uniform(0, 4e-4))  # no tie with a deadline: rounding would decide it
        frames.append(RANDOM.choice((3, 4, 12)))
        at += frames[-1] / 20 * RANDOM.choice((0.2, 0.9, 1.0, 1.05, 3.0))
    return record(received, frames, ended=changed.pop("ended", 9.6), **changed)


def watch(stream: StreamRecord, fps: float, until: float) -> tuple[float, float, int]:
    """Seconds played and stalled, and stalls, of a viewer who looks every millisecond whether there is a frame."""
    arrivals = [(chunk.received, chunk.frames) for chunk in stream.chunks]
    clock, buffered, played, stalled, stalls, dry = arrivals[0][0], 0.0, 0.0, 0.0, 0, False
    while clock < until - TICK / 2:
        while arrivals and arrivals[0][0] <= clock + TICK / 2:
            buffered += arrivals.pop(0)[1] / fps
        if buffered > TICK / 2:
            buffered, played, dry = buffered - TICK, played + TICK, False
        else:
            stalls, stalled, dry = stalls + (not dry), stalled + TICK, True
        clock += TICK
    return played, stalled, stalls


@pytest.mark.parametrize("round_", range(6))
def test_stalls_are_those_of_a_viewer_in_small_steps(round_):
    stream = some_record()
    found = figures(stream, scenario())
    played, stalled, stalls = watch(stream, 20.0, 9.6)
    assert found.played == pytest.approx(played, abs=0.1)
    assert found.stalled == pytest.approx(stalled, abs=0.1)
    assert sum(stall.seconds > 2 * TICK for stall in found.stalls) <= stalls <= len(found.stalls)
    assert found.rebuffer == pytest.approx(stalled / (played + stalled), abs=0.01)


@pytest.mark.parametrize("round_", range(6))
def test_deadlines_are_those_of_the_definition(round_):
    stream = some_record()
    found = figures(stream, scenario())
    for prebuffer, ratio in ((1, found.continuous_play), (2, found.continuous_play_2)):
        deadline, good, due = stream.chunks[prebuffer - 1].received, 0, 0
        frames = [chunk.frames for chunk in stream.chunks]
        for number in range(1000):
            there = number < len(stream.chunks)
            due += there or deadline <= 9.6
            good += there and stream.chunks[number].received <= deadline
            deadline += (frames[number] if there else frames[-1]) / 20
        assert ratio == pytest.approx(good / due)


def test_by_hand():
    """Chunks of 4 frames at 20 FPS, due every .2 s; the fourth is .5 s late, the rest of the delay stays."""
    times = [1.0, 1.2, 1.4, 2.1, 2.3, 2.5, 2.7]
    found = figures(record(times, ended=2.85), scenario())
    assert found.fps == pytest.approx(24 / 1.7)
    assert (found.ttfc, found.ttff) == (1.0, 1.01)
    ((at, seconds, chunk),) = [dataclasses.astuple(stall) for stall in found.stalls]
    assert (at, seconds, chunk) == (pytest.approx(1.6), pytest.approx(0.5), 3)
    assert found.continuous_play == pytest.approx(3 / 10)  # 7 came, three more were due by 2.85
    assert found.played == pytest.approx(1.35)
    assert found.stalls_per_minute == pytest.approx(60 / 1.85)
    assert found.jitter == pytest.approx([0, 0, 0.5, 0, 0, 0], abs=1e-9)
    assert found.rtf == pytest.approx([1, 1, 3.5, 1, 1, 1])
    assert found.requests == pytest.approx([0.3] * 7)


def test_a_server_that_stops_answering_is_not_better_than_one_that_is_late():
    """What comes at the end and what has not come by then are alike, and both are worse than what comes early."""
    times = punctual(10)
    silent = figures(record(times), scenario())
    late = figures(record([*times, 10.0]), scenario())
    early = figures(record(punctual(12)), scenario())
    assert silent.stalled == pytest.approx(late.stalled) == pytest.approx(10 - 3.05)
    assert silent.fps == pytest.approx(36 / (9.8 - 1.05))
    assert silent.fps < late.fps < early.fps
    assert silent.continuous_play == pytest.approx(10 / 45)
    assert silent.continuous_play <= late.continuous_play < early.continuous_play


def test_one_chunk_and_then_nothing_is_no_frame_rate_at_all():
    for paced in (True, False):
        assert figures(record([1.0]), scenario(paced=paced)).fps == 0
        assert figures(record([1.0], ended=1.1), scenario(paced=paced)).fps is None
    assert figures(record([1.0]), scenario()).continuous_play_2 == 0
    assert figures(record([1.0], ended=1.1), scenario()).continuous_play_2 is None


def test_steady_frames_are_those_after_the_cache_is_full():
    stream = record([1, 1.1, 1.2, 1.3, 1.7, 2.1, 2.5], ended=2.5)
    tokens = [100.0, 200.0, 300.0, 400.0, 400.0, 400.0, 400.0]
    stream.chunks = [dataclasses.replace(c, cache_tokens=t) for c, t in zip(stream.chunks, tokens, strict=True)]
    assert figures(stream, scenario(paced=False)).fps == pytest.approx(10.0)


def test_lost_streams_count_as_showing_nothing():
    times = punctual(10)
    rejected = figures(record([], ended=0.1, outcome=REJECTED), scenario())
    starved = figures(record([], outcome=STARVED), scenario())
    failed = figures(record(times, ended=3.0, outcome=FAILED), scenario())
    for found in (rejected, starved):
        assert (found.fps, found.continuous_play, found.rebuffer, found.stalled) == (0, 0, 1, 10)
        assert found.ttfc is None
    assert (failed.fps, failed.fps_alive) == (0, pytest.approx(20, rel=0.01))
    assert failed.stalled == pytest.approx(6.95)
    assert failed.continuous_play == pytest.approx(10 / 45)
    for outcome in (COMPLETED, DISCONNECTED, INTERRUPTED):
        assert not figures(record(times, ended=3.0, outcome=outcome), scenario()).stalls


def test_controls():
    asked = [ControlTime("action", 2.0, 2.1, applied=2.4), ControlTime("action", 2.0, 2.0, applied=2.1)]
    asked += [
        ControlTime("prompt", 2.75, 2.75),
        ControlTime("prompt", 2.0, 2.0),
        ControlTime("x", 2.0, 2.0, error="no"),
    ]
    found = figures(record([1 + 0.2 * i for i in range(11)], ended=3.0, controls=asked), scenario())
    assert found.controls == pytest.approx([0.4, 0.1, 1.0])  # one that waited too short a time tells nothing
    assert found.control_periods == pytest.approx([2.0, 0.5, 5.0])
    assert found.controls_refused == 1


def test_a_late_load_generator_hides_no_wait():
    """What a stream waits is counted from when it was due, and how late it was begun is told apart."""
    stream = record(punctual(45))
    stream.opened = 0.7
    found = figures(stream, scenario())
    assert (found.ttfc, found.lateness) == (1.05, 0.7)

    def warnings(opened: float, lags: list[float]) -> list[str]:
        stream.opened = opened
        return judge({}, scenario(), probe, Outcome([stream], lags), 1).warnings

    probe = Probe(World("w", 8, 8, 4, 2, (), (), (), 20.0), 0.1)
    assert warnings(0.01, [0.01] * 200) == []
    (late,) = warnings(0.7, [0.01] * 200)
    assert "load generator was too slow: streams began 0.70 s late" in late
    (late,) = warnings(0.01, [0.01] * 190 + [0.3] * 10)
    assert "an event loop was 0.30 s late" in late


def test_slow_down_needs_enough_chunks():
    intervals = np.linspace(0.2, 0.3, 100)
    times = [1.0, *(1.0 + np.cumsum(intervals)).tolist()]
    found = figures(record(times, ended=times[-1]), scenario())
    assert found.last_over_first_decile == pytest.approx(intervals[-10:].mean() / intervals[:10].mean())
    assert found.slope_per_minute == pytest.approx(60 * 0.1 / intervals.sum(), rel=0.1)
    assert figures(record(times[:-1], ended=times[-2]), scenario()).last_over_first_decile is None


def gathered(records: list[StreamRecord], paced: bool = True) -> tuple[list[StreamFigures], Totals]:
    each = [figures(r, scenario(paced=paced)) for r in records]
    return each, totals(records, each, len(records) + 2)


def test_spreads_are_numpys_and_know_infinity():
    for count in (1, 2, 5, 20, 21, 333):
        values = [RANDOM.gauss(0, 1) for _ in range(count)]
        found = over([None, *values, None])
        expected = np.percentile(values, (5, 50, 95, 99)).tolist()
        assert [found[name] for name in ("p5", "p50", "p95", "p99")] == pytest.approx(expected)
        assert (found["min"], found["max"]) == (min(values), max(values))
        assert found["mean"] == pytest.approx(np.mean(values))
    found = over([1.0, math.inf, 3.0])
    assert (found["p50"], found["p95"], found["max"]) == (3.0, math.inf, math.inf)
    assert over([None]) is None


def test_processes_are_merged_exactly():
    """Figures of all streams do not depend on who ran them, and are no means of each process's own."""
    records = [some_record(number=number) for number in range(23)]
    _, whole = gathered(records)
    parts = share(records, 3)
    merged = sorted((r for part in parts for r in part), key=lambda r: r.planned.number)
    assert gathered(merged)[1] == whole
    jitter = [value for r in records for value in figures(r, scenario()).jitter]
    assert whole.jitter["p99"] == pytest.approx(np.percentile(jitter, 99))
    fps = [gathered(part)[1].fps["p5"] for part in parts]
    assert whole.fps["p5"] == pytest.approx(np.percentile([figures(r, scenario()).fps for r in records], 5))
    assert whole.fps["p5"] != pytest.approx(np.mean(fps), rel=1e-6)


def test_totals():
    good = punctual(45)
    records = [record(good, number=n) for n in range(3)]
    records.append(record(good[:5], ended=1.9, outcome=FAILED, error="gone", number=3))
    records.append(record([1.0, 4.0], slow_factor=9.0, number=4))
    records.append(record([], ended=0.2, outcome=INTERRUPTED, number=5))
    records.append(record(good[:1], ended=1.1, outcome=DISCONNECTED, number=6))
    each, found = gathered(records)
    assert [f.judged for f in each] == [True, True, True, True, False, False, True]
    assert found.outcomes == {COMPLETED: 4, FAILED: 1, INTERRUPTED: 1, DISCONNECTED: 1}
    assert (found.planned, found.not_run, found.lost, found.judged, found.too_short) == (9, 2, 1, 5, 1)
    assert found.errors == {"gone": 1}
    assert (found.fps["min"], found.fps["p50"]) == (0, pytest.approx(20, rel=0.01))
    assert (found.ttfc["max"], found.no_first_chunk) == (1.05, 0)
    stalled, played = 10 - 2.05, 3 * 8.95 + 1.0 + 0.05
    assert found.rebuffer == pytest.approx(stalled / (stalled + played), rel=1e-3)
    assert found.delivered_fps == pytest.approx((3 * 180 + 20 + 8 + 4) / 10)


def test_the_slo_is_judged_by_all_its_targets():
    good = punctual(45)
    fine = [record(good, number=n) for n in range(20)]

    def missed(records: list[StreamRecord], **slo: float | None) -> list[str]:
        return [t.name for t in verdict(gathered(records)[1], scenario(slo=Slo(**slo))) if not t.met]

    assert missed(fine) == []
    every = ["lost streams", "p5 of the streams' FPS", "continuous play", "rebuffer ratio"]
    assert missed([record([], ended=0.1, outcome=REJECTED)] * 2) == [*every, "p95 of the time to the first chunk"]
    assert missed([]) == [*every[1:], "p95 of the time to the first chunk"]  # nothing measured is nothing kept
    slow = [record([1.05 + 0.21 * i for i in range(43)])] * 20
    assert missed(slow) == every[1:]
    assert missed(slow, p5_fps_share=0.9, continuous_play=None, rebuffer=0.2) == []
    assert missed(fine, ttfc_p95_seconds=1.0) == ["p95 of the time to the first chunk"]
    late = [ControlTime("action", 2.0, 2.0, applied=2.31)]
    assert missed([record(good, controls=late)] * 20) == ["p95 of control latency"]
    slower = np.cumsum(np.linspace(0.04, 0.05, 150)).tolist()
    assert missed([record(slower, 1, ended=slower[-1])] * 20, rebuffer=None, continuous_play=None) == [
        "p95 of the streams' slow-down"
    ]
    saturating = verdict(gathered(slow, paced=False)[1], scenario(paced=False))
    assert [(t.name, t.met) for t in saturating] == [("lost streams", True)]


def test_targets_say_by_how_much_they_are_missed():
    slow = [record([1.05 + 0.21 * i for i in range(43)])] * 20
    found = {t.name: str(t) for t in verdict(gathered(slow)[1], scenario())}
    text = found["p5 of the streams' FPS"]
    assert text == "p5 of the streams' FPS: 19.05; target: at least 19.8; missed by 0.752"
    nothing = {t.name: str(t) for t in verdict(gathered([record([], outcome=STARVED)])[1], scenario())}
    assert nothing["p95 of the time to the first chunk"].endswith(": never; target: at most 1.5 s")


def test_a_test_that_was_stopped_at_once_has_a_report_too(tmp_path):
    probe = Probe(World("w", 8, 8, 4, 2, (), (), (), 20.0), 0.1)
    for paced in (True, False):
        report = judge({"url": "u", "started": "now"}, scenario(paced=paced), probe, Outcome(interrupted=True), 3)
        report.write(tmp_path)
        found = json.loads((tmp_path / "report.json").read_text())
        assert (found["totals"]["not_run"], found["streams"], found["met"]) == (3, [], not paced)
        assert "was interrupted" in (tmp_path / "report.html").read_text()
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
