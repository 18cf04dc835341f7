"""The load test's own accuracy: against a server behind real gRPC that is late, silent or broken as scripted.

TOLERANCE is what the two ends' event loops and a shared machine may add to a scripted time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time

import pytest
from fastar_client.load.measure import StreamFigures, figures, totals
from fastar_client.load.plan import PlannedControl, PlannedStream
from fastar_client.load.record import StreamRecord
from fastar_client.load.run import Runner, Target, probe
from fastar_client.load.scenario import Phase, Scenario
from live import LiveServer
from scripted import BUSY, ScriptedServer, grpc_server

TOLERANCE = 0.06  # seconds
PERIOD = 0.2  # 4 frames at 20 FPS
PACED = Scenario((Phase(5, burst=1),), (5, 5), 20.0)
SATURATING = dataclasses.replace(PACED, paced=False)


def viewer(number: int = 0, at: float = 0.0, seconds: float = 2.0, **changed) -> PlannedStream:
    return PlannedStream(number, at, seconds, "a hall", "forward", 7, **changed)


def play(
    server: ScriptedServer, *streams: PlannedStream, scenario: Scenario = PACED, stop: float | None = None, **target
) -> tuple[list[StreamRecord], list[StreamFigures]]:
    """stop: seconds after which the test is stopped."""

    async def run() -> list[StreamRecord]:
        async with asyncio.timeout(30), grpc_server(server) as url:
            runner = Runner(Target(url, **target), scenario, time.monotonic() + 0.05)
            if stop is not None:
                asyncio.get_running_loop().call_later(stop, runner.stop)
            await runner.run(list(streams))
            assert not runner.running
            return sorted(runner.records, key=lambda record: record.planned.number)

    records = asyncio.run(run())
    return records, [figures(record, scenario) for record in records]


def near(seconds: float) -> object:
    return pytest.approx(seconds, abs=TOLERANCE)


def test_a_late_chunk_is_a_stall_of_its_length():
    """Chunk 6 was asked for two periods before it was due, and took .92 s."""
    server = ScriptedServer(step_seconds=0.02, delays={6: 0.9})
    (record,), (found,) = play(server, viewer(seconds=2.5))
    (stall,) = found.stalls
    assert stall.chunk == 6
    assert stall.seconds == near(0.92 - 2 * PERIOD)
    assert stall.at == near(record.first + 6 * PERIOD)
    assert found.stalls_per_minute == pytest.approx(60 / (2.5 - found.ttfc), rel=0.02)
    assert found.rebuffer == pytest.approx(0.52 / (2.5 - found.ttfc), abs=0.04)
    on_time = round(found.continuous_play * len(record.chunks))
    assert on_time == 6  # what comes after the stall is late by the first anchor, too
    assert max(found.jitter) == near(0.9)  # chunk 5 had come a period and .02 s before it was due
    assert found.outcome == "completed"


def test_a_server_that_is_on_time_is_seen_so():
    (record,), (found,) = play(ScriptedServer(step_seconds=0.1), viewer())
    assert found.ttfc == near(0.1)
    assert found.ttfc <= found.ttff <= found.ttfc + TOLERANCE
    assert (found.stalls, found.continuous_play, found.rebuffer) == ((), 1.0, 0.0)
    assert found.fps == pytest.approx(20, rel=0.03)
    assert sorted(found.requests)[len(found.requests) // 2] == near(0.1)
    assert record.ended == near(2.0)


def test_the_rate_of_a_saturated_server_is_its_own():
    (record,), (found,) = play(ScriptedServer(step_seconds=0.1), viewer(), scenario=SATURATING)
    assert len(record.chunks) == pytest.approx(19, abs=1)
    assert found.fps == pytest.approx(40, rel=0.08)
    assert sorted(found.intervals)[len(found.intervals) // 2] == pytest.approx(0.1, abs=0.01)
    assert sorted(found.rtf)[len(found.rtf) // 2] == pytest.approx(0.5, rel=0.1)
    assert (found.continuous_play, found.stalled, found.rebuffer) == (None, None, None)


def test_percentiles_are_those_of_the_script():
    """Every tenth chunk takes .15 s, others .05."""
    server = ScriptedServer(step_seconds=0.05, delays=dict.fromkeys(range(0, 1000, 10), 0.1))
    records, each = play(server, viewer(0, seconds=2.5), viewer(1, 0.1, 2.5), scenario=SATURATING)
    found = totals(records, each, 2)
    for name, seconds in (("p5", 0.05), ("p50", 0.05), ("p95", 0.15), ("p99", 0.15)):
        assert found.interval[name] == pytest.approx(seconds, abs=0.02)
    assert found.interval["mean"] == pytest.approx(0.06, abs=0.005)
    assert found.fps["p50"] == pytest.approx(4 / 0.06, rel=0.08)


def test_a_server_that_falls_silent():
    (record,), (found,) = play(ScriptedServer(faults={5: ScriptedServer.hang}), viewer(seconds=1.9), timeout=2.0)
    (stall,) = found.stalls
    assert stall.seconds == near(1.9 - record.first - 5 * PERIOD)
    assert found.continuous_play == pytest.approx(5 / (5 + math.ceil((0.9 - record.first) / PERIOD)))
    assert found.fps == pytest.approx(16 / (1.9 - PERIOD - record.first), rel=0.03)
    assert record.outcome == "completed"


@BUSY
def test_arrivals_keep_their_schedule_whatever_the_server_does():
    """Closed-loop clients would have waited for the slow first chunks, and so have spared the server its own load."""
    server = ScriptedServer(step_seconds=0.02, delays={0: 1.2})
    streams = [viewer(n, 0.1 * n, 2.0) for n in range(8)]
    records, each = play(server, *streams)
    assert [r.opened for r in records] == [near(0.1 * n) for n in range(8)]
    assert [f.ttfc for f in each] == [near(1.22)] * 8
    assert all(record.ended == near(record.planned.leaves) for record in records)


def test_a_queue_is_counted_from_when_each_arrived():
    """A server that makes one chunk every .15 s, for whoever has waited longest: the fifth waits five times as long."""

    async def run() -> list[StreamRecord]:
        server = ScriptedServer(gate=asyncio.Semaphore(0))

        async def make() -> None:
            while True:
                await asyncio.sleep(0.15)
                server.gate.release()

        async with grpc_server(server) as url:
            runner = Runner(Target(url), SATURATING, time.monotonic())
            maker = asyncio.create_task(make())
            await runner.run([viewer(n, 0.01 * n, 1.5) for n in range(5)])
            maker.cancel()
            return runner.records

    found = sorted(figures(record, SATURATING).ttfc for record in asyncio.run(run()))
    assert [b - a for a, b in zip(found, found[1:], strict=False)] == [near(0.14)] * 4
    assert found[-1] > 0.6


def test_controls_are_timed_to_the_first_chunk_that_obeys():
    controls = (
        PlannedControl(0.3, "action", "turn_left"),
        PlannedControl(0.52, "prompt", "a maze"),
        PlannedControl(0.75, "action", "fly"),  # which this server refuses
        PlannedControl(1.0, "action", ""),
        PlannedControl(99.0, "action", "forward"),
    )
    server = LiveServer(step_seconds=0.17)
    (record,), (found,) = play(server, viewer(controls=controls), scenario=SATURATING)
    assert [control["kind"] for control in map(dataclasses.asdict, record.controls)] == ["action", "prompt"] + [
        "action"
    ] * 2
    assert [c.due for c in record.controls] == pytest.approx([record.first + c.at for c in controls[:4]])
    assert found.controls_refused == 1
    obeyed = [c for c in record.controls if c.error is None]
    assert len(found.controls) == len(obeyed) == 3
    for control, seconds in zip(obeyed, found.controls, strict=True):
        first = min(chunk.received for chunk in record.chunks if chunk.received > control.due + 0.005)
        assert control.applied in [chunk.received for chunk in record.chunks]
        assert seconds == near(first - control.due)


def test_probe():
    async def run():
        async with grpc_server(ScriptedServer(step_seconds=0.02, delays={0: 0.3})) as url:
            return await probe(Target(url), PACED)

    found = asyncio.run(run())
    assert found.world.name == "test"
    assert found.cold_ttfc_seconds == near(0.32)
