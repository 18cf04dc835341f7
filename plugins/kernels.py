"""The operators' kernels in TensorRT's argument order (inputs, int32 extras, outputs, constexprs), over the kernels
that PyTorch launches: one source. Layouts and meanings: plugins/table.py."""

from __future__ import annotations

import triton
import triton.language as tl

from fastar_backend.kernels.attend.kernel import attend_kernel
from fastar_backend.kernels.merge.kernel import merge_kernel, place_kernel
from fastar_backend.kernels.nearest.kernel import nearest_kernel
from fastar_backend.kernels.turn.kernel import turn_kernel


@triton.jit
def _int8(words):
    """A pointer to 32-bit words as one to the int8 in them."""
    return words.to(tl.pointer_type(tl.int8), bitcast=True)


@triton.jit
def whole(x):
    """The nearest whole numbers, halves to even: adding 1.5 * 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def attend(
    query, key, value, count, first,
    queries, groups, rows,
    out,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    attend_kernel(
        query, key, value, count, first, first, first, first, out, count,
        queries, rows, rows, 0, D**-0.5, groups * D, D, rows * D, rows, groups * D, D,
        out, D, BLOCK_M, BLOCK_N, False, False, PRECISION,
    )  # fmt: skip


@triton.jit
def attend_sparse(
    query, key, value, count, order, counts, blocks,
    queries, groups, rows, most,
    out,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    attend_kernel(
        query, key, value, count, counts, order, counts, blocks, out, count,
        queries, rows, rows, most, D**-0.5, groups * D, D, rows * D, rows, groups * D, D,
        out, D, BLOCK_M, BLOCK_N, True, False, PRECISION,
    )  # fmt: skip


@triton.jit
def append(
    cache, new, row,
    tokens, groups, rows, streams,
    cache_after,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = (token < tokens)[:, None]
    dims = tl.arange(0, D)[None, :]
    start = tl.load(row + group // (groups // streams)).to(tl.int64)
    x = tl.load(new + (token.to(tl.int64)[:, None] * groups + group) * D + dims, mask=valid, other=0.0)
    tl.store(cache_after + (group * rows + start + token.to(tl.int64)[:, None]) * D + dims, x, mask=valid)


@triton.jit
def turn(
    source, lines, cos, sin,
    tokens, groups, frames,
    out,
    D: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    turn_kernel(
        source, lines, cos, sin, tokens, groups * D, D, tokens // frames, groups * D, D, out, D, TIME, BLOCK,
    )  # fmt: skip


@triton.jit
def turn_into(
    cache, source, lines, cos, sin,
    tokens, rows, frames, row,
    cache_after,
    D: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    turn_kernel(
        source, lines, cos, sin, tokens, D, tokens * D, tokens // frames, D, rows * D, cache_after + row * D,
        D, TIME, BLOCK,
    )  # fmt: skip


@triton.jit
def quantise(
    x,
    tokens,
    code,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = (token < tokens)[:, None]
    at = (tl.program_id(1).to(tl.int64) * tokens + token)[:, None] * D + tl.arange(0, D)[None, :]
    vector = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(vector * vector, 1)), 1e-12)
    level = whole(127.0 * (vector / length[:, None]))
    tl.store(_int8(code) + at, level.to(tl.int8), mask=valid)


@triton.jit
def nearest(
    probe, code, first,
    probes, slots,
    similarity, match,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    nearest_kernel(_int8(probe), _int8(code), first, probes, slots, similarity, match, D, BLOCK_M, BLOCK_N)


@triton.jit
def place(
    slot, newcomer, replace, new_value, new_key, new_code, new_stay, key, value, code, count, stay,
    pairs, tokens, slots, rows,
    key_after, value_after, code_after, count_after, stay_after, loser_value, loser_code, loser_count,
    D: tl.constexpr,
):  # fmt: skip
    """What the pair leaves without a place is read before `place_kernel` overwrites it: slots of pairs are distinct."""
    group = tl.program_id(1).to(tl.int64)
    pair = group * pairs + tl.program_id(0)
    dims = tl.arange(0, D)
    to, token = tl.load(slot + pair).to(tl.int64), group * tokens + tl.load(newcomer + pair)
    held = tl.load(count_after + group * rows + to)
    if (tl.load(replace + pair) != 0) & (held > 0):
        lost = tl.load(value_after + (group * rows + to) * D + dims)
        lost_code = tl.load(_int8(code_after) + (group * slots + to) * D + dims)
    else:
        held = 1.0
        lost = tl.load(new_value + token * D + dims)
        lost_code = tl.load(_int8(new_code) + token * D + dims)
    tl.store(loser_value + pair * D + dims, lost)
    tl.store(_int8(loser_code) + pair * D + dims, lost_code)
    tl.store(loser_count + pair, held)
    place_kernel(
        slot, newcomer, replace, new_key, new_value, _int8(new_code), new_stay,
        pairs, tokens, slots, tokens * D, rows * D, rows,
        key_after, value_after, _int8(code_after), count_after, stay_after, D,
    )  # fmt: skip


@triton.jit
def merge(
    target, order, new_value, new_key, new_code, new_count, new_stay, key, value, code, count, stay,
    tokens, slots, rows,
    key_after, value_after, code_after, count_after, stay_after,
    D: tl.constexpr, RENEW: tl.constexpr,
):  # fmt: skip
    merge_kernel(
        target, order, new_count, new_stay, new_value, new_key, _int8(new_code),
        tokens, slots, tokens * D, rows * D, rows,
        key_after, value_after, _int8(code_after), count_after, stay_after, D, RENEW,
    )  # fmt: skip
