"""Whether the figures keep what viewers are owed, and by how much they miss it."""

from __future__ import annotations

import dataclasses
import math

from fastar_client.load.measure import Totals
from fastar_client.load.scenario import Scenario


@dataclasses.dataclass(frozen=True)
class Target:
    name: str
    value: float | None  # None: not measured
    limit: float
    at_least: bool  # else at most
    unit: str
    met: bool

    @property
    def mark(self) -> str:
        return "MISSED" if not self.met else "kept" if self.value is not None else "not measured"

    def __str__(self) -> str:
        """One line: what, its limit, and by how much it was missed or kept."""
        bound = f"{'at least' if self.at_least else 'at most'} {self.limit:.4g}{self.unit}"
        if self.value is None:
            return f"{self.name}: target: {bound}" if self.met else f"{self.name}: not measured; target: {bound}"
        if math.isinf(self.value):
            return f"{self.name}: never; target: {bound}"
        got = f"{self.name}: {self.value:.4g}{self.unit}; target: {bound}"
        return got if self.met else f"{got}; missed by {abs(self.value - self.limit):.3g}{self.unit}"


def verdict(totals: Totals, scenario: Scenario) -> list[Target]:
    """The targets that apply. Those of a frame rate need paced streams; without these only lost streams are judged.

    What was not measured is missed, but for controls (a scenario may have none) and slow-down (which takes 100 steady
    chunks).
    """
    slo = scenario.slo
    targets = [target("lost streams", totals.lost, slo.lost)]
    if scenario.paced:
        share = slo.p5_fps_share
        slower = None if totals.slow_down is None else totals.slow_down["p95"] - 1
        targets += [
            target(
                "p5 of the streams' FPS", of(totals.fps, "p5"), None if share is None else share * scenario.fps, True
            ),
            target("continuous play", of(totals.continuous_play, "mean"), slo.continuous_play, True),
            target("rebuffer ratio", totals.rebuffer, slo.rebuffer),
            target("p95 of the time to the first chunk", of(totals.ttfc, "p95"), slo.ttfc_p95_seconds, unit=" s"),
            target(
                "p95 of control latency",
                of(totals.control_periods, "p95"),
                slo.control_p95_periods,
                unit=" chunk periods",
                optional=True,
            ),
            target("p95 of the streams' slow-down", slower, slo.slow_down, optional=True),
        ]
    return [each for each in targets if each is not None]


def target(
    name: str,
    value: float | None,
    limit: float | None,
    at_least: bool = False,
    unit: str = "",
    optional: bool = False,
) -> Target | None:
    """optional: it is met where it was not measured."""
    if limit is None:
        return None
    met = optional if value is None else bool(value >= limit if at_least else value <= limit)
    return Target(name, value, limit, at_least, unit, met)


def of(spread: dict[str, float] | None, name: str) -> float | None:
    return None if spread is None else spread[name]
