"""How alike two videos are, frame by frame: squared error and SSIM (torchmetrics), FLIP (NVIDIA's own package), LPIPS
where its weights are at hand; and what a video looks like by itself. Videos are uint8 [frames, height, width, 3], RGB.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastar_backend.errors import InvalidInput

PACKAGES = {"torchmetrics": "torchmetrics", "flip_evaluator": "flip-evaluator", "matplotlib": "matplotlib"}
BEST = 100.0  # dB that stand for "no difference"
WIDTH_DEGREES = 20.0  # FLIP: the visual angle that the picture's width takes, whatever its pixels
FRAMES_AT_ONCE = 32


def check_packages() -> None:
    """Raises InvalidInput naming what the extra `eval` would install."""
    lacking = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if lacking:
        raise InvalidInput("eval", f"{', '.join(lacking)} not installed", "pip install 'fastar-serve[eval]'")


def squared_errors(video: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean squared error of each frame, float64 [frames], in squared grey levels (0..65025)."""
    parts = [
        np.square(video[i : i + FRAMES_AT_ONCE].astype(np.float32) - other[i : i + FRAMES_AT_ONCE]).mean((1, 2, 3))
        for i in range(0, len(video), FRAMES_AT_ONCE)
    ]
    return np.concatenate([np.zeros(0), *parts]).astype(np.float64)


def decibels(errors: np.ndarray | Sequence[float]) -> float:
    """PSNR of the mean of squared errors; at most `BEST`."""
    mean = float(np.mean(errors))
    return BEST if mean <= 0 else min(BEST, float(10 * np.log10(255**2 / mean)))


def similarities(video: np.ndarray, other: np.ndarray) -> list[float]:
    """SSIM of each frame (Gaussian window of 11 pixels), -1..1."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found: list[float] = []
    for first in range(0, len(video), FRAMES_AT_ONCE):
        pair = [_tensor(x[first : first + FRAMES_AT_ONCE]) for x in (video, other)]
        values = structural_similarity_index_measure(*pair, data_range=255.0, reduction="none")
        found += values.reshape(-1).tolist()
    return found


def flips(video: np.ndarray, reference: np.ndarray) -> list[float]:
    """Mean FLIP error of each frame (Andersson et al. 2020), 0 (equal) to 1, for a picture `WIDTH_DEGREES` wide."""
    import flip_evaluator

    settings = {"ppd": reference.shape[2] / WIDTH_DEGREES}
    found = []
    for frame, true in zip(video, reference, strict=True):
        pair = (np.ascontiguousarray(x, np.float32) / 255 for x in (true, frame))
        found.append(float(flip_evaluator.evaluate(*pair, "LDR", applyMagma=False, parameters=dict(settings))[1]))
    return found


def looks(video: np.ndarray) -> dict[str, list[float]]:
    """Of each frame: sharpness (mean absolute gradient, both ways), brightness (mean) and contrast (standard deviation)
    of its grey levels, 0..255."""
    rows: dict[str, list[float]] = {"sharpness": [], "brightness": [], "contrast": []}
    for frame in video:
        grey = frame.astype(np.float32).mean(-1)
        rows["sharpness"].append(float(np.mean([np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1)])))
        rows["brightness"].append(float(grey.mean()))
        rows["contrast"].append(float(grey.std()))
    return rows


def _tensor(video: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2).float()
