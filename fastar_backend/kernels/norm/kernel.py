"""What lies between a transformer block's products: gated residuals, modulated layer norms, RMS norms with rotary
positions. Each reads its rows once and writes its result once; one program a row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def modulate_kernel(
    x, y, table, change, weight, bias,
    dim, frame_tokens, gate, shift, eps,
    out, normed,
    BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """x, y, out, normed: [rows, dim]; table: [6, dim]; change: [rows / frame_tokens, 6, dim]; weight, bias: [dim].
    RESIDUAL: out = x + y, y times row `gate` of table + change if GATED. NORM: normed = the layer norm of that, times 1
    + row `shift` + 1, plus row `shift`; AFFINE: times weight plus bias instead. BLOCK: a power of two, dim at least."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    change += (row // frame_tokens) * 6 * dim
    value = tl.load(x + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        more = tl.load(y + row * dim + column, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            at = gate * dim + column
            more *= tl.load(table + at, mask=inside, other=0.0).to(tl.float32) + tl.load(
                change + at, mask=inside, other=0.0
            ).to(tl.float32)
        value += more
        tl.store(out + row * dim + column, value.to(out.dtype.element_ty), mask=inside)
    if NORM:
        centred = tl.where(inside, value - tl.sum(value, 0) / dim, 0.0)
        value = centred * tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps)
        if AFFINE:
            scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            offset = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        else:
            at = shift * dim + column
            offset = tl.load(table + at, mask=inside, other=0.0).to(tl.float32) + tl.load(
                change + at, mask=inside, other=0.0
            ).to(tl.float32)
            at += dim
            scale = (
                1.0
                + tl.load(table + at, mask=inside, other=0.0).to(tl.float32)
                + tl.load(change + at, mask=inside, other=0.0).to(tl.float32)
            )
        tl.store(normed + row * dim + column, (value * scale + offset).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def heads_kernel(
    source, weight, cos, sin,
    rows, heads, frame_tokens, source_row, eps,
    out,
    D: tl.constexpr, HEADS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """source: rows of parts x heads x D, `source_row` apart; weight: [parts, heads, D]; out: [parts, rows, heads, D].
    Each part of a row is divided by its rms and multiplied by its weight; ROTATE: adjacent pairs are turned by the
    angles in line row % frame_tokens of cos and sin, float32 [frame_tokens, D / 2]. HEADS: a power of two, heads at
    least."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.arange(0, HEADS)
    at = head[:, None] * D + tl.arange(0, D)[None, :]
    inside = (head < heads)[:, None] & (tl.arange(0, D) >= 0)[None, :]
    size = heads * D
    x = tl.load(source + row * source_row + part * size + at, mask=inside, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / size + eps)
    x *= tl.load(weight + part * size + at, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        angle = (row % frame_tokens) * (D // 2) + tl.arange(0, D // 2)
        c, s = tl.load(cos + angle)[None, :], tl.load(sin + angle)[None, :]
        even, odd = tl.split(tl.reshape(x, [HEADS, D // 2, 2]))
        x = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [HEADS, D])
    to = out + (part.to(tl.int64) * rows + row) * size
    tl.store(to + at, x.to(out.dtype.element_ty), mask=inside)
