"""Records play of the game (fastar_backend/evaluation/game.py), all scenarios in parallel, for training.

The walker of `behaviour` that spins and looks back twice as often, and at a wall mostly turns away. Beside each
latent frame stands how long ago the player was last there, if it has been away since: training looks more at these."""

from __future__ import annotations

import multiprocessing

import numpy as np

from fastar_backend.evaluation.game import (
    FRAMES_PER_LATENT,
    HEIGHT,
    SCENARIOS,
    WIDTH,
    Game,
    Scenario,
    behaviour,
    vector,
)

AGAIN = 2.0
AWAY = 8  # latent frames: what was seen since is beyond the transformer's temporal clamp
STUCK = 1.5  # mean change of the pixels between two frames below which a walker has met a wall


def since_last_there(poses: np.ndarray) -> np.ndarray:
    """poses [n, 3]: x, y, degrees. Latent frames since the player last had each pose, int32 [n]; 0 where it never had,
    or within the last `AWAY`."""
    apart = np.abs(poses[:, None] - poses[None])
    apart[..., 2] = np.minimum(apart[..., 2], 360 - apart[..., 2])
    ago = np.arange(len(poses))[:, None] - np.arange(len(poses))[None]
    there = (apart < (4.0, 4.0, 2.0)).all(-1) & (ago > 0)
    last = np.where(there, ago, len(poses) + 1).min(1, initial=len(poses) + 1)
    return np.where((last > AWAY) & (last <= len(poses)), last, 0).astype(np.int32)


def episodes(scenario: Scenario, latent_frames: int, seed: int, longest: int = 512):
    """Lists of (frames uint8 [2 n, 64, 96, 3], actions uint8 [n, 7], since_last_there [n]) adding up to
    `latent_frames`."""
    rng = np.random.default_rng(seed)
    game, found, total = Game(scenario.name, seed), [], 0
    while total < latent_frames:
        game.reset()
        frames, actions, poses, walker, detour = [], [], [], behaviour(scenario, rng, AGAIN), []
        while True:
            name = detour.pop() if detour else next(walker)
            pair = game.step(vector(name))
            if pair is None or len(actions) == longest or total + len(actions) >= latent_frames:
                break
            if "ward" in name and np.abs(pair[1].astype(np.int16) - pair[0]).mean() < STUCK and rng.random() < 0.5:
                detour = [str(rng.choice(["turn_left", "turn_right"]))] * int(rng.integers(6, 20))
            frames += pair
            actions.append(vector(name))
            poses.append(game.pose())
        if len(actions) >= 8:
            found.append((np.stack(frames), np.stack(actions), since_last_there(np.array(poses))))
        total += max(len(actions), 1)
    game.close()
    return found


def _job(job):
    index, latent_frames, seed = job
    return index, episodes(SCENARIOS[index], latent_frames, seed)


def collect(latent_frames_each: int, workers: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Plays all scenarios in parallel. Returns frames [N, 2, 64, 96, 3], actions [N, 7], and since, scenario, episode
    [N]."""
    parts = max(1, workers // len(SCENARIOS)) + 1
    jobs = [
        (index, int(latent_frames_each * scenario.share) // parts, seed * 1000 + 17 * part + index)
        for part in range(parts)
        for index, scenario in enumerate(SCENARIOS)
    ]
    frames, actions, since, scenario, episode = [], [], [], [], []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for index, found in pool.imap_unordered(_job, jobs):
            for video, moves, last in found:
                frames.append(video.reshape(-1, FRAMES_PER_LATENT, HEIGHT, WIDTH, 3))
                actions.append(moves)
                since.append(last)
                scenario.append(np.full(len(moves), index, dtype=np.int16))
                episode.append(np.full(len(moves), len(episode), dtype=np.int32))
    return {
        "frames": np.concatenate(frames),
        "actions": np.concatenate(actions),
        "since": np.concatenate(since),
        "scenario": np.concatenate(scenario),
        "episode": np.concatenate(episode),
    }
