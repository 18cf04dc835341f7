"""Whether a pod is fit for new streams, from its last readings. Changes of mind take time, both ways."""

from __future__ import annotations

import collections
import dataclasses

from fastar_controller.scrape import Reading

TENTH = 0.1


@dataclasses.dataclass(frozen=True)
class Limits:
    """target: frames per second that viewers were promised. window: seconds over which rates are looked at.
    hold: seconds that a pod must be below the target until it is closed, and above until it is opened. misses: scrapes
    without an answer until it is closed."""

    target: float = 16.0
    window: float = 60.0
    hold: float = 30.0
    misses: int = 3


class Health:
    """Of one pod."""

    def __init__(self) -> None:
        self.last: Reading | None = None
        self.missed = 0
        self.slow = False
        self._since: float | None = None  # when its rate began to say otherwise than `slow`
        self._past: collections.deque[tuple[float, dict[float, float]]] = collections.deque()

    def miss(self) -> None:
        """No answer; the last one still counts."""
        self.missed += 1

    def see(self, reading: Reading, now: float, limits: Limits) -> None:
        """now: seconds of a clock that never goes back."""
        self.missed, self.last = 0, reading
        if self._past and any(reading.rates.get(le, 0.0) < was for le, was in self._past[-1][1].items()):
            self._past.clear()  # the server has started anew
        self._past.append((now, reading.rates))
        while len(self._past) > 2 and now - self._past[1][0] >= limits.window:
            self._past.popleft()
        rate = slowest_tenth(self._past[0][1], reading.rates)
        below = rate is not None and rate < limits.target  # nobody watches: nobody suffers
        if below == self.slow:
            self._since = None
        elif self._since is None:
            self._since = now
        if self._since is not None and now - self._since >= limits.hold:
            self.slow, self._since = below, None

    def fit(self, limits: Limits) -> bool:
        return self.last is not None and self.missed < limits.misses and not self.slow and not self.last.draining


def slowest_tenth(before: dict[float, float], after: dict[float, float]) -> float | None:
    """p10 of what was observed in between, frames per second; None if nothing was. It is the upper bound of the bucket
    that holds it: within a bucket nobody knows, and a stream at exactly the target is not slow."""
    seen = {le: count - before.get(le, 0.0) for le, count in sorted(after.items())}
    total = seen.get(float("inf"), 0.0)
    if total <= 0:
        return None
    return next(le for le, count in seen.items() if count >= TENTH * total)
