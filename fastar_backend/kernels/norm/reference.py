"""What the kernels of `norm` compute, in plain float64."""

from __future__ import annotations

import torch
from torch import Tensor


def modulate(x: Tensor, y: Tensor | None, table: Tensor, change: Tensor, *, gate: int | None, shift: int | None,
             affine: tuple[Tensor, Tensor] | None, eps: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x, y: [frames, tokens, dim]; table: [6, dim]; change: [frames, 6, dim]. Returns the sum and its norm."""
    x, rows = x.double(), table.double() + change.double()
    if y is not None:
        x = x + y.double() * (1 if gate is None else rows[:, gate, None])
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    if affine is not None:
        return x, normed * affine[0].double() + affine[1].double()
    return x, normed if shift is None else normed * (1 + rows[:, shift + 1, None]) + rows[:, shift, None]


def heads(source: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """source: [rows, parts, heads, dim]; weight: [parts, heads, dim]; cos, sin: [tokens, dim / 2]. Returns [parts,
    rows, heads, dim]."""
    x = source.double()
    x = x / (x.square().mean((-2, -1), keepdim=True) + eps).sqrt() * weight.double()
    if cos is not None:
        line = torch.arange(len(x)) % len(cos)
        c, s = cos.double()[line][:, None, None], sin.double()[line][:, None, None]
        even, odd = x[..., 0::2].clone(), x[..., 1::2].clone()
        x[..., 0::2], x[..., 1::2] = even * c - odd * s, even * s + odd * c
    return x.transpose(0, 1)
