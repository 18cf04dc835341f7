"""ANN top-1 on int8 tensor cores: the held group nearest to each probe, by cosine of quantised unit vectors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest_kernel(
    probe, code, first,
    probes, slots,
    similarity, match,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """probe: int8 [heads, probes, D]; code: int8 [heads, slots, D]; first: [heads]: the held slots are first..slots.
    match: int32 [heads, probes], -1 where nothing is held; any of equally near ones. similarity: float32 [heads,
    probes], the cosine as the codes see it.

    Codes have length 127 or little more, so a product stays below 2^15, and a slot's block number is kept in the low 16
    bits beside it: one multiply-add and one maximum an element, and the row's maximum is taken once, at the end."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    line = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = line < probes
    dims = tl.arange(0, D)
    step = tl.arange(0, BLOCK_N)
    p = tl.load(probe + (head * probes + line)[:, None] * D + dims[None, :], mask=valid[:, None], other=0)
    begin = tl.load(first + head)
    codes = code + head * slots * D
    best = tl.full([BLOCK_M, BLOCK_N], -0x7FFFFFFF, tl.int32)
    count = tl.cdiv(slots - begin, BLOCK_N)
    for index in range(0, count):
        # The last block ends at the last slot and may overlap the one before, or begin before the first held slot.
        slot = tl.maximum(tl.minimum(begin + index * BLOCK_N, slots - BLOCK_N), 0) + step
        held = (slot >= begin) & (slot < slots)
        c = tl.load(codes + slot[:, None] * D + dims[None, :], mask=held[:, None], other=0)
        score = tl.dot(p, tl.trans(c), out_dtype=tl.int32) * 65536 + index
        best = tl.maximum(best, tl.where(held[None, :], score, -0x7FFFFFFF))
    top, column = tl.max(best, 1, return_indices=True)
    index = top & 0xFFFF
    slot = tl.maximum(tl.minimum(begin + index * BLOCK_N, slots - BLOCK_N), 0) + column
    found = top != -0x7FFFFFFF
    tl.store(similarity + head * probes + line, tl.where(found, (top >> 16) / 16129.0, -1.0), mask=valid)
    tl.store(match + head * probes + line, tl.where(found, slot, -1), mask=valid)
