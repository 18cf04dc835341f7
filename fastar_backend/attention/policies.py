"""Every named policy that is compared, at one budget: the baselines of the paper's tables and FAST-AR's parts, alone
and together, each with both of its indices. Evaluation and the table test run them all.

The budget is that of a window, of FlowCache and of TempCache. The others keep the whole history, as in their papers:
AnnSA and AnnCA by themselves, too. AnnCA chooses by the paper's buckets where the index is LSH and in the paper's
recipe, by attention mass where it is quantised (attention/ann_ca.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fastar_backend.config import AttentionConfig, BaselineConfig

Made = Callable[[int, int], AttentionConfig]  # of: budget, latent frames of a chunk
Index = Literal["lsh", "quantised"]
ANNSA_DENSITY = 0.28  # the paper's, of its AnnSA rows
RADIAL_DENSE = 12 / 50  # first steps of the public code's that stay dense
# The papers' warm-up of 5 passes is of 50 or more; of the 3 to 5 of a distilled sampler the first is as large a share.
REUSE = {"baseline": BaselineConfig(reuse_warm_up=1)}


def _window(budget_frames: int, chunk_frames: int) -> AttentionConfig:
    """What stock models do: the first chunk, if there is room for it, and the newest frames."""
    sinks = min(chunk_frames, max(0, budget_frames - chunk_frames))
    return AttentionConfig(kind="window", budget_frames=budget_frames, sink_frames=sinks)


def _flowcache(budget_frames: int, chunk_frames: int) -> AttentionConfig:
    return AttentionConfig(kind="flowcache", budget_frames=budget_frames, reuse="flowcache", **REUSE)


def _whole(kind: str = "dense", **changes: Any) -> Made:
    """Without a budget."""
    return lambda budget_frames, chunk_frames: AttentionConfig(kind=kind, **changes)


def _fastar(index: Index, **changes: Any) -> Made:
    """This repository's TempCache at the budget (its defaults: docs/decisions.md), with parts switched on."""

    def made(budget_frames: int, chunk_frames: int) -> AttentionConfig:
        # Half of the budget stays whole, in whole chunks, six frames at most.
        recent = max(chunk_frames, min(6, budget_frames // 2) // chunk_frames * chunk_frames)
        return AttentionConfig(
            budget_frames=budget_frames, recent_frames=min(recent, budget_frames), index=index, **changes
        )

    return made


POLICIES: dict[str, Made] = {
    "dense": _whole(),
    "window": _window,
    "teacache": _whole(reuse="teacache", **REUSE),
    "flowcache": _flowcache,
    "radial": _whole("radial", dense_steps=RADIAL_DENSE),
    "svg1": _whole("svg1"),
    "svg2": _whole("svg2"),
    "flowcache+radial": _whole("radial", dense_steps=RADIAL_DENSE, reuse="flowcache", **REUSE),
    "tempcache-lsh": _fastar("lsh"),
    "tempcache-quant": _fastar("quantised"),
    "annsa-lsh": _whole(index="lsh", sparse_density=ANNSA_DENSITY),
    "annsa-quant": _whole(index="quantised", sparse_density=ANNSA_DENSITY),
    "annca-lsh": _whole(index="lsh", select_text=True),
    "annca-quant": _whole(index="quantised", select_text=True),
    "fastar-lsh": _fastar("lsh", sparse_density=ANNSA_DENSITY, select_text=True),
    "fastar-quant": _fastar("quantised", sparse_density=ANNSA_DENSITY, select_text=True),
    "paper-recipe": AttentionConfig.paper_recipe,
}
