"""Every named policy that is compared, at one budget: the baselines of the paper's tables and FAST-AR's parts, alone
and together, each with both of its indices. Evaluation and the table test run them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fastar_backend.config import AttentionConfig

Made = Callable[[int, int], AttentionConfig]  # of: budget, latent frames of a chunk
Index = Literal["lsh", "quantised"]
ANNSA_DENSITY = 0.28  # the paper's, of its AnnSA rows


def _window(budget_frames: int, chunk_frames: int) -> AttentionConfig:
    """What stock models do: the first chunk, if there is room for it, and the newest frames."""
    sinks = min(chunk_frames, max(0, budget_frames - chunk_frames))
    return AttentionConfig(kind="window", budget_frames=budget_frames, sink_frames=sinks)


def _fastar(index: Index, **changes: Any) -> Made:
    """This repository's TempCache at the budget (its defaults: docs/decisions.md), with parts switched on."""

    def made(budget_frames: int, chunk_frames: int) -> AttentionConfig:
        # Half of the budget stays whole, whole chunks of it, the clamp's six frames at most.
        recent = max(chunk_frames, min(6, budget_frames // 2) // chunk_frames * chunk_frames)
        return AttentionConfig(
            budget_frames=budget_frames, recent_frames=min(recent, budget_frames), index=index, **changes
        )

    return made


POLICIES: dict[str, Made] = {
    "dense": lambda budget, chunk: AttentionConfig(kind="dense"),
    "window": _window,
    "tempcache-lsh": _fastar("lsh"),
    "tempcache-quant": _fastar("quantised"),
    "fastar-lsh": _fastar("lsh", sparse_density=ANNSA_DENSITY, select_text=True),
    "fastar-quant": _fastar("quantised", sparse_density=ANNSA_DENSITY, select_text=True),
    "paper-recipe": AttentionConfig.paper_recipe,
}
