"""A transformer's blocks between the attentions, by kernels: on a GPU in half precision nothing has to be compiled.

The same pieces as `dit.Block` has (`before`, `between`, `after`), with intermediate results in float32 inside a kernel
and one product for query, key and value."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar_backend.kernels import ops
from fastar_backend.model.dit import Block, CausalDiT


@dataclasses.dataclass
class _Joined:
    """Weights of one block, as the kernels and the product of three take them."""

    weight: Tensor  # [3 dim, dim]: query, key, value
    bias: Tensor
    norms: Tensor  # [2, heads, head_dim]: of query and key
    cross_norm: Tensor  # [1, heads, head_dim]

    @classmethod
    def of(cls, block: Block) -> _Joined:
        own, heads = block.self_attn, (block.self_attn.heads, -1)
        linears = (own.q, own.k, own.v)
        joined = cls(
            torch.cat([linear.weight for linear in linears]),
            torch.cat([linear.bias for linear in linears]),
            torch.stack([own.norm_q.weight, own.norm_k.weight]).unflatten(1, heads),
            block.cross_attn.norm_q.weight[None].unflatten(1, heads),
        )
        for linear, weight in zip(linears, joined.weight.chunk(3), strict=True):  # views: no second copy stays
            linear.weight = nn.Parameter(weight, requires_grad=False)
        return joined


def fuse_blocks(dit: CausalDiT) -> bool:
    """In place; False, and nothing done, where the kernels do not take the model's sizes. The blocks' linear layers
    must be plain ones (not fp8); names and values of all weights stay."""
    dim = dit.config.head_dim
    if dim & (dim - 1) or dim < 16:
        return False
    for block in dit.blocks:
        joined = _Joined.of(block)
        block.before = functools.partial(_before, block, joined)
        block.between = functools.partial(_between, block, joined)
        block.after = functools.partial(_after, block)
    return True


def _before(block: Block, joined: _Joined, x: Tensor, e: Tensor, cos: Tensor, sin: Tensor
            ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _, h = ops.modulate(x, block.modulation[0], e, block.eps, shift=0)
    mixed = F.linear(h, joined.weight, joined.bias)
    turns = cos.flatten(0, -2), sin.flatten(0, -2)
    query, key = ops.normalise_heads(mixed, joined.norms, block.self_attn.norm_q.eps, turns)
    value = mixed[..., -x.shape[-1] :].unflatten(-1, query.shape[-2:])
    batch = (len(x), -1)
    return query.unflatten(0, batch), key.unflatten(0, batch), value.flatten(1, 2)


def _between(block: Block, joined: _Joined, x: Tensor, e: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    add, norm3 = block.self_attn.output(attended).view_as(x), block.norm3
    x, h = ops.modulate(x, block.modulation[0], e, norm3.eps, add=add, gate=2, affine=(norm3.weight, norm3.bias))
    cross = block.cross_attn
    (query,) = ops.normalise_heads(cross.q(h), joined.cross_norm, cross.norm_q.eps)
    return x, query.unflatten(0, (len(x), -1))


def _after(block: Block, x: Tensor, e: Tensor, crossed: Tensor) -> Tensor:
    add, table = block.cross_attn.output(crossed).view_as(x), block.modulation[0]
    x, h = ops.modulate(x, table, e, block.eps, add=add, shift=3)
    h = block.ffn[2](_gelu_of(block.ffn[0], h.flatten(0, -2)))
    return ops.modulate(x, table, e, block.eps, add=h.view_as(x), gate=5)[0]


def _gelu_of(linear: nn.Linear, x: Tensor) -> Tensor:
    if x.is_cuda:  # in the product's epilogue: no pass over memory of its own
        return torch._addmm_activation(linear.bias, x, linear.weight.T, use_gelu=True)
    return F.gelu(linear(x), approximate="tanh")
