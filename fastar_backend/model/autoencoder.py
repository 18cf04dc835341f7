"""A small frame autoencoder: one latent frame holds `frames` video frames, 8x smaller in height and width.

Each latent token is scaled to unit root-mean-square, so that latents live on a sphere: a rollout cannot drift off in
norm, and the sampler may project its prediction back onto it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def unit_rms(latents: Tensor, dim: int) -> Tensor:
    """latents / rms over `dim` (channels)."""
    return latents * (latents.square().mean(dim, keepdim=True) + 1e-6).rsqrt()


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class FrameAutoencoder(nn.Module):
    """Stateless: each latent frame decodes alone, so streams need no decoder cache."""

    stride = 8

    def __init__(self, channels: int, frames: int = 2) -> None:
        super().__init__()
        self.frames = frames
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), nn.Conv2d(48 * frames, 64, 3, padding=1), _Residual(64), _Residual(64),
            nn.Conv2d(64, 96, 4, stride=2, padding=1), _Residual(96), nn.SiLU(), nn.Conv2d(96, channels, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 128, 3, padding=1), _Residual(128), _Residual(128),
            nn.Conv2d(128, 256, 1), nn.PixelShuffle(2), _Residual(64), _Residual(64),
            nn.Conv2d(64, 192, 1), nn.PixelShuffle(2), _Residual(48), nn.SiLU(),
            nn.Conv2d(48, 12 * frames, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip

    def encode(self, video: Tensor) -> Tensor:
        """video: [N, frames, 3, height, width] in -1..1 -> latents [N, channels, height / 8, width / 8]."""
        return unit_rms(self.encoder(video.flatten(1, 2)), 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Inverse of `encode`; not clamped."""
        return self.decoder(latents).unflatten(1, (self.frames, 3))


class FrameDecoder:
    """The `Decoder` (model/decoder.py) of an embedded world: nothing is remembered from chunk to chunk."""

    def __init__(self, autoencoder: FrameAutoencoder) -> None:
        self.autoencoder = autoencoder

    def state(self) -> dict[str, Tensor]:
        return {}

    def state_shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int, int]]:
        return {}

    def decode(self, latents: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.autoencoder.decode(latents).flatten(0, 1), {}
