"""Metrics and statistics against values worked out by hand and identities that must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastar_backend.errors import InvalidInput
from fastar_backend.evaluation import metrics
from fastar_backend.evaluation.lpips import LAYERS, POOLED, SCALE, SHIFT, Lpips
from fastar_backend.evaluation.statistics import estimate


@pytest.fixture
def video() -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (5, 24, 37, 3), dtype=np.uint8)


def test_squared_errors_and_decibels_by_hand():
    black = np.zeros((3, 4, 6, 3), np.uint8)
    other = black.copy()
    other[1] = 10
    other[2, 0, 0, 0] = 255
    assert metrics.squared_errors(other, black) == pytest.approx([0, 100, 255**2 / 72])
    assert metrics.decibels([100.0]) == pytest.approx(20 * math.log10(25.5))
    assert metrics.decibels([0.0, 200.0]) == metrics.decibels([100.0])
    assert metrics.decibels([0.0]) == metrics.BEST


def test_squared_errors_of_more_frames_than_are_taken_at_once(video):
    many = np.concatenate([video] * 8)
    other = np.random.default_rng(1).permutation(many, axis=0)
    by_hand = [np.square(a.astype(float) - b).mean() for a, b in zip(many, other, strict=True)]
    assert metrics.squared_errors(many, other) == pytest.approx(by_hand, rel=1e-5)


def test_equal_videos_are_equal(video):
    assert metrics.similarities(video, video) == pytest.approx([1.0] * 5)
    assert metrics.flips(video, video) == [0.0] * 5


def test_similarity_by_hand():
    """Of two constant pictures only the term of the means is left: (2 a b + c) / (a a + b b + c), c = (.01 * 255)^2."""
    a, b = np.full((1, 16, 20, 3), 100, np.uint8), np.full((1, 16, 20, 3), 140, np.uint8)
    constant = (0.01 * 255) ** 2
    by_hand = (2 * 100 * 140 + constant) / (100**2 + 140**2 + constant)
    assert metrics.similarities(a, b) == pytest.approx([by_hand], abs=1e-3)


def test_worse_pictures_score_worse(video):
    noise = np.random.default_rng(2).normal(0, 1, video.shape)
    smooth = np.repeat(np.repeat(video[:, ::8, ::8], 8, 1), 8, 2)[:, :24, :37]
    little, much = (np.clip(smooth + size * noise, 0, 255).astype(np.uint8) for size in (5, 40))
    assert np.mean(metrics.similarities(little, smooth)) > np.mean(metrics.similarities(much, smooth)) + 0.1
    assert 0 < np.mean(metrics.flips(little, smooth)) < np.mean(metrics.flips(much, smooth)) - 0.05


def test_looks_by_hand():
    ramp = np.repeat(np.arange(0, 40, 2, dtype=np.uint8)[None, None, :, None], 3, -1).repeat(8, 1)  # 8 x 20, 2 a column
    found = metrics.looks(ramp)
    assert found["sharpness"] == pytest.approx([1.0])  # 2 across, 0 down
    assert found["brightness"] == pytest.approx([19.0])
    assert found["contrast"] == pytest.approx([2 * math.sqrt((20**2 - 1) / 12)], rel=1e-4)


def test_interval_by_hand():
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.half == pytest.approx(3.18245 * math.sqrt(5 / 3) / 2, rel=1e-5)  # Student's quantile for 3 degrees
    assert found.text(1) == "2.5 ± 2.1"
    assert estimate([7.0]).text(2, 10) == "70.00"
    assert estimate([]) is None


def random_lpips(seed: int) -> tuple[Lpips, dict, dict]:
    generator = torch.Generator().manual_seed(seed)
    backbone, heads = {}, {}
    for i, (name, (before, after, size, _, _)) in enumerate(LAYERS.items()):
        fan = before * size * size
        backbone[f"features.{name}.weight"] = torch.randn(after, before, size, size, generator=generator) / fan**0.5
        backbone[f"features.{name}.bias"] = torch.randn(after, generator=generator) * 0.1
        heads[f"lin{i}.model.1.weight"] = torch.rand(1, after, 1, 1, generator=generator)
    return Lpips(backbone, heads), backbone, heads


def test_lpips_is_its_definition():
    """On random weights, which say nothing about pictures: layer by layer with plain convolutions, in float64."""
    lpips, backbone, heads = random_lpips(3)
    pair = np.random.default_rng(4).integers(0, 256, (2, 67, 96, 3), dtype=np.uint8)
    x = (torch.from_numpy(pair).permute(0, 3, 1, 2).double() / 127.5 - 1 - torch.tensor(SHIFT)[:, None, None]) / (
        torch.tensor(SCALE)[:, None, None]
    )
    total = 0.0
    for i, (name, (_, _, _, stride, padding)) in enumerate(LAYERS.items()):
        if name in POOLED:
            x = torch.nn.functional.max_pool2d(x, 3, 2)
        weight, bias = (backbone[f"features.{name}.{part}"].double() for part in ("weight", "bias"))
        x = torch.nn.functional.conv2d(x, weight, bias, stride, padding).clamp(min=0)
        a, b = x / (x.norm(dim=1, keepdim=True) + 1e-10)
        total += float(((a - b).square() * heads[f"lin{i}.model.1.weight"][0]).sum(0).mean())
    assert lpips(pair[:1], pair[1:]) == pytest.approx([total], rel=1e-4)
    assert lpips(pair[:1], pair[:1]) == [0.0]


def test_lpips_takes_no_other_weights(tmp_path):
    file = tmp_path / "alexnet.pth"
    torch.save(random_lpips(3)[1], file)
    with pytest.raises(InvalidInput, match=r"--lpips-weights: .*sha256.*alexnet-owt-7be5be79"):
        Lpips.load(file)
    with pytest.raises(InvalidInput, match="--lpips-weights"):
        Lpips.load(tmp_path / "none.pth")
