"""How much attention mass each key received from a sample of the queries: what decides which groups stay."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mean_mass(query, key, count, lse, column, queries, stride, memory, stop, scale, query_row, query_head, key_head,
              count_head, D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Of the keys in rows `column` of this program's head: float32, as many as `column` has, undefined from `stop` on.
    Arguments as in `mass_kernel`."""
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, D)
    rows = head * key_head + column.to(tl.int64)[:, None] * D + dims[None, :]
    k = tl.load(key + rows, mask=(column < stop)[:, None], other=0.0)
    members = tl.load(count + head * count_head + column, mask=column < memory, other=1.0)
    total = tl.zeros([column.shape[0]], tl.float32)
    sampled = tl.cdiv(queries, stride)
    for start in range(0, sampled, BLOCK_M):
        sample = start + tl.arange(0, BLOCK_M)
        valid = sample < sampled
        line = sample * stride
        at = line.to(tl.int64)[:, None] * query_row + head * query_head + dims[None, :]
        q = tl.load(query + at, mask=valid[:, None], other=0.0)
        norm = tl.load(lse + head * queries + line, mask=valid, other=float("inf"))
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        total += tl.sum(tl.exp2((logits - norm[:, None]) * 1.4426950408889634), 0)
    return members * total / sampled


@triton.jit
def mass_kernel(
    query, key, count, lse,
    queries, stride, memory, stop, scale, query_row, query_head, key_head, count_head, mass_head,
    mass,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """mass [head, columns]: mean over queries 0, stride, 2 stride, ... of count * exp(logit - lse). Other arguments as
    in `attend_kernel`."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    result = mean_mass(query, key, count, lse, column, queries, stride, memory, stop, scale, query_row, query_head,
                       key_head, count_head, D, BLOCK_M, PRECISION)  # fmt: skip
    tl.store(mass + tl.program_id(1).to(tl.int64) * mass_head + column, result, mask=column < stop)
