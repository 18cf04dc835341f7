"""What `nearest_kernel` computes, in plain float64, and the quantisation of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of x [..., dim] as int8 codes and a float32 scale a row: x / |x| is about code * scale."""
    unit = F.normalize(x.float(), dim=-1)
    scale = unit.abs().amax(-1).clamp(min=1e-12) / 127
    return (unit / scale[..., None]).round().to(torch.int8), scale


def nearest(
    probe: Tensor, probe_scale: Tensor, code: Tensor, code_scale: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """Shapes as in the kernel; similarity in float64."""
    heads, probes, slots = *probe.shape[:2], code.shape[1]
    similarity = torch.full((heads, probes), -torch.inf, dtype=torch.float64)
    match = torch.full((heads, probes), -1)
    for head in range(heads):
        for line in range(probes):
            for slot in range(int(first[head]), slots):
                score = (probe[head, line].double() @ code[head, slot].double()) * code_scale[head, slot].double()
                score *= probe_scale[head, line].double()
                if score > similarity[head, line]:
                    similarity[head, line], match[head, line] = score, slot
    return similarity, match
