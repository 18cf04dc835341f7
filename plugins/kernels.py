"""The operators' kernels in TensorRT's argument order (inputs, int32 extras, outputs, constexprs), over the kernels
that PyTorch launches: one source. Layouts and meanings: plugins/table.py."""

from __future__ import annotations

import triton
import triton.language as tl

from fastar_backend.kernels.attend.kernel import attend_kernel
from fastar_backend.kernels.mass.kernel import mean_mass
from fastar_backend.kernels.merge.kernel import merge_kernel, place_kernel
from fastar_backend.kernels.nearest.kernel import nearest_kernel
from fastar_backend.kernels.turn.kernel import turn_kernel


@triton.jit
def _int8(words):
    """A pointer to 32-bit words as one to the int8 in them."""
    return words.to(tl.pointer_type(tl.int8), bitcast=True)


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
        out, count, D, BLOCK_M, BLOCK_N, False, False, False, PRECISION,
    )  # fmt: skip


@triton.jit
def attend_lse(
    query, key, value, count, first,
    queries, groups, rows,
    out, lse,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    attend_kernel(
        query, key, value, count, first, first, first, first, out, lse,
        queries, rows, rows, 0, D**-0.5, groups * D, D, rows * D, rows, groups * D, D,
        out, lse, D, BLOCK_M, BLOCK_N, False, False, True, PRECISION,
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
        out, count, D, BLOCK_M, BLOCK_N, True, False, False, PRECISION,
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
def measure(
    query, key, count, lse, usage, row,
    queries, groups, rows, streams, stride, own,
    usage_after,
    D: tl.constexpr, DECAY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < rows
    mass = mean_mass(query, key, count, lse, column, queries, stride, rows, rows, D**-0.5, groups * D, D, rows * D,
                     rows, D, BLOCK_M, PRECISION)  # fmt: skip
    before = tl.load(usage + group * rows + column, mask=inside, other=0.0)
    since = column - tl.load(row + group // (groups // streams))
    fresh = (since >= 0) & (since < own)
    tl.store(usage_after + group * rows + column,
             tl.where(fresh, mass, before + (mass - before) * (1 - DECAY)), mask=inside)  # fmt: skip


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
    level = 127.0 * (vector / length[:, None])
    level = (level + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to the nearest whole number, halves to even
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
    slot, newcomer, replace, new_value, new_key, new_code, new_usage, key, value, code, count, usage,
    pairs, tokens, slots, rows,
    key_after, value_after, code_after, count_after, usage_after, loser_value, loser_code, loser_count, loser_usage,
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
        lost_usage = tl.load(usage_after + group * rows + to)
    else:
        held = 1.0
        lost = tl.load(new_value + token * D + dims)
        lost_code = tl.load(_int8(new_code) + token * D + dims)
        lost_usage = tl.load(new_usage + token)
    tl.store(loser_value + pair * D + dims, lost)
    tl.store(_int8(loser_code) + pair * D + dims, lost_code)
    tl.store(loser_count + pair, held)
    tl.store(loser_usage + pair, lost_usage)
    place_kernel(
        slot, newcomer, replace, new_key, new_value, _int8(new_code), new_usage,
        pairs, tokens, slots, tokens * D, rows * D, rows,
        key_after, value_after, _int8(code_after), count_after, usage_after, D,
    )  # fmt: skip


@triton.jit
def merge(
    target, order, new_value, new_key, new_code, new_count, new_usage, key, value, code, count, usage,
    tokens, slots, rows,
    key_after, value_after, code_after, count_after, usage_after,
    D: tl.constexpr, RENEW: tl.constexpr,
):  # fmt: skip
    merge_kernel(
        target, order, new_count, new_usage, new_value, new_key, _int8(new_code),
        tokens, slots, tokens * D, rows * D, rows,
        key_after, value_after, _int8(code_after), count_after, usage_after, D, RENEW,
    )  # fmt: skip


@triton.jit
def arrange(
    key,
    tokens,
    order,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's place is the number of tokens whose key is less, or equal and that are before it."""
    key += tl.program_id(1).to(tl.int64) * tokens
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = token < tokens
    mine = tl.load(key + token, mask=valid, other=0)[:, None]
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tokens, BLOCK):
        other = start + tl.arange(0, BLOCK)
        inside = (other < tokens)[None, :]
        theirs = tl.load(key + other, mask=other < tokens, other=0)[None, :]
        less = inside & ((theirs < mine) | ((theirs == mine) & (other[None, :] < token[:, None])))
        before += tl.sum(less.to(tl.int32), 1)
    tl.store(order + tl.program_id(1).to(tl.int64) * tokens + before, token, mask=valid)


@triton.jit
def block_means(
    query, order,
    queries, groups,
    mean,
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = entry < queries
    line = tl.load(order + group * queries + entry, mask=valid, other=0).to(tl.int64)
    dims = tl.arange(0, D)
    x = tl.load(query + (line[:, None] * groups + group) * D + dims[None, :], mask=valid[:, None], other=0.0)
    total = tl.sum(x.to(tl.float32), 0) / tl.minimum(queries - block * BLOCK_M, BLOCK_M)
    at = (group * tl.num_programs(0) + block) * D + dims
    tl.store(mean + at, total.to(mean.dtype.element_ty))


@triton.jit
def near_blocks(
    mean, key, count,
    query_blocks, rows,
    near,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, D)
    k = tl.load(key + (group * rows + column)[:, None] * D + dims[None, :])
    members = tl.load(count + group * rows + column)
    bias = tl.where(members > 0, tl.log(tl.where(members > 0, members, 1.0)), -float("inf"))
    for start in range(0, query_blocks, BLOCK_M):
        line = start + tl.arange(0, BLOCK_M)
        valid = line < query_blocks
        q = tl.load(mean + (group * query_blocks + line)[:, None] * D + dims[None, :], mask=valid[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * D**-0.5 + bias[None, :]
        tl.store(near + (group * query_blocks + line) * tl.num_programs(0) + block, tl.max(logits, 1), mask=valid)


@triton.jit
def _worth(near, start, first, last, key_blocks, BLOCK: tl.constexpr):
    """Key blocks start.. and what they are worth: the chunk's own, first..last, most; what is not a number, nothing."""
    block = start + tl.arange(0, BLOCK)
    value = tl.load(near + block, mask=block < key_blocks, other=-float("inf"))
    value = tl.where(value == value, value, -float("inf"))
    return block, tl.where((block >= first) & (block < last), float("inf"), value)


@triton.jit
def choose_blocks(
    near, row,
    groups, query_blocks, key_blocks, streams, own,
    counts, blocks,
    DENSITY: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block's place is the number of blocks that are better, or as good and before it."""
    group = tl.program_id(1).to(tl.int64)
    at = group * query_blocks + tl.program_id(0)
    near += at * key_blocks
    start = tl.load(row + group // (groups // streams))
    first, last = start // KEYS, tl.cdiv(start + own, KEYS)
    held = 0
    for one in range(0, key_blocks, BLOCK):
        block, value = _worth(near, one, first, last, key_blocks, BLOCK)
        held += tl.sum((value > -float("inf")).to(tl.int32), 0)
        better = tl.zeros([BLOCK], tl.int32)
        for two in range(0, key_blocks, BLOCK):
            other, rival = _worth(near, two, first, last, key_blocks, BLOCK)
            wins = rival[None, :] > value[:, None]
            wins |= (rival[None, :] == value[:, None]) & (other[None, :] < block[:, None])
            better += tl.sum(wins.to(tl.int32), 1)
        tl.store(blocks + at * key_blocks + better, block, mask=block < key_blocks)
    share = tl.ceil((held - (last - first)).to(tl.float32) * DENSITY).to(tl.int32)
    tl.store(counts + at, last - first + share)


@triton.jit
def _buckets(x, planes, table, bits, projections, D: tl.constexpr):
    """Bucket numbers, int32, of x [n, D] float32: the signs of projections table * bits and on."""
    plane = tl.arange(0, D) * projections + table * bits
    bucket = tl.zeros([x.shape[0]], tl.int32)
    for bit in range(0, bits):
        sign = tl.sum(x * tl.load(planes + plane + bit)[None, :], 1) > 0
        bucket |= sign.to(tl.int32) << bit
    return bucket


@triton.jit
def signatures(
    x, planes,
    tokens, groups, bits,
    bucket,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = token < tokens
    at = (token.to(tl.int64)[:, None] * groups + group) * D + tl.arange(0, D)[None, :]
    vector = tl.load(x + at, mask=valid[:, None], other=0.0).to(tl.float32)
    tl.store(bucket + group * tokens + token, _buckets(vector, planes, 0, bits, bits, D), mask=valid)


@triton.jit
def keep_text(
    query, key, count, planes, always,
    queries, groups, tokens, projections, bits,
    count_after,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = token < tokens
    dims = tl.arange(0, D)[None, :]
    k = tl.load(key + (group * tokens + token)[:, None] * D + dims, mask=inside[:, None], other=0.0).to(tl.float32)
    keep = tl.load(always + group * tokens + token, mask=inside, other=0.0) != 0
    for table in range(0, projections // bits):
        theirs = _buckets(k, planes, table, bits, projections, D)
        for start in range(0, queries, BLOCK_M):
            line = start + tl.arange(0, BLOCK_M)
            valid = line < queries
            at = (line.to(tl.int64)[:, None] * groups + group) * D + dims
            q = tl.load(query + at, mask=valid[:, None], other=0.0).to(tl.float32)
            mine = tl.where(valid, _buckets(q, planes, table, bits, projections, D), -1)
            keep |= tl.max((theirs[:, None] == mine[None, :]).to(tl.int32), 1) > 0
    held = tl.load(count + group * tokens + token, mask=inside, other=0.0)
    tl.store(count_after + group * tokens + token, tl.where(keep, held, 0.0), mask=inside)
