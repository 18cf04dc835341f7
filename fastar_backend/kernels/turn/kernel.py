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
    """source (not out itself: programs read pairs) has rows of D at [token * source_row + head * source_head] -> out likewise. Token t is turned by the angles in
    line turns[t // frame_tokens] of cos and sin, float32 [lines, TIME / 2]; dimensions from TIME on pass through."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    valid = token < tokens
    dims = tl.arange(0, D)
    line = tl.load(turns + token // frame_tokens, mask=valid, other=0)
    pair = line[:, None] * (TIME // 2) + (dims // 2)[None, :]
    in_time = valid[:, None] & (dims < TIME)[None, :]
    c = tl.load(cos + pair, mask=in_time, other=1.0)
    s = tl.load(sin + pair, mask=in_time, other=0.0)
    at = token.to(tl.int64)[:, None] * source_row + head * source_head + dims[None, :]
    to = token.to(tl.int64)[:, None] * out_row + head * out_head + dims[None, :]
    x = tl.load(source + at, mask=valid[:, None], other=0.0).to(tl.float32)
    even = (dims % 2 == 0)[None, :]
    partner = tl.load(source + at + tl.where(even, 1, -1), mask=valid[:, None], other=0.0).to(tl.float32)
    x = x * c + tl.where(even, -s, s) * partner
    tl.store(out + to, x.to(out.dtype.element_ty), mask=valid[:, None])
