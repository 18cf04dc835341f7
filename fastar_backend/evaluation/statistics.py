"""Means with confidence intervals over runs (seeds and scenarios)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """half: half the width of Student's 95 % interval of the mean; None for fewer than two values."""

    mean: float
    half: float | None
    count: int

    def text(self, digits: int, scale: float = 1.0) -> str:
        half = "" if self.half is None else f" ± {scale * self.half:.{digits}f}"
        return f"{scale * self.mean:.{digits}f}{half}"

    def as_json(self) -> dict[str, float | int | None]:
        return dataclasses.asdict(self)


def estimate(values: Iterable[float]) -> Estimate | None:
    """None where there is no value."""
    found = np.array([value for value in values if value is not None], dtype=float)
    if not len(found):
        return None
    half = None
    if len(found) > 1:
        from scipy.stats import t  # half a second: not for --help

        quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(found) - 1))
        half = quantile * float(found.std(ddof=1)) / len(found) ** 0.5
    return Estimate(float(found.mean()), half, len(found))
