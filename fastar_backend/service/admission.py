"""Who may come: slots, memory and time are promised before a stream starts, and nobody is evicted to keep a promise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from fastar_backend.errors import AtCapacity
from fastar_backend.service.config import ServiceConfig

CORRECTION = 0.05  # weight of one step in the running correction of the cost
MOST_CORRECTION = 20.0


class Cost:
    """Seconds of a step of n streams: base + each * n, measured at warm-up with full caches, corrected while running.

    measured: n -> seconds. In deterministic execution streams are stepped one by one, so the base is paid by each.
    """

    def __init__(self, measured: Mapping[int, float], deterministic: bool = False) -> None:
        sizes, seconds = np.array(list(measured)), np.array(list(measured.values()))
        slope = np.polyfit(sizes, seconds, 1)[0] if len(sizes) > 1 else 0.0
        self.each = float(np.clip(slope, 0.02 * seconds.min() / sizes.min(), seconds.min() / sizes.min()))
        self.base = max(float((seconds - self.each * sizes).mean()), 0.0)
        if deterministic:
            self.each, self.base = self.each + self.base, 0.0
        self.correction = 1.0

    def __call__(self, streams: int) -> float:
        return self.correction * (self.base + self.each * streams)

    def observe(self, streams: int, seconds: float) -> None:
        """One step as it went. Ratios are averaged in logarithms, so that one hiccup does not close the door."""
        ratio = np.clip(seconds / (self.base + self.each * streams), 1 / MOST_CORRECTION, MOST_CORRECTION)
        self.correction = float(self.correction ** (1 - CORRECTION) * ratio**CORRECTION)

    def utilisation(self, periods: Iterable[float]) -> float:
        """Share of the time booked by streams that each need a chunk every `period` seconds: streams that are due
        together share a step, so the base is paid at the rate of the fastest of them."""
        periods = list(periods)
        if not periods:
            return 0.0
        return self.correction * (self.base / min(periods) + sum(self.each / period for period in periods))


@dataclasses.dataclass(frozen=True)
class Booking:
    """What one stream holds."""

    tenant: str
    cache_bytes: int
    fps: float | None


class Admission:
    """Promises are checked against what the others hold. `hint` is what is known of when something becomes free."""

    def __init__(self, config: ServiceConfig, cost: Cost, chunk_frames: int, cache_bytes: int) -> None:
        self.config, self.cost, self.chunk_frames, self.cache_bytes = config, cost, chunk_frames, cache_bytes

    def check(self, asked: Booking, held: Iterable[Booking], retry_seconds: float) -> None:
        """Raises AtCapacity that says what would fit and when to try again."""
        held = list(held)
        retry = f"retry in {max(1, round(retry_seconds))} s"
        if len(held) >= self.config.max_streams:
            raise AtCapacity(f"streams: {len(held)} are open; allowed: {self.config.max_streams}; {retry}", "streams")
        most = self.config.max_streams_per_tenant or self.config.max_streams
        if (own := sum(other.tenant == asked.tenant for other in held)) >= most:
            raise AtCapacity(f"tenant: it has {own} streams; allowed: {most}; {retry}", "tenant")
        free = self.cache_bytes - sum(other.cache_bytes for other in held)
        if asked.cache_bytes > free:
            what = f"OPTIONS.attention: its caches need {asked.cache_bytes} bytes"
            raise AtCapacity(f"{what}; allowed: at most {max(free, 0)} bytes are free now; {retry}", "memory")
        if asked.fps is not None and not self._fits(asked.fps, held):
            room = math.floor(10 * self.room(held)) / 10  # what is offered must fit
            slower = f"at most {room:.1f} now, or " if room >= 0.1 else ""
            raise AtCapacity(f"fps: got {asked.fps:g}; allowed: {slower}null (as fast as possible); {retry}", "fps")

    def utilisation(self, held: Iterable[Booking]) -> float:
        return self.cost.utilisation(self.chunk_frames / other.fps for other in held if other.fps is not None)

    def room(self, held: Iterable[Booking]) -> float:
        """The highest frame rate that one more stream could have; 0 if none."""
        held = list(held)
        low, high = 0.0, self.config.max_fps
        if self._fits(high, held):
            return high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._fits(middle, held) else (low, middle)
        return low

    def capacity(self, held: Iterable[Booking]) -> int:
        """How many streams there is a place for: those that are held, and as many more, each with the highest frame
        rate and the most bytes that one of them has, as would be admitted. All slots, where nobody is."""
        held = list(held)
        more = self.config.max_streams - len(held)
        if rates := [other.fps for other in held if other.fps is not None]:
            used = self.utilisation(held)
            each = self.utilisation([*held, Booking("", 0, max(rates))]) - used  # the base is paid at that rate already
            more = min(more, math.floor((self.config.utilisation - used) / each))
        if size := max((other.cache_bytes for other in held), default=0):
            more = min(more, (self.cache_bytes - sum(other.cache_bytes for other in held)) // size)
        return len(held) + max(more, 0)

    def _fits(self, fps: float, held: list[Booking]) -> bool:
        return self.utilisation([*held, Booking("", 0, fps)]) <= self.config.utilisation
