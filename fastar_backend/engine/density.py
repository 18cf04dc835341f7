"""The quality guard's controller: how dense AnnSA must be for its sampled recall to stay above a floor.

The mean recall since the last change is steered into a band above the floor. Below it the density rises at once where
recall is far off, else within a few chunks, in proportion to the mass that is lost, up to twofold; above it the density
falls after `PATIENCE` chunks, by a fifth at most. Within the band nothing moves: it is wider than what one step
changes. A fall that has to be taken back makes the next one wait twice as long and be smaller, so that a floor which
only dense attention reaches is not tried again and again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

DENSITY_MIN = 0.05
BAND = 0.3  # width, as a share of the mass that the floor allows to lose
MEMORY = 8  # chunks: the mean forgets what is older
SURE = 4  # chunks whose mean is believed; fewer have to be further below the floor
PATIENCE = 8  # chunks above the band before the density falls
MOST_PATIENCE = 64
RISE, FALL = 2.0, 0.8  # the largest steps


@dataclasses.dataclass(frozen=True)
class Density:
    """State between two chunks. value: the density in force; recall: its mean recall so far, over `seen` chunks."""

    value: float
    recall: float = 1.0
    seen: int = 0
    patience: int = PATIENCE
    fell: bool = False  # the last change was a fall

    @classmethod
    def load(cls, numbers: dict[str, Any]) -> Density:
        """From `dataclasses.asdict`, of a snapshot. Raises TypeError, ValueError."""
        state = cls(**numbers)
        if not (0 < state.value <= 1 and 0 <= state.recall <= 1 and state.seen >= 0 and state.patience > 0):
            raise ValueError(f"density is {numbers!r:.80}")
        return state

    def after(self, recall: float, floor: float) -> Density:
        """The state for the next chunk. recall: measured in the last one, 0..1; floor: 0..1."""
        seen = self.seen + 1
        mean = self.recall + (recall - self.recall) / min(seen, MEMORY)
        band = BAND * (1 - floor)
        aim = 1 - floor - band / 2  # of the mass lost
        doubt = 0.0 if seen >= SURE else 2 * band / seen
        if mean < floor - doubt:
            value = min(1.0, self.value * min(RISE, (1 - mean) / max(aim, 1e-9)))
            return Density(value, patience=min(2 * self.patience, MOST_PATIENCE) if self.fell else self.patience)
        if mean > floor + band and seen >= self.patience and self.value > DENSITY_MIN:
            step = max(FALL, (1 - mean) / aim) ** (PATIENCE / self.patience)
            patience = max(PATIENCE, self.patience // 2) if self.fell else self.patience
            return Density(max(DENSITY_MIN, self.value * step), patience=patience, fell=True)
        return Density(self.value, mean, seen, self.patience, self.fell)
