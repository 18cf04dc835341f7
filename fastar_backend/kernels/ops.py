"""The kernels as functions of tensors. They run on CUDA, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1).

Nothing here waits for the device."""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.kernels.attend.kernel import attend_kernel
from fastar_backend.kernels.merge.kernel import merge_kernel, place_kernel
from fastar_backend.kernels.nearest.kernel import nearest_kernel
from fastar_backend.kernels.norm.kernel import heads_kernel, modulate_kernel
from fastar_backend.kernels.turn.kernel import turn_kernel

KEY_BLOCK = 128  # keys that AnnSA selects together


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes of a launch."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype) -> Tiles:
    """What measured best on Hopper (benchmarks/kernels.py)."""
    if dtype.itemsize > 2:
        return Tiles(32, 32, 4, 1)
    return Tiles(128, 128, 8, 3)


def sparse_tiles(dtype: torch.dtype) -> Tiles:
    """Likewise, for `selection`."""
    return Tiles(32, KEY_BLOCK, 4, 1) if dtype.itemsize > 2 else Tiles(128, KEY_BLOCK, 8, 2)


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"  # float32 is for comparisons: no rounding of operands


def attend(query: Tensor, key: Tensor, value: Tensor, count: Tensor, first: Tensor, memory: int, stop: int, *,
           selection: tuple[Tensor, Tensor, Tensor] | None = None, tile: Tiles | None = None) -> Tensor:  # fmt: skip
    """softmax(q k / sqrt(d) + log count) v over keys first[head]..stop. Keys below `memory` stand for groups, and their
    values are sums over the members; those from there on count once.

    query: [queries, heads, dim], dim a power of two; key, value: [heads, rows, dim], rows adjacent; count: float32
    [heads, >= memory], 0 and a value of zeros where there is no group; first: int32 [heads]; selection: (order int
    [heads, queries], counts int32 [heads, query blocks], blocks int32 [heads, query blocks, most] of KEY_BLOCK keys;
    query blocks of `sparse_tiles`): then all rows have a count, and those from `stop` to the end of the last block
    are zeros. Returns [queries, heads, dim], contiguous."""
    queries, heads, dim = query.shape
    before = None
    if selection is None and tile is None and _splits(query, stop - memory):
        before = _whole(query, key[:, memory:stop], value[:, memory:stop])
        if memory == 0:
            return before[0]
        stop = memory
    tile = tile or (tiles if selection is None else sparse_tiles)(query.dtype)
    columns = tile.keys if selection is None else KEY_BLOCK
    out = torch.empty(queries, heads, dim, device=query.device, dtype=query.dtype)
    order, counts, blocks = selection or (first, first, first)
    partial, partial_lse = before or (out, first)
    grid = (triton.cdiv(queries, tile.queries), heads)
    attend_kernel[grid](
        query, key, value, count, first, order, counts, blocks, partial, partial_lse,
        queries, memory, stop, blocks.shape[-1], dim**-0.5, query.stride(0), query.stride(1), key.stride(0),
        count.stride(0), out.stride(0), out.stride(1),
        out,
        D=dim, BLOCK_M=tile.queries, BLOCK_N=columns, SPARSE=selection is not None, BEFORE=before is not None,
        PRECISION=precision(query.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _splits(query: Tensor, whole: int) -> bool:
    """Whether the keys that count once, `whole` of them, are worth a launch of their own."""
    return query.is_cuda and query.dtype.itemsize == 2 and whole >= len(query)


def _whole(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to keys that count once by cuDNN, which is faster than Triton there: the output [queries, heads, dim]
    and its log-sum-exp [heads, queries]."""
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query.transpose(0, 1)[None], key[None], value[None], None, True
    )
    return result[0][0].transpose(0, 1).contiguous(), result[1].reshape(query.shape[1], query.shape[0]).contiguous()


def quantise(x: Tensor) -> Tensor:
    """Unit vectors of x [..., dim] as int8 codes, 127 long: the product of two is their cosine * 16129, to about
    .005."""
    return (127 * F.normalize(x.float(), dim=-1)).round().to(torch.int8)


def nearest(probe: Tensor, code: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine float32, slot int32; both [heads, probes]) of the held slot (first[head]..) nearest to each probe; -1 and
    -1 where none is held. probe, code: int8 [heads, n, dim] from `quantise`."""
    heads, probes, dim = probe.shape
    similarity = torch.empty(heads, probes, device=probe.device, dtype=torch.float32)
    match = torch.empty(heads, probes, device=probe.device, dtype=torch.int32)
    nearest_kernel[(triton.cdiv(probes, 128), heads)](
        probe, code, first, probes, code.shape[1], similarity, match,
        D=dim, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3,
    )  # fmt: skip
    return similarity, match


def turn(source: Tensor, turns: Tensor, cos: Tensor, sin: Tensor, frame_tokens: int, out: Tensor) -> None:
    """out = source, both [tokens, heads, dim] of any strides, with token t turned in time by line turns[t //
    frame_tokens] (int32) of cos and sin (float32 [lines, time dims / 2])."""
    tokens, heads, dim = source.shape
    turn_kernel[(triton.cdiv(tokens, 32), heads)](
        source, turns, cos, sin,
        tokens, source.stride(0), source.stride(1), frame_tokens, out.stride(0), out.stride(1),
        out,
        D=dim, TIME=2 * cos.shape[1], BLOCK=32, num_warps=4,
    )  # fmt: skip


def modulate(x: Tensor, table: Tensor, change: Tensor, eps: float, *, add: Tensor | None = None,
             gate: int | None = None, shift: int | None = None, affine: tuple[Tensor, Tensor] | None = None,
             ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(x + add * gate, its layer norm * (1 + scale) + shift or affine: weight, bias; None where neither is asked for).

    x, add: [batch, frames, tokens, dim], contiguous; table: [6, dim] + change: [batch, frames, 6, dim]: the rows
    `gate`, `shift` and, for the scale, the one after it (Wan's modulation of a block)."""
    dim, tokens = x.shape[-1], x.shape[-2]
    norm = affine is not None or shift is not None
    out = x if add is None else torch.empty_like(x)
    normed = torch.empty_like(x) if norm else None
    weight, bias = affine or (table, table)
    modulate_kernel[(x.numel() // dim,)](
        x, x if add is None else add, table, change, weight, bias,
        dim, tokens, gate or 0, shift or 0, eps,
        out, out if normed is None else normed,
        BLOCK=triton.next_power_of_2(dim), RESIDUAL=add is not None, GATED=gate is not None, NORM=norm,
        AFFINE=affine is not None, num_warps=4,
    )  # fmt: skip
    return out, normed


def normalise_heads(source: Tensor, weight: Tensor, eps: float, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """RMS norm over all heads of each part, then rotary positions in space.

    source: [..., columns], rows evenly apart, whose first columns are parts x heads x dim; weight: [parts, heads, dim];
    turns: cos and sin, float32 [tokens, dim / 2], of row % tokens. Returns [parts, rows, heads, dim]."""
    parts, heads, dim = weight.shape
    rows = source.numel() // source.shape[-1]
    out = torch.empty(parts, rows, heads, dim, device=source.device, dtype=source.dtype)
    cos, sin = turns or (weight, weight)
    heads_kernel[(rows, parts)](
        source, weight, cos, sin,
        rows, heads, cos.shape[0], source.stride(-2), eps,
        out,
        D=dim, HEADS=triton.next_power_of_2(heads), ROTATE=turns is not None, num_warps=4,
    )  # fmt: skip
    return out


@dataclasses.dataclass(frozen=True)
class Groups:
    """Rows of a cache or of what goes into it. key, value (sums): [heads, rows, dim]; code: int8 [heads, slots, dim];
    count: float32 [heads, rows]; stay: float32 [heads, slots], and [rows], all heads', of what goes in."""

    key: Tensor
    value: Tensor
    code: Tensor
    count: Tensor
    stay: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.key, self.value, self.code, self.count, self.stay


def place(groups: Groups, slot: Tensor, newcomer: Tensor, replace: Tensor, new: Groups) -> None:
    """Row newcomer of `new` founds a group of one in `slot`, where `replace`; all [heads, pairs], replace bool."""
    heads, pairs = slot.shape
    place_kernel[(pairs, heads)](
        slot, newcomer, replace.to(torch.int8), new.key, new.value, new.code, new.stay,
        pairs, new.key.shape[1], groups.code.shape[1], new.value.stride(0), groups.key.stride(0),
        groups.count.stride(0),
        *groups.tensors, D=new.key.shape[2], num_warps=1,
    )  # fmt: skip


def merge(groups: Groups, target: Tensor, new: Groups, renew: bool) -> None:
    """Adds row t of `new` to the group in slot target[head, t] (int32; as many as there are slots: nowhere): counts
    and values grow. renew: key, code and `stay` become the last member's."""
    heads, tokens = target.shape
    ascending, order = target.sort(dim=-1, stable=True)
    merge_kernel[(tokens, heads)](
        ascending, order.int(), new.count, new.stay, new.value, new.key, new.code,
        tokens, groups.code.shape[1], new.value.stride(0), groups.key.stride(0), groups.count.stride(0),
        *groups.tensors, D=new.value.shape[2], RENEW=renew, num_warps=1,
    )  # fmt: skip
