"""Who is next: the viewer's clock of a stream, and the choice of a batch by least slack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

BEST_EFFORT_SECONDS = 1.0  # deadline of a chunk without a frame rate, and of every first one: so that nobody starves


class Playout:
    """The clock of a viewer who shows chunks at `fps` and, having run dry, goes on when the next one is there."""

    def __init__(self, fps: float | None) -> None:
        self.fps = fps
        self.dry_at: float | None = None  # when all that was made so far has been shown; None: nothing to show yet
        self.served = 0.0  # when the last chunk was ready: those without a rate take turns

    def deadline(self, arrived: float) -> float:
        """When a chunk asked for at `arrived` is needed (seconds, monotonic, as all times here)."""
        if self.fps is None or self.dry_at is None:
            return max(arrived, self.served) + BEST_EFFORT_SECONDS
        return self.dry_at

    def ready(self, now: float, frames: int) -> float:
        """A chunk of `frames` is ready; returns by how many seconds it came too late for the viewer (0: in time).

        To be called in the order of the batch, with growing `now`: that order decides whose turn is next."""
        self.served = now
        if self.fps is None:
            return 0.0
        late = 0.0 if self.dry_at is None else max(0.0, now - self.dry_at)
        self.dry_at = max(self.dry_at or now, now) + frames / self.fps
        return late

    def change(self, fps: float | None) -> None:
        self.fps = fps

    def restart(self) -> None:
        """After a pause, a rewind: the viewer starts anew with the next chunk."""
        self.dry_at = None


class Due(Protocol):
    deadline: float  # seconds, monotonic


def choose(waiting: Sequence[Due], now: float, cost: Callable[[int], float], most: int) -> list:
    """The next batch: least slack first, then as many more (up to `most`) as let the first one keep its deadline.

    cost(n): seconds of a step of n streams. Where the first is late whatever is done, the batch is filled: then only
    throughput helps.
    """
    ordered = sorted(waiting, key=lambda due: due.deadline)[:most]
    if not ordered or now + cost(1) > ordered[0].deadline:
        return ordered
    size = 1
    while size < len(ordered) and now + cost(size + 1) <= ordered[0].deadline:
        size += 1
    return ordered[:size]
