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
    """[..., dim] float32: cos then sin of position * 10000^(-i / (dim / 2)) (Wan's `sinusoidal_embedding_1d`; the
    angles, up to 1000, in float64 as there)."""
    half = dim // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    angles = positions.double()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def rope_rates(dim: int, theta: float) -> Tensor:
    """Angular rates [dim / 2], float64, of rotary positions (Su et al. 2021, eq. 15)."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


@functools.lru_cache(maxsize=16)
def spatial_angles(grid: tuple[int, int], split: tuple[int, int, int], theta: float) -> Tensor:
    """Angles [rows * columns, head_dim / 2], float64: none for the temporal dimensions, then rows, then columns."""
    time_dim, height_dim, width_dim = split
    rows = torch.arange(grid[0])[:, None] * rope_rates(height_dim, theta)
    columns = torch.arange(grid[1])[:, None] * rope_rates(width_dim, theta)
    return torch.cat(
        [
            torch.zeros(grid[0], grid[1], time_dim // 2, dtype=torch.float64),
            rows[:, None, :].expand(grid[0], grid[1], -1),
            columns[None, :, :].expand(grid[0], grid[1], -1),
        ],
        dim=-1,
    ).flatten(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent pairs of the last dimension. cos and sin, float32 or wider, broadcast against x[..., ::2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


@functools.lru_cache(maxsize=32)
def time_turns(time_dim: int, theta: float, span: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Unit complex numbers [2 * span + 1, time_dim / 2] that turn by -span..span latent frames."""
    angles = torch.arange(-span, span + 1)[:, None] * rope_rates(time_dim, theta)
    kind = torch.complex128 if dtype == torch.float64 else torch.complex64
    return torch.polar(torch.ones_like(angles), angles).to(device, kind)


def rotate_time(x: Tensor, positions: Tensor, time_dim: int, theta: float, span: int) -> Tensor:
    """Rotates the first `time_dim` dimensions of x [..., head_dim], any float type, by `positions` (whole latent
    frames, -span..span), broadcastable to x.shape[:-1]; the spatial dimensions pass through."""
    turns = time_turns(time_dim, theta, span, x.device, x.dtype)[positions + span]
    out = x.clone(memory_format=torch.contiguous_format)
    part = out[..., :time_dim].unflatten(-1, (-1, 2))
    if x.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(part).mul_(turns)
    else:
        part.copy_(torch.view_as_real(torch.view_as_complex(part.float()) * turns))
    return out
