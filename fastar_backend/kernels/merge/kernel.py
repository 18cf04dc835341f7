"""TempCache's update, in place: newcomers take slots, tokens join groups. Every slot is written by one program, and its
members are added in the order given, so that equal inputs make equal caches (no atomics)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_kernel(
    slot, newcomer, replace, new_key, new_value, new_code, new_stay,
    pairs, tokens, slots, new_value_head, key_head, count_head,
    key, value, code, count, stay,
    D: tl.constexpr,
):  # fmt: skip
    """Where replace [heads, pairs], token newcomer [heads, pairs] founds a group of one in slot [heads, pairs]. new_*:
    [heads, tokens, D], values with heads `new_value_head` apart; new_stay: [tokens], all heads'; key, value: [heads,
    rows, D], heads `key_head` apart; count: heads `count_head` apart; code: [heads, slots, D]; stay: [heads, slots]."""
    pair, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = head * pairs + pair
    if tl.load(replace + at) != 0:
        to, source = tl.load(slot + at).to(tl.int64), tl.load(newcomer + at).to(tl.int64)
        dims = tl.arange(0, D)
        row = head * tokens + source
        tl.store(key + head * key_head + to * D + dims, tl.load(new_key + row * D + dims))
        tl.store(
            value + head * key_head + to * D + dims, tl.load(new_value + head * new_value_head + source * D + dims)
        )
        tl.store(code + (head * slots + to) * D + dims, tl.load(new_code + row * D + dims))
        tl.store(stay + head * slots + to, tl.load(new_stay + source))
        tl.store(count + head * count_head + to, 1.0)


@triton.jit
def merge_kernel(
    target, order, new_count, new_stay, new_value, new_key, new_code,
    tokens, slots, new_value_head, key_head, count_head,
    key, value, code, count, stay,
    D: tl.constexpr, RENEW: tl.constexpr,
):  # fmt: skip
    """target: int32 [heads, tokens], ascending; entry p is token order[p], which goes into slot target[p] (`slots`:
    nowhere). count grows by new_count, value (a sum) by new_value. RENEW: the group's key, code and `stay` become
    those of its last member (the paper's representative). Layouts as in `place_kernel`; new_count: [heads, tokens]."""
    entry, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base = head * tokens
    to = tl.load(target + base + entry)
    before = tl.load(target + base + entry - 1, mask=entry > 0, other=-1)
    if (to < slots) & (before != to):  # the first member of its group works for all of them
        dims = tl.arange(0, D)
        place = to.to(tl.int64)
        own = head * slots + place
        total = tl.load(count + head * count_head + place)
        sums = tl.load(value + head * key_head + place * D + dims).to(tl.float32)
        member = entry
        last = entry.to(tl.int64)
        same = to
        while same == to:
            token = tl.load(order + base + member).to(tl.int64)
            last = token
            total += tl.load(new_count + base + last)
            sums += tl.load(new_value + head * new_value_head + token * D + dims).to(tl.float32)
            member += 1
            same = tl.load(target + base + member, mask=member < tokens, other=-1)
        tl.store(count + head * count_head + place, total)
        tl.store(value + head * key_head + place * D + dims, sums.to(value.dtype.element_ty))
        if RENEW:
            tl.store(key + head * key_head + place * D + dims, tl.load(new_key + (base + last) * D + dims))
            tl.store(code + own * D + dims, tl.load(new_code + (base + last) * D + dims))
            tl.store(stay + own, tl.load(new_stay + last))
