"""LPIPS (Zhang et al. 2018, arXiv 1801.03924), version 0.1 on AlexNet. Its backbone is torchvision's AlexNet, given as
a file; its linear heads come with torchmetrics. There is no fallback: with other weights the number means nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar_backend.errors import InvalidInput

SHA256 = "7be5be79"  # how torchvision's file begins, as its name says: alexnet-owt-7be5be79.pth
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in -1..1
LAYERS = {"0": (3, 64, 11, 4, 2), "3": (64, 192, 5, 1, 2), "6": (192, 384, 3, 1, 1), "8": (384, 256, 3, 1, 1),
          "10": (256, 256, 3, 1, 1)}  # fmt: skip
POOLED = ("3", "6")  # a maximum over 3x3, stride 2, stands before these


class Lpips:
    """Calling it with two videos uint8 [frames, height, width, 3] gives the distance of each frame (0: equal)."""

    def __init__(self, backbone: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
        """backbone: AlexNet's state dict; heads: lin0.model.1.weight to lin4, [1, channels, 1, 1]."""
        self.convolutions = nn.ModuleDict(
            {name: nn.Conv2d(before, after, size, stride, padding)
             for name, (before, after, size, stride, padding) in LAYERS.items()}
        ).requires_grad_(False)  # fmt: skip
        own = {key.removeprefix("features."): value for key, value in backbone.items() if key.startswith("features.")}
        self.convolutions.load_state_dict(own)
        self.heads = [heads[f"lin{i}.model.1.weight"] for i in range(len(LAYERS))]

    @classmethod
    def load(cls, path: Path) -> Lpips:
        """Raises InvalidInput unless it is torchvision's file."""
        allowed = f"torchvision's alexnet-owt-{SHA256}.pth"
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise InvalidInput("--lpips-weights", f"{path}: {error.strerror}", allowed) from None
        if not digest.startswith(SHA256):
            raise InvalidInput("--lpips-weights", f"{path} has sha256 {digest[:8]}...", allowed)
        folder = Path(importlib.util.find_spec("torchmetrics").origin).parent
        heads = torch.load(folder / "functional" / "image" / "lpips_models" / "alex.pth", "cpu", weights_only=True)
        try:
            return cls(torch.load(path, "cpu", weights_only=True), heads)
        except (RuntimeError, KeyError, pickle.UnpicklingError) as error:
            raise InvalidInput("--lpips-weights", f"{path} does not fit ({error!s:.80})", allowed) from None

    @torch.inference_mode()
    def __call__(self, video: np.ndarray, other: np.ndarray) -> list[float]:
        return [float(self._distance(*pair)) for pair in zip(video, other, strict=True)]

    def _distance(self, frame: np.ndarray, other: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.stack([frame, other])).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = (pixels - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None]
        total = torch.zeros(())
        for (name, convolution), head in zip(self.convolutions.items(), self.heads, strict=True):
            x = F.relu(convolution(F.max_pool2d(x, 3, 2) if name in POOLED else x))
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            total = total + ((unit[:1] - unit[1:]).square() * head).sum(1).mean()
        return total
