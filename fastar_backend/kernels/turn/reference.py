"""What `turn_kernel` computes, in plain float64."""

from __future__ import annotations

import torch
from torch import Tensor


def turn(source: Tensor, turns: Tensor, cos: Tensor, sin: Tensor, frame_tokens: int) -> Tensor:
    """source: [tokens, heads, dim] -> the same shape."""
    out = source.double().clone()
    for token in range(source.shape[0]):
        line = int(turns[token // frame_tokens])
        for pair in range(cos.shape[1]):
            a, b = source[token, :, 2 * pair].double(), source[token, :, 2 * pair + 1].double()
            c, s = cos[line, pair].double(), sin[line, pair].double()
            out[token, :, 2 * pair], out[token, :, 2 * pair + 1] = a * c - b * s, a * s + b * c
    return torch.as_tensor(out)
