"""Free rollouts: the model goes on by itself, from the true first frames where there are some, under the scene's
actions. Compared with the dense rollout of the same scene and noise, and with what the game really showed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fastar_backend.engine.stream import ChunkRequest, ChunkStats
from fastar_backend.errors import FastarError
from fastar_backend.evaluation import metrics, motion
from fastar_backend.evaluation.lab import STREAM, Lab, flat, numbers, rounded
from fastar_backend.evaluation.scenes import Scene, write_arrays
from fastar_backend.evaluation.store import Unit

TENTHS = 10


@dataclasses.dataclass(frozen=True)
class Rollout:
    """video: uint8 [frames, height, width, 3]. actions: of the latent frames that were generated. stopped: why it ended
    early, else None."""

    video: np.ndarray
    stats: list[ChunkStats]
    actions: tuple[str, ...]
    stopped: str | None


def roll(lab: Lab, scene: Scene, policy: str, frames: int) -> Rollout:
    """At least one chunk; ends at `frames` or with the scene's actions."""
    start = next(
        (name for name, it in lab.engine.world.config.starts.items() if it.scenario == scene.scenario), "nothing"
    )
    stream = lab.open(scene, policy, start="nothing" if scene.frames is not None else start)
    size, first = lab.chunk_latents, 0
    if scene.frames is not None:
        first = lab.context
        latents, moves = lab.encode(scene.frames[:first]), lab.actions(scene.actions[:first])
        for given, move in zip(latents.split(size, 1), moves.split(size, 1), strict=True):
            lab.tell(stream, given, move)
    videos: list[np.ndarray] = []
    stats: list[ChunkStats] = []
    stopped, at = None, first
    while sum(map(len, videos)) < frames and at + size <= len(scene.actions):
        (result,) = lab.engine.step([ChunkRequest(STREAM, scene.actions[at : at + size])])
        if isinstance(result, FastarError):
            if not videos:
                raise result
            stopped = str(result)
            break
        videos.append(result.frames)
        stats.append(result.stats)
        at += size
    lab.engine.close(STREAM)
    return Rollout(np.concatenate(videos)[:frames], stats, scene.actions[first:at], stopped)


def measure_rollout(lab: Lab, unit: Unit) -> dict[str, Any]:
    """Dense attention's video goes to the folder's reference/, every policy's of the first scene to media/."""
    scene = lab.scene(unit)
    done = roll(lab, scene, unit.policy, lab.settings.sizes.frames)
    reference = lab.store.reference(f"rollout-{scene.name}")
    truth = None if scene.frames is None else scene.frames[lab.context :]
    found: dict[str, Any] = {
        "frames": len(done.video), "stopped": done.stopped, "looks": summary(done.video),
        "density": numbers(done.stats, "density"), "cache_bytes": [row.cache_bytes for row in done.stats],
        "cache_tokens": numbers(done.stats, "cache_tokens", 1), "text_tokens": numbers(done.stats, "text_tokens", 2),
        "chunk_frames": done.stats[0].frames,
    }  # fmt: skip
    if unit.policy == "dense":
        write_arrays(reference, {"video": done.video})
    else:
        with np.load(reference) as file:
            found["dense"] = lab.compare(done.video, file["video"])
    if truth is not None and len(truth):
        found["truth"] = lab.compare(done.video, flat(truth))
        found["truth_looks"] = summary(flat(truth)[: len(done.video)])
        per = truth.shape[1]
        whole = len(done.video) // per
        video = done.video[: whole * per].reshape(whole, per, *done.video.shape[1:])
        last = scene.frames[lab.context - 1][-1]
        moves = motion.following(done.actions, video, truth, last)
        found["following"] = {kind: dataclasses.asdict(value) for kind, value in moves.items()}
    if unit.scenario == lab.settings.scenarios[0] and unit.seed == lab.settings.seed:
        known = {} if truth is None else {"truth": flat(truth)[: len(done.video)]}
        write_arrays(lab.store.media(f"rollout-{unit.policy}".replace("/", "_")), {"video": done.video, **known})
    return found


def measure_drift(lab: Lab, unit: Unit) -> dict[str, Any]:
    """A long rollout's looks, by tenths, against those of the game's frames in the same scene, and its distance to
    these."""
    scene = lab.scene(unit)
    done = roll(lab, scene, unit.policy, lab.settings.sizes.drift_frames)
    found: dict[str, Any] = {
        "frames": len(done.video), "stopped": done.stopped, "looks": summary(done.video),
        "cache_bytes": [row.cache_bytes for row in done.stats[:: max(1, len(done.stats) // TENTHS)]],
        "density": numbers(done.stats[-1:], "density"),
    }  # fmt: skip
    if scene.frames is not None and len(scene.frames) > lab.context:
        truth = flat(scene.frames[lab.context :])
        found["truth_looks"] = summary(truth[: len(done.video)])
        found["truth"] = lab.compare(done.video, truth)
    return found


def summary(video: np.ndarray) -> dict[str, list[float]]:
    """Sharpness, brightness and contrast: the mean over each tenth of the video."""
    parts = [part for part in np.array_split(video, TENTHS) if len(part)]
    rows = [metrics.looks(part) for part in parts]
    return {name: rounded([np.mean(row[name]) for row in rows], 3) for name in rows[0]}
