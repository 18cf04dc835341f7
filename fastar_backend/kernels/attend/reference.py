"""What `attend_kernel` computes, in plain float64."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, count: Tensor, first: Tensor, memory: int, stop: int,
           allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """query: [queries, heads, dim]; key, value: [heads, rows, dim]; count: [heads, rows]; below `memory` a value is a
    sum; first: [heads]; allowed: [heads, queries, rows] bool, or None for all. Returns the output like query, and
    log-sum-exp [heads, queries]."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.zeros(query.shape[1], query.shape[0], dtype=torch.float64)
    for head in range(query.shape[1]):
        for row in range(query.shape[0]):
            weights, rows = [], []
            for column in range(stop):
                if column < int(first[head]) or (allowed is not None and not allowed[head, row, column]):
                    continue
                logit = query[row, head].double() @ key[head, column].double() * query.shape[-1] ** -0.5
                members = count[head, column].double() if column < memory else torch.ones((), dtype=torch.float64)
                if members > 0:
                    weights.append(logit + members.log())
                    rows.append(value[head, column].double() / members)
            weight = torch.stack(weights)
            lse[head, row] = weight.logsumexp(0)
            out[row, head] = weight.softmax(0) @ torch.stack(rows)
    return out, lse
