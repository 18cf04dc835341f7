"""A world with random weights of the game's shape and buttons, a suite of seconds, and `fastar eval` in-process."""

from __future__ import annotations

import copy
from pathlib import Path

import random_world
import typer

from fastar_backend import cli
from fastar_backend.evaluation import game, suites

SCENARIOS = ("my_way_home", "health_gathering")
SMALL = suites.Suite(
    frames=16, scenarios=2, forced_latents=22, forced_every=2, forced_scenarios=1, revisit_scenarios=1,
    revisit_every=6, drift_frames=24, marks=(24,), parts=("rollout", "forced", "revisit"),
)  # fmt: skip


def write(folder: Path) -> Path:
    config = copy.deepcopy(random_world.CONFIG)
    prompts = {name: {"prompt": name.replace("_", " "), "keywords": [name]} for name in SCENARIOS}
    config |= {"name": "gameworld", "buttons": list(game.BUTTONS), "starts": {}, "scenarios": prompts}
    config["model"] |= {"latent_height": 8, "latent_width": 12, "action_dim": 7}
    return random_world.write(folder, config)


def fastar(*arguments: object) -> None:
    """Raises what the command would say."""
    typer.main.get_command(cli.app)(["eval", *map(str, arguments)], standalone_mode=False)
