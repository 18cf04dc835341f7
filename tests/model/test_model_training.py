"""What the embedded world's training draws its windows by, against loops."""

from __future__ import annotations

import numpy as np
import torch

from training.collect import AWAY, since_last_there
from training.train import Windows


def test_a_pose_is_seen_again_after_being_away():
    rng = np.random.default_rng()
    places = np.array([[0.0, 0.0, 359.5], [0.0, 0.0, 1.0], [50.0, 0.0, 1.0], [0.0, 50.0, 90.0], [3.0, 3.0, 0.5]])
    poses = places[rng.integers(0, len(places), 90)]
    poses[30:50] = places[3]  # long enough away from all others
    found = since_last_there(poses)
    for now, (x, y, angle) in enumerate(poses):
        turned = (poses[:now, 2] - angle + 180) % 360 - 180
        before = np.flatnonzero((abs(poses[:now, :2] - (x, y)) < 4).all(1) & (abs(turned) < 2))
        ago = now - before[-1] if len(before) else 0
        assert found[now] == (ago if ago > AWAY else 0), now
    assert found.any()


def test_windows_are_drawn_by_the_places_seen_again_in_them():
    rng, rows, frames = np.random.default_rng(), 200, 16
    since = np.where(rng.random(rows) < 0.1, rng.integers(9, 40, rows), 0).astype(np.int32)
    episode = np.arange(rows) // 67
    data = {"actions": np.zeros((rows, 7)), "scenario": np.zeros(rows, np.int16), "since": since, "episode": episode}
    starts, odds = Windows(data, torch.zeros(rows, 1), torch.device("cpu"), seed=0)._starts(frames)
    assert starts.tolist() == [row for row in range(rows - frames + 1) if episode[row] == episode[row + frames - 1]]
    inside = [sum(0 < since[s + i] <= i for i in range(frames)) for s in starts]
    assert odds.tolist() == np.cumsum(inside).tolist()
