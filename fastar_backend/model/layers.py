"""Layers of the Wan2.1 transformer: norms, embeddings, rotary positions. Names follow Wan's native checkpoints."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last dimension, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype) * self.weight


def sinusoidal_embedding(positions: Tensor, dim: int) -> Tensor:
    """[..., dim] float32: cos then sin of position * 10000^(-i / (dim / 2)) (Wan's `sinusoidal_embedding_1d`)."""
    half = dim // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_rates(dim: int, theta: float) -> Tensor:
    """Angular rates [dim / 2], float64, of rotary positions (Su et al. 2021, eq. 15)."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


@functools.lru_cache(maxsize=16)
def spatial_angles(grid: tuple[int, int], split: tuple[int, int, int], theta: float) -> Tensor:
    """Angles [rows * columns, (height + width dims) / 2], float64: row positions first, then column positions."""
    _, height_dim, width_dim = split
    rows = torch.arange(grid[0])[:, None] * rope_rates(height_dim, theta)
    columns = torch.arange(grid[1])[:, None] * rope_rates(width_dim, theta)
    return torch.cat(
        [
            rows[:, None, :].expand(grid[0], grid[1], -1),
            columns[None, :, :].expand(grid[0], grid[1], -1),
        ],
        dim=-1,
    ).flatten(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent pairs of the last dimension. cos and sin broadcast against x[..., ::2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def rotate_time(x: Tensor, positions: Tensor, split: tuple[int, int, int], theta: float) -> Tensor:
    """Rotates the temporal head dimensions of x [..., head_dim] by `positions` (latent frames), shape x.shape[:-1]
    or broadcastable to it; the spatial dimensions pass through."""
    time_dim = split[0]
    angles = positions.double()[..., None] * rope_rates(time_dim, theta).to(positions.device)
    rotated = rotate(x[..., :time_dim], angles.cos().to(x.dtype), angles.sin().to(x.dtype))
    return torch.cat([rotated, x[..., time_dim:]], dim=-1)


def rotate_space(x: Tensor, cos: Tensor, sin: Tensor, time_dim: int) -> Tensor:
    """Rotates the spatial head dimensions of x [..., tokens, heads, head_dim]; cos, sin: [tokens, 1, spatial / 2]."""
    return torch.cat([x[..., :time_dim], rotate(x[..., time_dim:], cos, sin)], dim=-1)
