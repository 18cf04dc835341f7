"""Does the picture move as the action says? Turning and side steps shift it, walking makes it grow or shrink.

The shift of two frames is their phase correlation (sub-pixel; right up to half a picture); growth is the least-squares
slope of Farneback's optical flow along the distance from the middle. The lower quarter of the picture, where the
player's weapon hangs still, is left out. Needs OpenCV (the extra `eval`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

# What each action alone does to the picture: its axis (0: shift to the right, in pixels; 1: growth, per frame), its
# sign, and how much of it counts as motion.
EXPECTED = {"turn_left": (0, 1), "turn_right": (0, -1), "left": (0, 1), "right": (0, -1), "forward": (1, 1),
            "backward": (1, -1)}  # fmt: skip
LEAST = (0.4, 0.008)
KINDS = {"turn_left": "turn", "turn_right": "turn", "left": "step aside", "right": "step aside", "forward": "walk",
         "backward": "walk"}  # fmt: skip


@dataclasses.dataclass
class Following:
    """told: latent frames in which the action should be seen; obeyed: those in which it is."""

    told: int = 0
    obeyed: int = 0


def signature(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Shift to the right (pixels) and growth (relative) from one frame to the next; uint8 [height, width, 3]."""
    import cv2

    height, width = before.shape[0] * 3 // 4, before.shape[1]
    old, new = (cv2.cvtColor(np.ascontiguousarray(frame[:height]), cv2.COLOR_RGB2GRAY) for frame in (before, after))
    window = cv2.createHanningWindow((width, height), cv2.CV_32F)
    (shift, _), _ = cv2.phaseCorrelate(old.astype(np.float32), new.astype(np.float32), window)
    flow = cv2.calcOpticalFlowFarneback(old, new, None, 0.5, 4, 15, 3, 5, 1.2, 0)
    y, x = np.mgrid[:height, :width] - np.array([before.shape[0] / 2 - 0.5, width / 2 - 0.5])[:, None, None]
    centred = flow - np.median(flow, axis=(0, 1))
    growth = float((centred[..., 0] * x + centred[..., 1] * y).sum() / (x * x + y * y).sum())
    return float(shift), growth


def moves_as_told(action: str, before: np.ndarray, frames: np.ndarray) -> bool | None:
    """frames: those of one latent frame, [n, height, width, 3]; before: the one ahead of them. None: the action says
    nothing about motion (or several things at once)."""
    pressed = [button for button in action.split("+") if button in EXPECTED]
    if len(pressed) != 1:
        return None
    axis, sign = EXPECTED[pressed[0]]
    video = [before, *frames]
    mean = np.mean([signature(a, b)[axis] for a, b in zip(video, video[1:], strict=False)])
    return bool(sign * mean > LEAST[axis])


def following(actions: Sequence[str], video: np.ndarray, truth: np.ndarray, first: np.ndarray) -> dict[str, Following]:
    """How often the video moves as told, by kind of action, where the game is seen to (a player before a wall does not
    move). video, truth: uint8 [latent frames, n, height, width, 3]; first: the frame ahead of both."""
    found = {kind: Following() for kind in dict.fromkeys(KINDS.values())}
    for index, action in enumerate(actions[: min(len(video), len(truth))]):
        moved, expected = (
            moves_as_told(action, x[index - 1][-1] if index else first, x[index]) for x in (video, truth)
        )
        if not expected:
            continue
        kind = found[next(KINDS[button] for button in action.split("+") if button in KINDS)]
        kind.told += 1
        kind.obeyed += bool(moved)
    return found
