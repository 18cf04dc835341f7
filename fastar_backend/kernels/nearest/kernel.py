"""ANN top-1 on int8 tensor cores: the nearest held group of each probe, by cosine of quantised unit vectors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest_kernel(
    probe, probe_scale, code, code_scale, first,
    probes, slots,
    similarity, match,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """probe: int8 [heads, probes, D]; code: int8 [heads, slots, D]; scales: float32, one a row; first: [heads], the held
    slots are first..slots. similarity: float32 [heads, probes]; match: int32, -1 where nothing is held. The lowest
    slot wins a tie."""
    block, head = tl.program_id(0), tl.program_id(1)
    lines = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = lines < probes
    dims = tl.arange(0, D)
    base = head.to(tl.int64) * probes + lines
    p = tl.load(probe + base[:, None] * D + dims[None, :], mask=valid[:, None], other=0)
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    which = tl.full([BLOCK_M], -1, tl.int32)
    begin = tl.load(first + head)
    for start in range(begin, slots, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        held = slot < slots
        row = head.to(tl.int64) * slots + slot
        c = tl.load(code + row[:, None] * D + dims[None, :], mask=held[:, None], other=0)
        scale = tl.load(code_scale + row, mask=held, other=0.0)
        score = tl.dot(p, tl.trans(c), out_dtype=tl.int32).to(tl.float32) * scale[None, :]
        score = tl.where(held[None, :], score, -float("inf"))
        top, place = tl.max(score, 1, return_indices=True)
        better = top > best
        which = tl.where(better, start + place.to(tl.int32), which)
        best = tl.where(better, top, best)
    own = tl.load(probe_scale + base, mask=valid, other=1.0)
    tl.store(similarity + base, tl.where(which >= 0, best * own, -float("inf")), mask=valid)
    tl.store(match + base, which, mask=valid)
