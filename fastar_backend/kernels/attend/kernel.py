"""Attention of one chunk's queries over a compressed cache: softmax(q k / sqrt(d) + log count) v, one program a query
block.

Keys below `memory` stand for groups: each has a count, and its row of `value` is the *sum* of its members' values. So
the log-count law (paper, section on TempCache) costs nothing: sum(count e^x mean) = sum(e^x sum), and the counts enter
the softmax's total alone. A free slot has count 0 and zeros. `first` says, head by head, where the used memory begins,
so that heads of unequal length share a launch. With SPARSE, a query block visits only the key blocks of its compact
index (AnnSA), and queries are taken in `order`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _visit(acc, total, peak, q, key, value, count, column, stop, scale,
           D: tl.constexpr, COUNTED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One key block: rows `column` of key and value, those below `stop` if MASK. Running softmax in base 2."""
    rows = column[:, None] * D + tl.arange(0, D)[None, :]
    if MASK:
        inside = column < stop
        k = tl.load(key + rows, mask=inside[:, None], other=0.0)
        v = tl.load(value + rows, mask=inside[:, None], other=0.0)
    else:
        k = tl.load(key + rows)
        v = tl.load(value + rows)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASK:
        logits = tl.where(inside[None, :], logits, -float("inf"))
    new = tl.maximum(peak, tl.max(logits, 1) * scale)
    p = tl.exp2(logits * scale - new[:, None])
    shrink = tl.exp2(peak - new)
    if COUNTED:
        members = tl.load(count + column, mask=inside, other=0.0) if MASK else tl.load(count + column)
        total = total * shrink + tl.sum(p * members[None, :], 1)
    else:
        total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new


@triton.jit
def attend_kernel(
    query, key, value, count, first, order, counts, blocks, before, before_lse,
    queries, memory, stop, most, scale, query_row, query_head, key_head, count_head, out_row,
    out_head,
    out,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPARSE: tl.constexpr, BEFORE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """query: rows of D at [row * query_row + head * query_head], out likewise; key, value: [head, rows, D] with rows
    adjacent and heads `key_head` apart; count: float32 [head, rows]; first: [heads]; order: [heads, queries]; counts:
    [heads, query blocks]; blocks: [heads, query blocks, most]. A head's rows * D fit 32 bits.
    BEFORE: what other keys gave is taken in, an output laid out like `out` and its log-sum-exp [heads, queries].
    SPARSE: rows and counts exist up to the end of the last block, and are zeros from `stop` on; below it every key
    counts."""
    block, head = tl.program_id(0), tl.program_id(1)
    lines = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = lines < queries
    if SPARSE:
        lines = tl.load(order + head.to(tl.int64) * queries + lines, mask=valid, other=0)
    dims = tl.arange(0, D)
    at = lines.to(tl.int64)[:, None] * query_row + head.to(tl.int64) * query_head + dims[None, :]
    q = tl.load(query + at, mask=valid[:, None], other=0.0)
    key += head.to(tl.int64) * key_head
    value += head.to(tl.int64) * key_head
    count += head.to(tl.int64) * count_head
    to = lines.to(tl.int64)[:, None] * out_row + head.to(tl.int64) * out_head + dims[None, :]
    if BEFORE:
        acc = tl.load(before + to, mask=valid[:, None], other=0.0).to(tl.float32)
        peak = tl.load(before_lse + head.to(tl.int64) * queries + lines, mask=valid, other=0.0) * 1.4426950408889634
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        peak = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: a block without any key must not make NaN
        total = tl.zeros([BLOCK_M], tl.float32)
    step = tl.arange(0, BLOCK_N)
    scale = scale * 1.4426950408889634
    if SPARSE:
        row = head.to(tl.int64) * tl.num_programs(0) + block
        chosen = tl.load(counts + row)
        blocks += row * most
        for index in range(0, chosen):
            column = tl.load(blocks + index) * BLOCK_N + step
            acc, total, peak = _visit(acc, total, peak, q, key, value, count, column, stop, scale,
                                      D, True, False, PRECISION)  # fmt: skip
    else:
        begin = tl.load(first + head) // BLOCK_N * BLOCK_N
        for start in range(begin, memory // BLOCK_N * BLOCK_N, BLOCK_N):
            acc, total, peak = _visit(acc, total, peak, q, key, value, count, start + step, stop, scale,
                                      D, True, False, PRECISION)  # fmt: skip
        if (memory % BLOCK_N > 0) & (begin < memory):  # the block that memory ends in
            acc, total, peak = _visit(acc, total, peak, q, key, value, count, memory // BLOCK_N * BLOCK_N + step,
                                      memory, scale, D, True, True, PRECISION)  # fmt: skip
        whole = memory + (stop - memory) // BLOCK_N * BLOCK_N
        for start in range(memory, whole, BLOCK_N):
            acc, total, peak = _visit(acc, total, peak, q, key, value, count, start + step, stop, scale,
                                      D, False, False, PRECISION)  # fmt: skip
        if whole < stop:
            acc, total, peak = _visit(acc, total, peak, q, key, value, count, whole + step, stop, scale,
                                      D, False, True, PRECISION)  # fmt: skip
    tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask=valid[:, None])
