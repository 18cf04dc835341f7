"""Rotary positions in time, applied on the way into the cache: no pass over memory of its own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn_kernel(
    source, turns, cos, sin,
    tokens, source_row, source_head, frame_tokens, out_row, out_head,
    out,
    D: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """source: rows of D at [token * source_row + head * source_head] -> out likewise. Token t is turned by the angles
    in line turns[t // frame_tokens] of cos and sin, float32 [lines, TIME / 2]; dimensions from TIME on pass through."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    valid = token < tokens
    dims = tl.arange(0, D)
    pair = tl.arange(0, D // 2)
    line = tl.load(turns + token // frame_tokens, mask=valid, other=0)
    in_time = valid[:, None] & (pair < TIME // 2)[None, :]
    angle = line[:, None] * (TIME // 2) + pair[None, :]
    c = tl.load(cos + angle, mask=in_time, other=1.0)
    s = tl.load(sin + angle, mask=in_time, other=0.0)
    at = token.to(tl.int64)[:, None] * source_row + head * source_head + dims[None, :]
    to = token.to(tl.int64)[:, None] * out_row + head * out_head + dims[None, :]
    x = tl.load(source + at, mask=valid[:, None], other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, [BLOCK, D // 2, 2]))
    x = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [BLOCK, D])
    tl.store(out + to, x.to(out.dtype.element_ty), mask=valid[:, None])
