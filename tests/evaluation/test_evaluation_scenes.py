"""What moves, what returns and what counts: motion on synthetic shifts, returning columns by rays, the true game."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from fastar_backend.evaluation import game, motion, revisit, scenes

GAME = pytest.mark.skipif(game.missing() is not None, reason="the game is not installed")


def texture(seed: int, height: int = 64, width: int = 400) -> np.ndarray:
    import cv2

    rough = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return cv2.resize(rough, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("shift", [-14, -3, 3, 9, 14])
def test_shift_is_measured(shift):
    wide = texture(abs(shift))
    before, after = wide[:, 100:196], wide[:, 100 - shift : 196 - shift]
    assert motion.signature(before, after)[0] == pytest.approx(shift, abs=0.6)


@pytest.mark.parametrize("growth", [-0.06, -0.03, 0.03, 0.06])
def test_growth_is_measured(growth):
    import cv2

    before = texture(7, 64, 96)
    turn = cv2.getRotationMatrix2D((47.5, 31.5), 0, 1 + growth)
    after = cv2.warpAffine(before, turn, (96, 64), borderMode=cv2.BORDER_REFLECT)
    found = motion.signature(before, after)
    assert np.sign(found[1]) == np.sign(growth)
    assert abs(found[1]) > motion.LEAST[1]
    assert abs(found[0]) < motion.LEAST[0]


def pan(steps: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The first frame, and latent frames [n, 2, ...] whose picture moves right by so many pixels a frame."""
    wide, at, frames = texture(11), 150, []
    for step in steps:
        for _ in range(2):
            at -= step
            frames.append(wide[:, at : at + 96])
    return wide[:, 150:246], np.stack(frames).reshape(-1, 2, 64, 96, 3)


def test_following_counts_what_the_game_shows():
    first, truth = pan([5, 5, -5, 0, 5])
    _, video = pan([5, 0, 5, 5, 5])
    actions = ("turn_left", "turn_left", "turn_right", "turn_left", "turn_left+forward")
    found = motion.following(actions, video, truth, first)
    # The fourth is told, but the game does not move; the fifth says two things at once.
    assert (found["turn"].told, found["turn"].obeyed) == (3, 1)
    assert found["walk"].told == found["step aside"].told == 0
    assert motion.following(actions, truth, truth, first)["turn"].obeyed == 3


@GAME
def test_the_game_moves_as_told():
    actions = [a for a in ("turn_left", "turn_right", "forward", "turn_left", "turn_right") for _ in range(6)]
    frames, poses = game.play("health_gathering", actions, game.HELD_OUT + 9)
    assert frames.shape == (30, 2, 64, 96, 3)
    assert poses[5, 2] - poses[0, 2] == pytest.approx(5 * 14.06, abs=3)
    for index in (2, 3, 4, 8, 9, 10, 20, 21, 22, 26, 27, 28):
        assert motion.moves_as_told(actions[index], frames[index - 1][-1], frames[index]), (index, actions[index])
    walked = [motion.moves_as_told("forward", frames[i - 1][-1], frames[i]) for i in range(13, 18)]
    assert sum(walked) >= 3
    assert not motion.moves_as_told("turn_right", frames[2][-1], frames[3])


@GAME
def test_scenes_are_repeatable_and_survive_a_file(tmp_path, doom_world):
    one, two = (scenes.make(doom_world.config, "away", "my_way_home", 3, 0, True) for _ in range(2))
    assert one.actions == two.actions
    assert len(one.actions) == len(one.frames)
    assert np.array_equal(one.frames, two.frames)
    other = scenes.make(doom_world.config, "walk", "my_way_home", 4, 20, True)
    assert len(other.actions) == 20
    scenes.save(one, tmp_path)
    read = scenes.load(tmp_path, one.name)
    assert (read.actions, read.prompt, read.scenario) == (one.actions, one.prompt, "my_way_home")
    assert np.array_equal(read.poses, one.poses)


@GAME
def test_returning_columns_hold_what_was_seen_before(doom_world):
    """On the true game: in the second view's returning columns stands what stood there in the first view."""
    scene = scenes.make(doom_world.config, "away", "my_way_home", 0, 0, True)
    chosen = revisit.plan(scene.poses, 2, 12, 96, 1)
    assert len(chosen) >= 4
    agreed = 0
    for chunk, columns in chosen.items():
        index = 2 * chunk + 1
        first = revisit.first_view(scene.poses, index, 2 * chunk - 12)
        if first is not None:
            error = np.square(scene.frames[index, -1].astype(float) - scene.frames[first, -1]).mean((0, 2))
            assert error[columns[1]].mean() < 40
            agreed += 1
    assert agreed >= 3


def spin(degrees: list[float]) -> np.ndarray:
    return np.array([[10.0, -4.0, angle % 360] for angle in degrees])


def test_returning_columns_by_rays():
    """Each column's ray is looked for in the pictures of all earlier poses, one by one."""
    angles = [*np.arange(0, 150, 13.0), *np.arange(150, 0, -13.0)]
    poses = spin(angles)
    window, size, width = 4, 2, 41
    some = 0
    for begin in range(size, len(poses) - 1, size):
        for index in (begin, begin + 1):
            found = revisit.returning(poses, index, begin, window, width)
            for column in range(width):
                x = (column + 0.5 - width / 2) / (width / 2)
                ray = angles[index] - np.degrees(np.arctan(x))

                def visible(time: int, ray: float = ray) -> bool:
                    return abs((angles[time] - ray + 180) % 360 - 180) <= 45

                old = any(visible(time) for time in range(max(0, begin - window)))
                held = any(visible(time) for time in range(max(0, begin - window), begin))
                assert found[column] == (old and not held)
                some += found[column]
    assert some > 50


def test_nothing_returns_from_another_place():
    poses = spin([*np.arange(0, 150, 13.0), *np.arange(150, 0, -13.0)])
    poses[:12, 0] += 50
    assert revisit.plan(poses, 2, 4, 41, 1) == {}
    assert revisit.first_view(poses, 22, 12) is None


def test_a_world_of_another_game_has_no_truth(world, doom_world):
    assert scenes.why_no_truth(world.config) == "no game is known that this world is of"
    dumb = world.config.model_copy(update={"model": world.config.model.model_copy(update={"action_dim": 0})})
    assert scenes.why_no_truth(dumb) == "this world takes no actions"
    walk = scenes.make(dumb, "walk", "maze", 0, 9, False)
    assert walk.actions == ("",) * 9
    assert walk.frames is None


def test_without_vizdoom_there_is_no_truth(doom_world, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vizdoom" else found(name))
    assert "vizdoom not installed" in scenes.why_no_truth(doom_world.config)
