"""Each kernel in Triton's interpreter against its plain float64 reference: fresh random inputs, odd sizes, outputs that
hold NaN before."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastar_backend.kernels import ops
from fastar_backend.kernels.attend.reference import attend
from fastar_backend.kernels.merge import reference as merging
from fastar_backend.kernels.nearest.reference import nearest
from fastar_backend.kernels.norm import reference as norm
from fastar_backend.kernels.turn.reference import turn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double().cpu() - reference.cpu()).norm() / reference.norm()).item()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel fails to write shows."""
    real = torch.empty

    def poison(*args, **kwargs):
        out = real(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poison)


def compressed(heads: int, memory: int, stop: int, capacity: int, dim: int, dtype=torch.float32):
    """Keys and values whose unused rows are poison, the groups' counts, and where each head's groups begin."""
    first = torch.randint(0, memory + 1, (heads,), dtype=torch.int32, device=DEVICE)
    key, value = random(heads, capacity, dim, dtype=dtype), random(heads, capacity, dim, dtype=dtype)
    key[:, stop:], value[:, stop:] = torch.nan, torch.nan
    count = torch.randint(1, 9, (heads, capacity), device=DEVICE).float()
    free = torch.arange(memory, device=DEVICE) < first[:, None]
    count[:, :memory] = count[:, :memory].masked_fill(free, 0.0)
    value[:, :memory] = value[:, :memory].masked_fill(free[..., None], 0.0)
    return key, value, count, first


@pytest.mark.parametrize(
    ("queries", "memory", "stop", "dim"),
    [(63, 0, 63, 16), (5, 37, 50, 32), (40, 64, 128, 16), (33, 111, 140, 64), (1, 1, 2, 16), (32, 100, 101, 16)],
)
def test_attend(queries, memory, stop, dim):
    heads = 3
    key, value, count, first = compressed(heads, memory, stop, stop + 9, dim)
    query = random(heads, queries, dim).transpose(0, 1)  # strided, as the transformer has it
    out = ops.attend(query, key, value, count, first, memory, stop)
    expected, _ = attend(query.cpu(), key.cpu(), value.cpu(), count.cpu(), first.cpu(), memory, stop)
    assert error(out, expected) < 1e-5


def test_attend_in_half_precision():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter takes bfloat16 for integers
    key, value, count, first = compressed(2, 70, 130, 140, 64, dtype)
    query = random(50, 2, 64, dtype=dtype)
    out = ops.attend(query, key, value, count, first, 70, 130)
    assert error(out, attend(query.cpu(), key.cpu(), value.cpu(), count.cpu(), first.cpu(), 70, 130)[0]) < 1e-2


def test_attend_in_two_parts(monkeypatch):
    """As on a GPU: another implementation attends to the keys that count once, the kernel goes on from there."""
    heads, dim, queries, memory, stop = 2, 16, 21, 45, 80
    key, value, count, first = compressed(heads, memory, stop, stop, dim)
    query, none = random(queries, heads, dim), torch.zeros(heads, dtype=torch.int32)
    host = [x.cpu() for x in (query, key, value, count)]
    whole = attend(host[0], host[1][:, memory:], host[2][:, memory:], host[3], none, 0, stop - memory)
    monkeypatch.setattr(ops, "_splits", lambda *_: True)
    monkeypatch.setattr(ops, "_whole", lambda *_: tuple(x.float().to(DEVICE) for x in whole))
    out = ops.attend(query, key, value, count, first, memory, stop)
    expected, _ = attend(*host, first.cpu(), memory, stop)
    assert error(out, expected) < 1e-5


@pytest.mark.parametrize(("queries", "stop"), [(40, 200), (96, 257), (7, 64)])
def test_attend_to_selected_blocks(queries, stop):
    heads, dim, rows = 2, 16, 32
    blocks_of_keys = -(-stop // ops.KEY_BLOCK)
    key, value, count, _ = compressed(heads, 0, stop, blocks_of_keys * ops.KEY_BLOCK, dim)
    key[:, stop:], value[:, stop:], count[:, stop:] = 0.0, 0.0, 0.0
    query = random(queries, heads, dim)
    order = torch.rand(heads, queries, device=DEVICE).argsort(-1)
    query_blocks = -(-queries // rows)
    counts = torch.randint(1, blocks_of_keys + 1, (heads, query_blocks), dtype=torch.int32, device=DEVICE)
    blocks = torch.rand(heads, query_blocks, blocks_of_keys, device=DEVICE).argsort(-1).int()
    out = ops.attend(query, key, value, count, counts[:, 0], 0, stop, selection=(order, counts, blocks))
    allowed = torch.zeros(heads, queries, stop, dtype=torch.bool)
    for head in range(heads):
        for line in range(queries):
            block = line // rows
            for chosen in blocks[head, block, : counts[head, block]].tolist():
                allowed[head, order[head, line], chosen * ops.KEY_BLOCK : (chosen + 1) * ops.KEY_BLOCK] = True
    zero = torch.zeros(heads, dtype=torch.int32)
    expected, _ = attend(query.cpu(), key.cpu(), value.cpu(), count.cpu(), zero, stop, stop, allowed)
    assert error(out, expected) < 1e-5


@pytest.mark.parametrize(("probes", "slots"), [(5, 1), (130, 129), (63, 300)])
def test_nearest(probes, slots):
    probe, code = ops.quantise(random(3, probes, 32)), ops.quantise(random(3, slots, 32))
    first = torch.tensor([0, slots // 2, slots], dtype=torch.int32, device=DEVICE)
    similarity, match = (x.cpu() for x in ops.nearest(probe, code, first))
    product, where = nearest(probe.cpu(), code.cpu(), first.cpu())
    held = product > -(1 << 31)
    assert torch.equal(match >= 0, held)
    assert torch.equal((match >= first[:, None].cpu()) & held, held)
    assert torch.allclose(similarity[held].double(), product[held].double() / 16129, atol=1e-6)
    at = code.cpu().gather(1, match.clamp(min=0)[..., None].long().expand(-1, -1, 32))
    assert torch.equal((at.long() * probe.cpu().long()).sum(-1)[held], product[held]), "the nearest, or as near"
    assert (match == where).float().mean() > 0.8


def test_codes_see_cosines():
    a, b = random(1, 50, 64), random(1, 50, 64)
    product = ops.quantise(a).double() @ ops.quantise(b).double().transpose(1, 2) / 16129
    exact = torch.nn.functional.cosine_similarity(a[:, :, None].double(), b[:, None].double(), dim=-1)
    assert (product - exact).abs().max() < 0.02


@pytest.mark.parametrize(("frames", "frame_tokens", "time"), [(1, 33, 16), (3, 20, 6)])
def test_turn(frames, frame_tokens, time):
    tokens, dim = frames * frame_tokens, 16
    source = random(2, tokens, dim).transpose(0, 1)
    angles = random(5, time // 2)
    turns = torch.randint(0, 5, (frames,), dtype=torch.int32, device=DEVICE)
    room = torch.full((2, tokens + 7, dim), torch.nan, device=DEVICE)
    out = room[:, 4 : 4 + tokens].transpose(0, 1)
    ops.turn(source, turns, angles.cos(), angles.sin(), frame_tokens, out)
    assert error(out, turn(source.cpu(), turns.cpu(), angles.cos().cpu(), angles.sin().cpu(), frame_tokens)) < 1e-6
    assert room[:, :4].isnan().all()
    assert room[:, 4 + tokens :].isnan().all()


def groups(heads: int, rows: int, dim: int, room: int = 0) -> ops.Groups:
    key, value = random(heads, rows + room, dim), random(heads, rows + room, dim)
    count = torch.randint(1, 5, (heads, rows + room), device=DEVICE).float()
    return ops.Groups(key, value, ops.quantise(random(heads, rows, dim)), count, random(heads, rows))


def entries(heads: int, rows: int, dim: int) -> ops.Groups:
    return dataclasses.replace(groups(heads, rows, dim), stay=random(rows))


def as_state(value: ops.Groups) -> merging.State:
    return {name: getattr(value, name).cpu().clone() for name in ("key", "value", "code", "count", "stay")}


def same(groups: ops.Groups, state: merging.State) -> None:
    for name, expected in state.items():
        assert torch.allclose(getattr(groups, name).cpu().double(), expected.double(), rtol=1e-5, atol=1e-6), name


def test_place():
    held, new = groups(2, 11, 16, room=5), entries(2, 7, 16)
    slot = torch.stack([torch.randperm(11)[:7] for _ in range(2)]).to(DEVICE)
    newcomer = torch.stack([torch.randperm(7) for _ in range(2)]).to(DEVICE)
    replace = torch.rand(2, 7, device=DEVICE) < 0.5
    expected = merging.place(as_state(held), slot.cpu(), newcomer.cpu(), replace.cpu(), as_state(new))
    ops.place(held, slot, newcomer, replace, new)
    same(held, expected)


@pytest.mark.parametrize("renew", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_merge(renew, tokens):
    held, new = groups(3, 6, 16, room=4), entries(3, tokens, 16)
    target = torch.randint(0, 7, (3, tokens), dtype=torch.int32, device=DEVICE)  # 6: nowhere
    expected = merging.merge(as_state(held), target.cpu(), as_state(new), renew)
    ops.merge(held, target, new, renew)
    same(held, expected)


def test_the_order_of_members_decides_every_bit():
    """No atomics: the same merge twice makes the same bits."""
    results = []
    new, target = entries(2, 64, 16), torch.randint(0, 3, (2, 64), dtype=torch.int32, device=DEVICE)
    start = groups(2, 3, 16)
    for _ in range(2):
        held = ops.Groups(*(tensor.clone() for tensor in start.tensors))
        ops.merge(held, target, new, True)
        results.append(held)
    assert all(torch.equal(a, b) for a, b in zip(results[0].tensors, results[1].tensors, strict=True))


@pytest.mark.parametrize(
    ("add", "gate", "shift", "affine"),
    [(False, None, 0, False), (True, 2, None, True), (True, None, 3, False), (True, 5, None, False)],
)
@pytest.mark.parametrize("dim", [24, 96, 128])
def test_modulate(add, gate, shift, affine, dim):
    x, y = random(2, 3, 5, dim) * 3 + 1, random(2, 3, 5, dim)
    table, change, pair = random(6, dim), random(2, 3, 6, dim), (random(dim), random(dim))
    out, normed = ops.modulate(
        x, table, change, 1e-6, add=y if add else None, gate=gate, shift=shift, affine=pair if affine else None
    )
    flat = [part.flatten(0, 1).cpu() for part in (x, y, change)]
    pair = tuple(part.cpu() for part in pair) if affine else None
    expected = norm.modulate(
        flat[0], flat[1] if add else None, table.cpu(), flat[2], gate=gate, shift=shift, affine=pair, eps=1e-6
    )
    assert out.shape == x.shape
    assert error(out.flatten(0, 1), expected[0]) < 1e-6
    if affine or shift is not None:
        assert error(normed.flatten(0, 1), expected[1]) < 1e-5
    else:
        assert normed is None


@pytest.mark.parametrize(("parts", "heads", "dim", "tokens"), [(2, 3, 16, 5), (1, 1, 32, 7), (2, 12, 16, 4)])
def test_normalise_heads(parts, heads, dim, tokens):
    rows, extra = 3 * tokens, heads * dim  # as queries, keys and values come from one product
    source, weight = random(3, tokens, parts * heads * dim + extra), random(parts, heads, dim)
    angles = random(tokens, dim // 2)
    for turns in (None, (angles.cos(), angles.sin())):
        out = ops.normalise_heads(source, weight, 1e-6, turns)
        columns = source.flatten(0, 1)[:, : parts * heads * dim].unflatten(1, (parts, heads, dim)).cpu()
        cos, sin = (part.cpu() for part in turns) if turns else (None, None)
        expected = norm.heads(columns, weight.cpu(), cos, sin, 1e-6)
        assert out.shape == (parts, rows, heads, dim)
        assert error(out, expected) < 1e-5
