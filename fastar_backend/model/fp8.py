"""Linear layers in 8-bit floating point (e4m3): weights with a scale per output channel, activations with one a token.

On a GPU of compute capability 8.9 or newer the product runs on its fp8 units; elsewhere the same rounded numbers are
multiplied in the activations' type, so that the quality cost can be measured anywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 448.0  # of e4m3


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns] as e4m3 and a float32 scale [rows, 1]: x is about the product."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


class Fp8Linear(nn.Module):
    """A linear layer's inference, from one in half or full precision."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantise(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())  # [1, out]
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = quantise(x.flatten(0, -2))
        if x.is_cuda:
            out = torch._scaled_mm(
                rows, self.weight.T, scale, self.scale, bias=self.bias, out_dtype=x.dtype, use_fast_accum=True
            )
        else:
            out = F.linear(rows.to(x.dtype), self.weight.to(x.dtype)) * (scale * self.scale).to(x.dtype) + self.bias
        return out.unflatten(0, x.shape[:-1])


def quantise_blocks(dit: nn.Module) -> None:
    """Replaces the linear layers of a transformer's blocks, those that every token passes; embeddings and head stay."""
    for block in dit.blocks:
        for parent in (block.self_attn, block.cross_attn, block.ffn):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Fp8Linear(child))
