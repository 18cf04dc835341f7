"""Least slack first, fair to those without a frame rate: on the real schedule, in simulated time."""

from __future__ import annotations

import dataclasses
import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastar_backend.service.schedule import Playout, choose

CHUNK = 4  # frames


@dataclasses.dataclass
class Due:
    deadline: float


def cost(streams: int) -> float:
    return 0.05 + 0.01 * streams


@given(st.lists(st.floats(0, 10), max_size=12), st.floats(0, 10), st.integers(1, 8))
def test_a_batch_is_the_most_urgent_and_never_makes_the_first_late(deadlines, now, most):
    waiting = [Due(deadline) for deadline in deadlines]
    batch = choose(waiting, now, cost, most)
    assert bool(batch) == bool(waiting)
    assert len(batch) <= most
    assert [due.deadline for due in batch] == sorted(deadlines)[: len(batch)]
    if batch and now + cost(1) <= batch[0].deadline:
        assert now + cost(len(batch)) <= batch[0].deadline
    elif batch:
        assert len(batch) == min(most, len(waiting)), "the first is late anyway: fill the batch"


def test_a_viewer_shows_what_is_there_and_starts_anew_when_it_ran_dry():
    playout = Playout(8.0)
    assert playout.deadline(5.0) == 6.0, "the first chunk, like any without a rate, within a second"
    assert playout.ready(5.5, CHUNK) == 0.0
    assert playout.deadline(5.6) == 6.0, "after 4 frames at 8 FPS the viewer runs dry"
    assert playout.ready(5.8, CHUNK) == 0.0
    assert playout.deadline(5.9) == 6.5
    assert playout.ready(7.0, CHUNK) == pytest.approx(0.5)
    assert playout.deadline(7.0) == 7.5
    playout.restart()
    assert playout.ready(60.0, CHUNK) == 0.0, "a pause is not lateness"


class Simulated:
    """A stream with two requests in flight, as clients have."""

    def __init__(self, fps: float | None) -> None:
        self.playout, self.arrived, self.made, self.late, self.longest, self.last = (
            Playout(fps),
            [0.0, 0.0],
            0,
            0,
            0.0,
            0.0,
        )
        self.to_come: list[float] = []

    @property
    def deadline(self) -> float:
        return self.playout.deadline(self.arrived[0])

    def done(self, now: float) -> None:
        self.arrived.pop(0)
        self.late += self.playout.ready(now, CHUNK) > 0
        self.made += 1
        self.longest, self.last = max(self.longest, now - self.last), now
        # A paced client asks when it starts to show a chunk, another at once.
        heapq.heappush(
            self.to_come, now if self.playout.fps is None else self.playout.dry_at - CHUNK / self.playout.fps
        )

    def arrive(self, now: float) -> None:
        while self.to_come and self.to_come[0] <= now:
            self.arrived.append(heapq.heappop(self.to_come))


def simulate(streams: list[Simulated], seconds: float, most: int) -> list[int]:
    now, sizes = 0.0, []
    while now < seconds:
        for stream in streams:
            stream.arrive(now)
        batch = choose([s for s in streams if s.arrived], now, cost, most)
        if not batch:
            now += 0.001
            continue
        now += cost(len(batch))
        sizes.append(len(batch))
        for index, stream in enumerate(batch):
            stream.done(now + 1e-9 * index)  # one after the other, as the service does
    return sizes


def test_paced_streams_are_in_time_beside_greedy_ones():
    paced = [Simulated(12.0) for _ in range(3)]
    greedy = [Simulated(None) for _ in range(6)]
    simulate([*paced, *greedy], 60.0, most=4)
    assert [stream.late for stream in paced] == [0, 0, 0]
    assert all(stream.made >= 0.98 * 60 * 12 / CHUNK for stream in paced)
    assert min(s.made for s in greedy) >= 0.9 * max(s.made for s in greedy), "the rest is shared evenly"


def test_nobody_starves_under_overload():
    paced = [Simulated(30.0) for _ in range(12)]
    greedy = [Simulated(None) for _ in range(4)]
    simulate([*paced, *greedy], 60.0, most=4)
    assert all(stream.late for stream in paced), "this is more than the machine can do"
    assert max(stream.longest for stream in greedy) < 2.5
    assert max(stream.longest for stream in paced) < 2.5


def test_batches_are_full_under_load():
    sizes = simulate([Simulated(None) for _ in range(8)], 30.0, most=8)
    assert sum(sizes) / len(sizes) > 7.5
    sizes = simulate([Simulated(None) for _ in range(12)], 30.0, most=8)
    assert sum(sizes) / len(sizes) > 7.5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([None, 6.0, 12.0, 24.0]), min_size=1, max_size=10), st.integers(1, 6))
def test_every_mix_goes_on(rates, most):
    streams = [Simulated(fps) for fps in rates]
    simulate(streams, 20.0, most)
    assert min(stream.made for stream in streams) > 0
    assert max(stream.longest for stream in streams) < 4.0
