"""Scenes: what every policy is shown and told alike. A scene has its prompt, its actions and, where the world is the
game's, the frames that the game really showed under them."""

from __future__ import annotations

import dataclasses
import os
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from fastar_backend.evaluation import game
from fastar_backend.model.world_config import WorldConfig

Kind = Literal["walk", "away", "circle"]
CONTEXT = 4  # latent frames of true history that a free rollout begins from
AWAY, BACK = 16, 20  # latent frames of turning away, and of turning back
CIRCLE = 56  # of turning on: two full turns
TRIES = 6  # games that are played until one lives as long as the scene


@dataclasses.dataclass(frozen=True)
class Scene:
    """actions: one for each latent frame. frames: uint8 [latent frames, frames of one, height, width, 3], and poses
    float [latent frames, 3] (x, y, degrees), or None where there is no game; both may end before the actions do."""

    name: str
    scenario: str
    prompt: str
    actions: tuple[str, ...]
    frames: np.ndarray | None
    poses: np.ndarray | None


def why_no_truth(world: WorldConfig) -> str | None:
    """Why the game's frames cannot be compared with the world's; None if they can."""
    if world.model.action_dim == 0:
        return "this world takes no actions"
    same = (world.buttons, world.height, world.width, world.frames_per_latent) == (
        game.BUTTONS, game.HEIGHT, game.WIDTH, game.FRAMES_PER_LATENT,
    )  # fmt: skip
    if not same or not set(world.scenarios) <= {scenario.name for scenario in game.SCENARIOS}:
        return "no game is known that this world is of"
    return game.missing()


def scene_name(kind: Kind, scenario: str, seed: int) -> str:
    return f"{kind}-{scenario or 'world'}-{seed}"


def make(world: WorldConfig, kind: Kind, scenario: str, seed: int, latents: int, truth: bool) -> Scene:
    """Plays (if truth) and returns the scene; the same one for the same arguments. latents: of a walk."""
    rng = np.random.default_rng([seed, *scenario.encode()])
    actions = _actions(world, kind, scenario, rng, latents)
    prompt = world.scenarios[scenario].prompt if scenario else "a world"
    frames = poses = None
    for attempt in range(TRIES if truth else 0):
        played = game.play(scenario, list(actions), game.HELD_OUT + 100 * seed + attempt)
        if frames is None or len(played[0]) > len(frames):
            frames, poses = played
        if len(frames) == len(actions):
            break
    return Scene(scene_name(kind, scenario, seed), scenario, prompt, actions, frames, poses)


def _actions(world: WorldConfig, kind: Kind, scenario: str, rng: np.random.Generator, latents: int) -> tuple[str, ...]:
    if kind == "walk":
        known = next((s for s in game.SCENARIOS if s.name == scenario), None)
        if known is None or not set(world.buttons) >= set(game.BUTTONS):
            choices = ("", *world.buttons) if world.model.action_dim else ("",)
            held = (str(rng.choice(choices)) for _ in range(latents))
            return tuple(action for action in held for _ in range(4))[:latents]
        return tuple(islice(game.behaviour(known, rng), latents))
    wander = ["forward"] * int(rng.integers(0, 8)) + ["turn_right"] * int(rng.integers(2, 12))
    turns = ["turn_left"] * CIRCLE if kind == "circle" else ["turn_left"] * AWAY + ["turn_right"] * BACK
    return (*wander, *turns)


def save(scene: Scene, folder: Path) -> None:
    arrays = {"frames": scene.frames, "poses": scene.poses}
    write_arrays(folder / f"{scene.name}.npz", {
        "scenario": np.array(scene.scenario), "prompt": np.array(scene.prompt), "actions": np.array(scene.actions),
        **{key: value for key, value in arrays.items() if value is not None},
    })  # fmt: skip


def load(folder: Path, name: str) -> Scene:
    """Raises OSError where there is none."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        found = {key: file[key] for key in file.files}
    return Scene(
        name, str(found["scenario"]), str(found["prompt"]), tuple(map(str, found["actions"])),
        found.get("frames"), found.get("poses"),
    )  # fmt: skip


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """The whole file or none: what a killed run leaves is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    partial.replace(path)
