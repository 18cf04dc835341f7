"""Places seen again: the player looks away and comes back, or turns full circle. All chunks are true ones, but those
in which something returns to the picture are predicted. What counts is the part of the picture that was seen before,
and in no frame that a window of the run's budget still holds: only a longer memory can know it.

Which part that is follows from the player's poses: the scenes turn on the spot, the horizontal field of view is 90
degrees, so each column of pixels has a direction."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastar_backend.engine.stream import Stream
from fastar_backend.evaluation import metrics
from fastar_backend.evaluation.lab import STREAM, TWIN, Lab, rounded
from fastar_backend.evaluation.scenes import Scene
from fastar_backend.evaluation.store import Unit

FIELD = 90.0  # degrees
SAME_PLACE = 8.0  # map units
SAME_VIEW = 3.0  # degrees
LEAST = 0.06  # share of the columns that must return


def directions(angle: float, width: int) -> np.ndarray:
    """Degrees (counted to the left, as the game's angles) at which each column of pixels looks, [width]."""
    x = (np.arange(width) + 0.5 - width / 2) / (width / 2) * np.tan(np.radians(FIELD / 2))
    return angle - np.degrees(np.arctan(x))


def apart(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """Degrees between two directions, 0..180."""
    return np.abs((np.asarray(a) - b + 180) % 360 - 180)


def returning(poses: np.ndarray, index: int, begin: int, window: int, width: int) -> np.ndarray:
    """Columns [width] bool of latent frame `index` that come back: seen from the same place in a latent frame before
    begin - window, and in none of the `window` frames before `begin`, where the predicted chunk begins. poses: [latent
    frames, 3]: x, y, degrees."""
    mine = directions(poses[index, 2], width)
    since = max(0, begin - window)
    if not since:
        return np.zeros(width, dtype=bool)
    near = np.hypot(*(poses[:begin, :2] - poses[index, :2]).T) <= SAME_PLACE
    seen = apart(mine, poses[:begin, 2:]) <= FIELD / 2
    return (seen & near[:, None])[:since].any(0) & ~seen[since:].any(0)


def first_view(poses: np.ndarray, index: int, before: int) -> int | None:
    """The newest latent frame ahead of `before` that shows the same view as `index`; None if none does."""
    same = (np.hypot(*(poses[:before, :2] - poses[index, :2]).T) <= SAME_PLACE) & (
        apart(poses[:before, 2], poses[index, 2]) <= SAME_VIEW
    )
    return int(same.nonzero()[0][-1]) if same.any() else None


def plan(poses: np.ndarray, size: int, window: int, width: int, every: int) -> dict[int, list[np.ndarray]]:
    """Chunk -> the returning columns of each of its latent frames, for the chunks that are predicted."""
    found = {}
    for begin in range(0, len(poses) - size + 1, size):
        columns = [returning(poses, begin + i, begin, window, width) for i in range(size)]
        if np.mean(columns) >= LEAST:
            found[begin // size] = columns
    return {chunk: found[chunk] for chunk in list(found)[every - 1 :: every]}


def measure_revisit(lab: Lab, unit: Unit) -> dict[str, Any]:
    """Rows, one for each predicted chunk. truth: squared error of the returning columns against the game's; first: of
    whole frames against the first view of the same place, where one is the same to a few degrees, and first_truth what
    the game's own second view is away from it; whole: the chunk against the game's."""
    scene = lab.scene(unit)
    size, sizes, frames, poses = lab.chunk_latents, lab.settings.sizes, scene.frames, scene.poses
    wanted = plan(poses, size, lab.settings.budget, frames.shape[3], sizes.revisit_every)
    stream, latents, rows = lab.open(scene, unit.policy), lab.encode(frames), []
    turned = turning_point(scene, size) if unit.kind == "away" else None
    for chunk in range(len(frames) // size):
        if chunk * size == turned:
            lab.engine.fork(STREAM, TWIN)
        part = slice(chunk * size, (chunk + 1) * size)
        move = lab.actions(scene.actions[part])
        if chunk in wanted:
            video = lab.predict(stream, move)[1].reshape(frames[part].shape)
            rows.append({"chunk": chunk, **_row(video, frames, poses, part, wanted[chunk], lab.settings.budget)})
        lab.tell(stream, latents[:, part], move, begun=chunk in wanted)
    lab.engine.close(STREAM)
    found: dict[str, Any] = {"rows": rows}
    if TWIN in lab.engine.streams:
        found["free"] = _come_back(lab, lab.engine.streams[TWIN], scene, turned)
        lab.engine.close(TWIN)
    return found


def turning_point(scene: Scene, size: int) -> int:
    """The latent frame, the first of a chunk of `size`, from which the player turns back."""
    last = max((i for i, action in enumerate(scene.actions[: len(scene.frames)]) if action == "turn_left"), default=-1)
    return (last + 1) // size * size


def _row(video: np.ndarray, frames: np.ndarray, poses: np.ndarray, part: slice, columns: list[np.ndarray],
         window: int) -> dict[str, Any]:  # fmt: skip
    """video: [latent frames of a chunk, n, height, width, 3], predicted; the last frame of each is at its pose."""
    errors = np.square(video.astype(np.float32) - frames[part])
    row: dict[str, Any] = {
        "truth": float(np.mean([errors[i, -1][:, kept].mean() for i, kept in enumerate(columns) if kept.any()])),
        "whole": float(errors.mean()),
        "share": float(np.mean(columns)),
    }
    pairs = [(i, first_view(poses, part.start + i, max(0, part.start - window))) for i in range(len(columns))]
    both = [(video[i, -1], frames[part.start + i, -1], frames[first, -1]) for i, first in pairs if first is not None]
    if both:
        mine, true, first = (np.stack(x) for x in zip(*both, strict=True))
        row["first"] = float(metrics.squared_errors(mine, first).mean())
        row["first_truth"] = float(metrics.squared_errors(true, first).mean())
    return rows_rounded(row)


def _come_back(lab: Lab, stream: Stream, scene: Scene, turned: int) -> dict[str, Any]:
    """The way back all by itself: from where the player turns round, nothing is told any more. Squared errors of the
    frames at poses that were seen before, against the first view and against the game."""
    size, frames, poses = lab.chunk_latents, scene.frames, scene.poses
    found: dict[str, list[float]] = {"first": [], "truth": [], "first_truth": []}
    for begin in range(turned, len(frames) - size + 1, size):
        move = lab.actions(scene.actions[begin : begin + size])
        x0, video = lab.predict(stream, move)
        lab.tell(stream, x0, move, begun=True)
        mine = video.reshape(size, -1, *video.shape[1:])[:, -1]
        for i in range(size):
            first = first_view(poses, begin + i, max(0, turned - lab.settings.budget))
            if first is None:
                continue
            trio = (mine[i][None], frames[begin + i, -1][None], frames[first, -1][None])
            found["first"].append(float(metrics.squared_errors(trio[0], trio[2])[0]))
            found["truth"].append(float(metrics.squared_errors(trio[0], trio[1])[0]))
            found["first_truth"].append(float(metrics.squared_errors(trio[1], trio[2])[0]))
    return {name: rounded(values, 2) for name, values in found.items()}


def rows_rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) for name, value in row.items()}
