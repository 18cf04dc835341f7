"""What `attend_kernel` computes, in plain float64."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, first: Tensor, memory: int, stop: int,
           allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """query: [queries, heads, dim]; key, value: [heads, rows, dim]; bias: [heads, rows]; first: [heads]; allowed:
    [heads, queries, rows] bool, or None for all. Returns the output like query, and log-sum-exp [heads, queries]."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.zeros(query.shape[1], query.shape[0], dtype=torch.float64)
    for head in range(query.shape[1]):
        for row in range(query.shape[0]):
            weights, rows = [], []
            for column in range(stop):
                if column < int(first[head]) or (allowed is not None and not allowed[head, row, column]):
                    continue
                logit = query[row, head].double() @ key[head, column].double() * query.shape[-1] ** -0.5
                weights.append(logit + (bias[head, column].double() if column < memory else 0.0))
                rows.append(column)
            weight = torch.stack(weights)
            lse[head, row] = weight.logsumexp(0)
            out[row, head] = weight.softmax(0) @ value[head, rows].double()
    return out, lse
