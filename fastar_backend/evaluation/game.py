"""The true engine of the embedded world: ViZDoom (MIT; Freedoom assets, BSD), scenario by scenario.

A latent frame is two video frames, 2 tics apart, under one action; so one action lasts 4 tics (35 tics a second). The
player is a random walker made to revisit places: actions are held for a few steps, it often spins a full turn or looks
away and back, so that what was seen long ago becomes visible again. Needs the extra `eval` (vizdoom, opencv)."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Iterator

import numpy as np

BUTTONS = ("forward", "backward", "left", "right", "turn_left", "turn_right", "attack")
HEIGHT, WIDTH = 64, 96
FRAMES_PER_LATENT = 2
TICS_PER_FRAME = 2
HELD_OUT = 70001  # the first game seed that training never used
OPPOSITE = {"turn_left": "turn_right", "turn_right": "turn_left", "left": "right", "right": "left",
            "forward": "backward", "backward": "forward"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scenario:
    name: str
    held: dict[str, float]  # relative odds of each held action
    share: float = 1.0  # of the play recorded: the scenarios with more to learn get more


WALK = {"forward": 4, "forward+turn_left": 2, "forward+turn_right": 2, "turn_left": 2, "turn_right": 2, "backward": 1,
        "left": 1, "right": 1, "": 0.7, "attack": 0.4, "forward+attack": 0.4}  # fmt: skip
STAND = {"turn_left": 3, "turn_right": 3, "attack": 2, "turn_left+attack": 1, "turn_right+attack": 1, "": 1,
         "forward": 0.7, "backward": 0.5, "left": 0.5, "right": 0.5}  # fmt: skip
STRAFE = {"left": 3, "right": 3, "": 1, "attack": 1.5, "left+attack": 1, "right+attack": 1, "turn_left": 0.8,
          "turn_right": 0.8, "forward": 0.8, "backward": 0.8}  # fmt: skip
CORRIDOR = {"forward": 4, "backward": 3, "left": 1, "right": 1, "turn_left": 1, "turn_right": 1, "attack": 1.5,
            "forward+attack": 1, "": 0.5}  # fmt: skip
SCENARIOS = (
    Scenario("my_way_home", WALK, 2.5),
    Scenario("basic", STRAFE),
    Scenario("deadly_corridor", CORRIDOR, 1.5),
    Scenario("health_gathering", WALK),
    Scenario("defend_the_center", STAND),
    Scenario("take_cover", STRAFE),
)


def missing() -> str | None:
    """Why the game cannot be played here; None if it can."""
    lacking = [name for name in ("vizdoom", "cv2") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(lacking)} not installed (pip install 'fastar-serve[eval]')" if lacking else None


def vector(action: str) -> np.ndarray:
    """Multi-hot uint8 [7] of a '+'-joined action name."""
    pressed = action.split("+") if action else []
    return np.array([name in pressed for name in BUTTONS], dtype=np.uint8)


class Game:
    """One headless ViZDoom scenario with all seven buttons; frames are 64x96 RGB, averaged down from 160x120."""

    def __init__(self, scenario: str, seed: int) -> None:
        import vizdoom

        self.game = vizdoom.DoomGame()
        self.game.load_config(f"{vizdoom.scenarios_path}/{scenario}.cfg")
        self.game.set_available_buttons(
            [getattr(vizdoom.Button, name) for name in
             ("MOVE_FORWARD", "MOVE_BACKWARD", "MOVE_LEFT", "MOVE_RIGHT", "TURN_LEFT", "TURN_RIGHT", "ATTACK")]
        )  # fmt: skip
        self.game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        self.game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        self.game.set_window_visible(False)
        self.game.set_render_hud(False)
        self.game.set_render_crosshair(False)
        self.game.set_render_weapon(True)
        self.game.set_render_messages(False)
        self.game.set_episode_timeout(0)
        self.game.set_doom_skill(1)
        self.game.set_seed(seed)
        self.game.set_doom_config_path(f"{tempfile.gettempdir()}/vizdoom-{os.getpid()}.ini")  # else in the work folder
        self.game.add_game_args("+sv_cheats 1")
        self.game.init()
        self.reset()

    def reset(self) -> None:
        self.game.new_episode()
        self.game.send_game_command("god")
        self.game.advance_action(2)

    def frame(self) -> np.ndarray:
        """uint8 [64, 96, 3]: the middle 107 of 120 rows (96:64 is 3:2), area-averaged by 5/3."""
        screen = self.game.get_state().screen_buffer[6:113]  # 107 x 160
        import cv2

        return cv2.resize(screen, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)

    def pose(self) -> tuple[float, float, float]:
        """Of the player: x and y in map units, direction in degrees (0..360, growing to the left)."""
        from vizdoom import GameVariable as Variable

        return tuple(map(self.game.get_game_variable, (Variable.POSITION_X, Variable.POSITION_Y, Variable.ANGLE)))

    def step(self, action: np.ndarray) -> list[np.ndarray] | None:
        """The two frames under one action, or None when the episode ended."""
        frames = []
        for _ in range(FRAMES_PER_LATENT):
            self.game.make_action(action.tolist(), TICS_PER_FRAME)
            if self.game.is_episode_finished():
                return None
            frames.append(self.frame())
        return frames

    def close(self) -> None:
        self.game.close()


def behaviour(scenario: Scenario, rng: np.random.Generator, again: float = 1.0) -> Iterator[str]:
    """Endless held actions: random ones, full spins, and look-away-and-back; `again` times as many of these."""
    names, odds = list(scenario.held), np.array(list(scenario.held.values()), dtype=float)
    odds /= odds.sum()
    while True:
        kind = rng.random()
        if kind < 0.03 * again:
            yield from [str(rng.choice(["turn_left", "turn_right"]))] * int(rng.integers(16, 56))
        elif kind < 0.10 * again:
            away, length = str(rng.choice(list(OPPOSITE))), int(rng.integers(4, 24))
            yield from [away] * length
            yield from [""] * int(rng.integers(0, 4))
            yield from [OPPOSITE[away]] * length
        else:
            yield from [str(rng.choice(names, p=odds))] * int(rng.integers(1, 13))


def play(scenario: str, actions: list[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The game under `actions`, as long as its episode lasts: frames uint8 [n, 2, H, W, 3] and the player's pose at the
    end of each action, float [n, 3]; n <= len(actions)."""
    game, frames, poses = Game(scenario, seed), [], []
    for action in actions:
        pair = game.step(vector(action))
        if pair is None:
            break
        frames.append(np.stack(pair))
        poses.append(game.pose())
    game.close()
    shape = (0, FRAMES_PER_LATENT, HEIGHT, WIDTH, 3)
    return (np.stack(frames), np.array(poses)) if frames else (np.zeros(shape, np.uint8), np.zeros((0, 3)))
