"""What `nearest_kernel` computes, in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(probe: Tensor, code: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as in the kernel. Returns the products with the nearest (int64; very negative: none held) and its slot."""
    heads, probes, slots = *probe.shape[:2], code.shape[1]
    product, match = torch.full((heads, probes), -(1 << 31)), torch.full((heads, probes), -1)
    for head in range(heads):
        for line in range(probes):
            for slot in range(int(first[head]), slots):
                score = int((probe[head, line].long() * code[head, slot].long()).sum())
                if score > product[head, line]:
                    product[head, line], match[head, line] = score, slot
    return product, match
