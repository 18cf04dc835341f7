"""The fast attention stack against the float64 loops of fastar_backend/attention/reference.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from random_streams import THETA, distance, drive, layout_of, shape_of, tokens

from fastar_backend.attention import TempCache, TextCache, ann, ann_sa, reference, temp_cache
from fastar_backend.attention.cache import attention
from fastar_backend.config import AttentionConfig

FLOAT32 = 3e-6  # relative error in norm that float32 is allowed against float64
SHAPES = [
    pytest.param({"heads": 3, "head_dim": 10, "frame_tokens": 7, "chunk_frames": 2}, id="7x10"),
    pytest.param({"heads": 1, "head_dim": 22, "frame_tokens": 15, "chunk_frames": 1, "columns": 5}, id="15x22"),
    pytest.param({"heads": 2, "head_dim": 6, "frame_tokens": 5, "chunk_frames": 3}, id="5x6"),
]


@pytest.mark.parametrize(("heads", "queries", "keys", "dim"), [(3, 7, 15, 10), (1, 1, 63, 22), (2, 15, 1, 6)])
def test_attention(heads, queries, keys, dim):
    torch.manual_seed(0)
    q, k, v = torch.randn(heads, queries, dim), torch.randn(heads, keys, dim), torch.randn(heads, keys, dim)
    counts = torch.randint(0, 4, (heads, keys)).float()
    counts[:, 0] = 2
    assert distance(attention(q, k, v, None), reference.attention(q, k, v)) < FLOAT32
    assert distance(attention(q, k, v, counts.log()), reference.attention(q, k, v, counts)) < FLOAT32


@pytest.mark.parametrize("position", [0, 1, -3, 17])
@pytest.mark.parametrize("dim", [6, 10, 22])
def test_temporal_rotation(position, dim):
    torch.manual_seed(1)
    x, shape = torch.randn(3, 7, dim), shape_of(head_dim=dim, reach=20)
    time_dim = shape.rope_split[0]
    fast = shape.turn(x, torch.full((7,), position))
    assert distance(fast, reference.turned(x, position, time_dim, THETA)) < FLOAT32
    assert fast[..., time_dim:].equal(x[..., time_dim:]), "spatial dimensions are not time's"


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("reach", [1, 4])
def test_dense_cache_is_whole_sequence_attention(sizes, reach):
    shape = shape_of(**sizes, reach=reach)
    qkv = tokens(shape, 4 * shape.chunk_frames, seed=2)
    run = drive(shape, AttentionConfig(kind="dense"), qkv)
    assert distance(run.clean, reference.whole_sequence(*qkv, layout_of(shape))) < FLOAT32
    assert run.density == [1.0] * 4


def test_dense_cache_of_large_frames():
    shape = shape_of(heads=1, head_dim=10, frame_tokens=63, chunk_frames=1)
    qkv = tokens(shape, 3, seed=3)
    run = drive(shape, AttentionConfig(kind="dense"), qkv)
    assert distance(run.clean, reference.whole_sequence(*qkv, layout_of(shape))) < FLOAT32


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize(("window", "sinks"), [(3, 0), (4, 1), (1, 0)])
def test_window_cache_is_whole_sequence_attention_to_the_window(sizes, window, sinks):
    shape = shape_of(**sizes)
    qkv = tokens(shape, 5 * shape.chunk_frames, seed=4)
    run = drive(shape, AttentionConfig(kind="window", budget_frames=window, sink_frames=sinks), qkv)
    whole = reference.whole_sequence(*qkv, layout_of(shape), window=window, sinks=sinks)
    assert distance(run.clean, whole) < FLOAT32


TEMP_CACHES = [
    pytest.param({"budget_frames": 3, "recent_frames": 2}, id="small"),
    pytest.param({"budget_frames": 12, "recent_frames": 1}, id="never full"),
    pytest.param({"budget_frames": 12, "recent_frames": 1, "merge_early": True}, id="merges early"),
    pytest.param({"budget_frames": 5, "sink_frames": 1, "recent_frames": 3}, id="sinks"),
    pytest.param({"budget_frames": 4, "recent_frames": 2, "merge_threshold": 0.5}, id="low threshold"),
    pytest.param({"budget_frames": 4, "recent_frames": 2, "merge_threshold": -1.0}, id="all merge"),
    pytest.param({"budget_frames": 4, "recent_frames": 2, "merge_threshold": 1.0}, id="none merges"),
    pytest.param({"budget_frames": 4, "recent_frames": 3, "match": "query"}, id="query matches"),
    pytest.param({"budget_frames": 4, "recent_frames": 3, "fold_threshold": 1.0}, id="drops"),
    pytest.param({"budget_frames": 3, "recent_frames": 2, "fold_threshold": -1.0}, id="folds all"),
    pytest.param({"budget_frames": 3, "recent_frames": 3}, id="no memory"),
]


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [*(pytest.param(*size.values, torch.float32, id=size.id) for size in SHAPES),
     pytest.param(*SHAPES[0].values, torch.float64, id=f"{SHAPES[0].id}-float64")],
)  # fmt: skip
@pytest.mark.parametrize("settings", TEMP_CACHES)
def test_temp_cache(sizes, dtype, settings):
    shape = shape_of(**sizes, dtype=dtype)
    config = AttentionConfig(kind="fastar", index="exact", **settings)
    chunks = 6
    qkv = tokens(shape, chunks * shape.chunk_frames, seed=5, change=0.3)
    run = drive(shape, config, qkv)
    slow = reference.TempCache(
        shape.heads,
        layout_of(shape),
        budget=(config.budget_frames - config.sink_frames - config.recent_frames) * shape.frame_tokens,
        sinks=config.sink_frames,
        recent=config.recent_frames,
        threshold=config.merge_threshold,
        match=config.match,
        fold=config.fold_threshold,
        early=config.merge_early,
    )
    for chunk in range(chunks):
        part = [x[:, chunk * shape.chunk_tokens : (chunk + 1) * shape.chunk_tokens] for x in qkv]
        want = slow.attend(*part, chunk * shape.chunk_frames)
        for output in run.outputs[chunk]:
            assert distance(output, want) < FLOAT32, f"chunk {chunk}"
        slow.append(*part, chunk * shape.chunk_frames)
    assert isinstance(run.cache, TempCache)
    for head, groups in enumerate(slow.memory):
        counts = run.cache.count[head]
        assert sorted(counts[counts > 0].tolist()) == sorted(group.count for group in groups)
        times = run.cache.time[head][counts > 0]
        assert sorted(times.tolist()) == sorted(group.time for group in groups)
    joined = sum(group.count - 1 for groups in slow.memory for group in groups)
    if config.merge_threshold < 0.95 and config.budget_frames > config.recent_frames + config.sink_frames:
        assert joined, "this stream must have recurring keys, or the test shows nothing"
        assert run.cache.merged >= joined / shape.heads - 0.01  # members of groups that were dropped count too


@pytest.mark.parametrize(("size", "columns"), [(15, 5), (42, 6), (7, 0), (64, 8), (35, 35)])
@pytest.mark.parametrize("time", [0, 3, 16, 10_000_019])
def test_how_long_tokens_stay(size, columns, time):
    shape = shape_of(frame_tokens=size, columns=columns)
    want = [reference.due(time, token, columns) - time for token in range(size)]
    assert temp_cache.stay(time, shape).tolist() == pytest.approx(want, rel=1e-6)
    assert len(set(want)) == size, "no two alike"
    elsewhere = dataclasses.replace(shape, device=torch.device("meta"))
    assert temp_cache.stay(time, elsewhere).device.type == "cpu", "nobody waits for a device to know"


def test_signatures():
    torch.manual_seed(6)
    x, tables, bits = torch.randn(3, 15, 10), 3, 5
    planes = ann.planes(10, tables, bits, x.device)
    for head in range(3):
        assert ann.signatures(x[head], tables, bits).tolist() == reference.signatures(x[head], planes, tables, bits)


@pytest.mark.parametrize(("queries", "block", "blocks"), [(15, 5, 3), (14, 4, 2), (7, 3, 1), (12, 100, 1)])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ann_sa(queries, block, blocks, density):
    torch.manual_seed(7)
    heads, dim, cached = 3, 10, 21
    q, k = torch.randn(heads, queries, dim), torch.randn(heads, cached + queries, dim)
    v = torch.randn(heads, cached + queries, dim)
    counts = torch.randint(0, 4, (heads, cached + queries)).float()
    counts[:, :12], counts[:, cached:] = 2, 1
    config = AttentionConfig(index="exact", sparse_density=density, sparse_block=block, index_bits=6)
    selection = ann_sa.select(q, k[:, :cached], counts[:, :cached].log(), config)
    assert selection.blocks == blocks
    fast = ann_sa.attend(q, k, v, counts.log(), selection)
    planes = ann.planes(dim, 1, 6, q.device)
    slow, _ = reference.ann_sa(q, k, v, counts, queries, planes, 6, density, blocks)
    assert distance(fast, slow) < FLOAT32


@pytest.mark.parametrize("bits", [1, 4, 12])
def test_ann_ca(bits):
    torch.manual_seed(8)
    heads, dim, length = 3, 10, 15
    text = torch.randn(length, 4)
    text[6] = text[2]
    text[9:] = 0
    projection = torch.randn(2, 4, heads * dim)
    key, value = ((text @ p + 1).unflatten(-1, (heads, dim)) for p in projection)
    config = AttentionConfig(select_text=True, text_mass=None, index_tables=2, index_bits=bits)
    cache, query = TextCache(key, value, text, config), torch.randn(heads, 7, dim)
    fast = cache.attend(query)
    planes = ann.planes(dim, 2, bits, query.device)
    slow, kept = reference.ann_ca(query, key.transpose(0, 1), value.transpose(0, 1), text, planes, 2, bits)
    assert distance(fast, slow) < FLOAT32
    assert cache.kept == pytest.approx(sum(kept) / heads)


@pytest.mark.parametrize(("queries", "every"), [(7, 1), (64, 1), (65, 2), (193, 4)])
@pytest.mark.parametrize("mass", [0.3, 0.9, 1.0])
def test_ann_ca_by_mass(queries, every, mass):
    heads, dim, length = 3, 10, 15
    text = torch.randn(length, 4)
    text[6] = text[2]
    text[9:] = 0
    projection = torch.randn(2, 4, heads * dim)
    key, value = ((text @ p + 1).unflatten(-1, (heads, dim)) for p in projection)
    config = AttentionConfig(select_text=True, text_mass=mass, index="exact")
    cache, query = TextCache(key, value, text, config), torch.randn(heads, queries, dim)
    slow, kept = reference.ann_ca_by_mass(query, key.transpose(0, 1), value.transpose(0, 1), text, mass, every)
    assert distance(cache.attend(query), slow) < (FLOAT32 if mass < 1 else 1e-5)
    assert mass == 1 or cache.kept == pytest.approx(sum(kept) / heads)
