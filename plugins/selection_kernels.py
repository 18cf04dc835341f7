"""Kernels of the operators that choose what is attended to (AnnSA, AnnCA), in the same order of arguments as those of
plugins/kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels import whole


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


@triton.jit
def _levels(x):
    """Rows of x, float32, as whole numbers to 127, and the scale of each."""
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-12) / 127.0
    return whole(x / scale[:, None]).to(tl.float16), scale


@triton.jit
def _text_logits(q, k, members, QUANTISED: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    if QUANTISED:
        mine, my_scale = _levels(q.to(tl.float32))
        theirs, their_scale = _levels(k.to(tl.float32))
        logits = tl.dot(mine, tl.trans(theirs)) * my_scale[:, None] * their_scale[None, :]
    else:
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return tl.where((members > 0)[None, :], logits * D**-0.5, -float("inf"))


@triton.jit
def text_mass(
    query, key, count,
    queries, groups, tokens,
    mass,
    D: tl.constexpr, QUANTISED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    line = tl.arange(0, BLOCK_M) * tl.cdiv(queries, BLOCK_M)
    valid = line < queries
    dims = tl.arange(0, D)
    at = (line.to(tl.int64)[:, None] * groups + group) * D + dims[None, :]
    q = tl.load(query + at, mask=valid[:, None], other=0.0)
    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        members = tl.load(count + group * tokens + token, mask=token < tokens, other=0.0)
        row = (group * tokens + token)[:, None] * D + dims[None, :]
        k = tl.load(key + row, mask=(token < tokens)[:, None], other=0.0)
        logits = _text_logits(q, k, members, QUANTISED, D, PRECISION)
        new = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp(peak - new) + tl.sum(members[None, :] * tl.exp(logits - new[:, None]), 1)
        peak = new
    weight = tl.where(valid, 1.0 / total, 0.0) / tl.sum(valid.to(tl.float32), 0)
    for start in range(0, tokens, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        members = tl.load(count + group * tokens + token, mask=token < tokens, other=0.0)
        row = (group * tokens + token)[:, None] * D + dims[None, :]
        k = tl.load(key + row, mask=(token < tokens)[:, None], other=0.0)
        logits = _text_logits(q, k, members, QUANTISED, D, PRECISION)
        share = members * tl.sum(weight[:, None] * tl.exp(logits - peak[:, None]), 0)
        tl.store(mass + group * tokens + token, share, mask=token < tokens)


@triton.jit
def condense_text(
    mass, key, value, count,
    tokens,
    key_after, value_after, count_after,
    D: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token is kept if those of more mass (or as much, and before it) do not hold the share yet."""
    group = tl.program_id(1).to(tl.int64)
    mass += group * tokens
    dims = tl.arange(0, D)
    rest, logs = 0.0, 0.0
    key_sum, value_sum = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for one in range(0, tokens, BLOCK):
        token = one + tl.arange(0, BLOCK)
        inside = token < tokens
        own = tl.load(mass + token, mask=inside, other=0.0)
        ahead = tl.zeros([BLOCK], tl.float32)
        for two in range(0, tokens, BLOCK):
            other = two + tl.arange(0, BLOCK)
            theirs = tl.load(mass + other, mask=other < tokens, other=0.0)
            before = (theirs[None, :] == own[:, None]) & (other[None, :] < token[:, None])
            before |= theirs[None, :] > own[:, None]
            ahead += tl.sum(tl.where(before, theirs[None, :], 0.0), 1)
        keep = ahead < SHARE
        at = token[:, None] * D + dims[None, :]
        members = tl.load(count + group * tokens + token, mask=inside, other=0.0)
        k = tl.load(key + group * tokens * D + at, mask=inside[:, None], other=0.0)
        v = tl.load(value + group * tokens * D + at, mask=inside[:, None], other=0.0)
        row = group * (tokens + 1) + token
        tl.store(key_after + row[:, None] * D + dims[None, :], k, mask=inside[:, None])
        tl.store(value_after + row[:, None] * D + dims[None, :], tl.where(keep[:, None], v, 0.0).to(v.dtype),
                 mask=inside[:, None])  # fmt: skip
        tl.store(count_after + row, tl.where(keep, members, 0.0), mask=inside)
        joins = (keep == 0) & (own > 0) & (members > 0)
        lost = tl.where(joins, own, 0.0)
        rest += tl.sum(lost, 0)
        logs += tl.sum(lost * (tl.log(tl.where(joins, members, 1.0)) - tl.log(tl.where(joins, own, 1.0))), 0)
        key_sum += tl.sum(lost[:, None] * k.to(tl.float32), 0)
        value_sum += tl.sum((lost / tl.where(joins, members, 1.0))[:, None] * v.to(tl.float32), 0)
    share = tl.where(rest > 0, rest, 1.0)
    weight = tl.where(rest > 0, tl.exp(logs / share + tl.log(share)), 0.0)
    last = group * (tokens + 1) + tokens
    tl.store(key_after + last * D + dims, (key_sum / share).to(key_after.dtype.element_ty))
    tl.store(value_after + last * D + dims, (value_sum / share * weight).to(value_after.dtype.element_ty))
    tl.store(count_after + last, weight)
