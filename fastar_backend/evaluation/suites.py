"""What a run of `fastar eval` measures: its settings, sizes of the suites, and the settings that ablations vary."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from fastar_backend.attention.policies import POLICIES
from fastar_backend.config import AttentionConfig, Config
from fastar_backend.engine.checks import check_attention
from fastar_backend.errors import InvalidInput
from fastar_backend.model.world_config import WorldConfig

Part = Literal["rollout", "forced", "revisit", "drift", "speed"]
PARTS: tuple[Part, ...] = ("rollout", "forced", "revisit", "drift", "speed")
DRIFT = ("window", "tempcache-quant", "fastar-quant")  # of those chosen; on a GPU dense attention, too


class Suite(Config):
    """Sizes. Scenarios are the world's first so many, in an order that mixes kinds of play."""

    frames: int  # video frames of a free rollout
    scenarios: int
    seeds: int = 1
    forced_latents: int  # latent frames of true history that are played through
    forced_every: int  # chunks between two that are predicted
    forced_scenarios: int
    revisit_scenarios: int
    revisit_kinds: tuple[str, ...] = ("away", "circle")
    revisit_every: int = 1  # of the chunks in which a place returns, one in so many is predicted
    drift_frames: int
    marks: tuple[int, ...]  # video frames of history at which speed is measured
    parts: tuple[Part, ...] = PARTS


SUITES = {
    "quick": Suite(
        frames=64, scenarios=3, forced_latents=72, forced_every=14, forced_scenarios=2, revisit_scenarios=2,
        revisit_kinds=("away",), revisit_every=2, drift_frames=240, marks=(24, 240, 960),
    ),
    "full": Suite(
        frames=720, scenarios=6, seeds=3, forced_latents=160, forced_every=8, forced_scenarios=6, revisit_scenarios=4,
        drift_frames=2880, marks=(24, 120, 240, 480, 960, 1920, 2880),
    ),
    "ablations": Suite(
        frames=96, scenarios=3, forced_latents=72, forced_every=14, forced_scenarios=3, revisit_scenarios=2,
        revisit_kinds=("away",), revisit_every=2, drift_frames=480, marks=(24, 240),
        parts=("rollout", "forced", "revisit"),
    ),
}  # fmt: skip
# Of the embedded world: a mix of kinds of play however many are taken. A world's others follow.
ORDER = ("health_gathering", "my_way_home", "defend_the_center", "take_cover", "basic", "deadly_corridor")


class Settings(Config):
    """All that a unit's result depends on; a folder of results belongs to one of these."""

    world: str  # as it was given, for loading
    name: str
    fingerprint: str  # of the world's weights and configuration
    device: str
    truth: str | None  # why there are no true frames; None: there are
    buttons: bool  # whether the world takes actions
    suite: str
    sizes: Suite
    budget: int = Field(ge=1)
    seed: int = Field(ge=0)
    scenarios: tuple[str, ...]
    lpips: bool
    versions: dict[str, str]


def scenarios_of(world: WorldConfig) -> tuple[str, ...]:
    """Names in the order in which suites take them; a world without any has one without a name."""
    known = [name for name in ORDER if name in world.scenarios]
    return (*known, *(name for name in world.scenarios if name not in known)) or ("",)


def ablations(budget: int) -> dict[str, dict[str, Any]]:
    """Name (without a comma: `--policies` separates by them) -> what differs from FAST-AR's default settings."""
    return {
        "fastar default": {},
        "threshold .8": {"merge_threshold": 0.8},
        "threshold .9": {"merge_threshold": 0.9},
        "threshold .99": {"merge_threshold": 0.99},
        "representative mean": {"representative": "mean"},
        "weight none": {"weight": "none"},
        "weight effective": {"weight": "effective"},
        "matched by queries": {"match": "query"},
        "merged early": {"merge_early": True},
        "overflow dropped": {"fold_threshold": 1.0},
        "overflow folded however far": {"fold_threshold": -1.0},
        "index exact": {"index": "exact"},
        "index LSH of 4 bits": {"index": "lsh", "index_bits": 4},
        "index LSH of 8 bits": {"index": "lsh", "index_bits": 8},
        "index LSH of 12 bits": {"index": "lsh", "index_bits": 12},
        "index LSH with 1 table": {"index": "lsh", "index_tables": 1},
        "index LSH with 8 tables": {"index": "lsh", "index_tables": 8},
        "budget 8": {"budget_frames": 8},
        "budget 16": {"budget_frames": 16},
        "budget 24": {"budget_frames": 24},
        "newest 2 whole": {"recent_frames": 2},
        "newest 4 whole": {"recent_frames": 4},
        "newest 8 whole": {"recent_frames": 8},
        "AnnSA 50 %": {"sparse_density": 0.5},
        "AnnSA 25 %": {"sparse_density": 0.25},
        "AnnSA 25 % in blocks of 24": {"sparse_density": 0.25, "sparse_block": 24},
        "AnnSA 25 % in blocks of 96": {"sparse_density": 0.25, "sparse_block": 96},
        "AnnSA 25 % in all steps": {"sparse_density": 0.25, "dense_steps": 0.0},
        "AnnSA 25 % in the writing pass only": {"sparse_density": 0.25, "dense_steps": 1.0},
        "AnnCA": {"select_text": True},
        "AnnCA 90 %": {"select_text": True, "text_mass": 0.9},
        "AnnCA by buckets": {"select_text": True, "text_mass": None},
    }


def choose(names: str, suite: str, budget: int, chunk_frames: int) -> dict[str, AttentionConfig]:
    """Policies by name, dense first: those of the suite that `names` ("all", or separated by commas) names. Raises
    InvalidInput (--policies, --budget)."""
    table = {name: (lambda made=made: made(budget, chunk_frames)) for name, made in POLICIES.items()}
    if suite == "ablations":
        changed = {
            name: (lambda change=change: AttentionConfig(**{"budget_frames": budget, **change}))
            for name, change in ablations(budget).items()
        }
        table = {"dense": table["dense"], "window": table["window"], **changed}
    wanted = list(table) if names == "all" else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in table:
            raise InvalidInput("--policies", f"unknown policy {name!r:.40}", f"all, or some of {', '.join(table)}")
    found = {}
    for name in dict.fromkeys(["dense", *wanted]):
        try:
            found[name] = table[name]()
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InvalidInput("--budget", f"{budget} latent frames are too few for {name}", message) from None
        check_attention(found[name], chunk_frames, f"--budget ({name})")
    return found
