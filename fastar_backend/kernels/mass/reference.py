"""What `mass_kernel` computes, in plain float64."""

from __future__ import annotations

import torch
from torch import Tensor


def mass(query: Tensor, key: Tensor, count: Tensor, lse: Tensor, stride: int, memory: int, stop: int) -> Tensor:
    """query: [queries, heads, dim]; key: [heads, rows, dim]; count: [heads, rows]; lse: [heads, queries] -> [heads,
    stop]."""
    result = torch.zeros(query.shape[1], stop, dtype=torch.float64)
    lines = range(0, query.shape[0], stride)
    for head in range(query.shape[1]):
        for column in range(stop):
            for line in lines:
                logit = query[line, head].double() @ key[head, column].double() * query.shape[-1] ** -0.5
                members = count[head, column].double() if column < memory else 1.0
                result[head, column] += members * (logit - lse[head, line].double()).exp() / len(lines)
    return result
