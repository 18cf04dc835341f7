"""Who arrives when, and what they do: all of it drawn before the test begins, from a seed.

Each kind of choice has a generator of its own, so that, say, other prompts leave the arrivals as they were.
"""

from __future__ import annotations

import dataclasses
import math
import random

from fastar_client.load.scenario import Phase, Scenario


@dataclasses.dataclass(frozen=True)
class PlannedControl:
    at: float  # seconds since the stream's first chunk
    kind: str  # "action" or "prompt"
    value: str


@dataclasses.dataclass(frozen=True)
class PlannedStream:
    number: int  # 0, 1, ... in the order of arrival
    at: float  # seconds since the test began
    seconds: float  # until its viewer leaves, counted from `at`
    prompt: str
    action: str
    seed: int
    disconnects: bool = False  # leaves by a broken TCP connection, without a word
    slow_factor: float | None = None  # reads at 1/slow_factor of the frame rate; None: as fast as chunks come
    controls: tuple[PlannedControl, ...] = ()  # in the order of `at`

    @property
    def leaves(self) -> float:
        """Seconds since the test began."""
        return self.at + self.seconds


def plan(scenario: Scenario, seed: int) -> list[PlannedStream]:
    """All streams of `scenario`, in the order of arrival; the same for the same two arguments, on every machine.

    `scenario` must name actions and prompts (see `Scenario.in_world`). Shares of the streams are kept to the nearest
    whole number: of 20 streams a `disconnect_share` of .1 breaks exactly two.
    """
    names = ("arrivals", "sessions", "roles", "prompts", "actions", "seeds", "controls")
    draw = {name: random.Random(f"{seed}:{name}") for name in names}
    arrivals: list[float] = []
    begin = 0.0
    for phase in scenario.phases:
        arrivals += [begin + at for at in arrivals_of(phase, draw["arrivals"])]
        begin += phase.seconds
    arrivals.sort()
    breaking, slow = roles(len(arrivals), scenario, draw["roles"])
    streams = []
    for number, at in enumerate(arrivals):
        seconds = draw["sessions"].uniform(*scenario.session_seconds)
        if number in breaking:
            seconds *= draw["roles"].uniform(0.5, 1.0)
        streams.append(
            PlannedStream(
                number,
                at,
                seconds,
                draw["prompts"].choice(scenario.prompts),
                draw["actions"].choice(scenario.actions),
                draw["seeds"].getrandbits(31),
                number in breaking,
                scenario.slow_factor if number in slow else None,
                controls_of(scenario, seconds, draw["controls"].getrandbits(64)),
            )
        )
    return streams


def arrivals_of(phase: Phase, draw: random.Random) -> list[float]:
    """Seconds since the phase began, 0 <= t < phase.seconds; not sorted."""
    times = [phase.burst_seconds * i / max(phase.burst - 1, 1) for i in range(phase.burst)]
    at = 0.0
    while phase.per_minute > 0:
        at += draw.expovariate(phase.per_minute / 60)
        if at >= phase.seconds:
            break
        times.append(at)
    return times


def roles(count: int, scenario: Scenario, draw: random.Random) -> tuple[set[int], set[int]]:
    """The numbers of the streams that disconnect, and of those that read slowly; nobody does both."""
    breaking = math.floor(scenario.disconnect_share * count + 0.5)
    slow = min(math.floor(scenario.slow_share * count + 0.5), count - breaking)
    chosen = draw.sample(range(count), breaking + slow)
    return set(chosen[:breaking]), set(chosen[breaking:])


def controls_of(scenario: Scenario, seconds: float, seed: int) -> tuple[PlannedControl, ...]:
    controls = []
    for kind, pause, values in (
        ("action", scenario.action_seconds, scenario.actions),
        ("prompt", scenario.prompt_seconds, scenario.prompts),
    ):
        draw, at = random.Random(f"{seed}:{kind}"), 0.0
        while pause is not None and (at := at + draw.uniform(*pause)) < seconds:
            controls.append(PlannedControl(at, kind, draw.choice(values)))
    return tuple(sorted(controls, key=lambda control: control.at))


def share(streams: list[PlannedStream], processes: int) -> list[list[PlannedStream]]:
    """The streams of each of `processes` load processes: dealt out in the order of arrival."""
    return [streams[first::processes] for first in range(processes)]
