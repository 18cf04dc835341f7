"""RecallProbe: what it measures is checked against cases whose answer is known."""

from __future__ import annotations

import pytest
import torch
from random_streams import drive, layout_of, shape_of, tokens
from torch import Tensor

from fastar_backend.attention import TempCache, make_cache
from fastar_backend.attention.recall import QUERY_STRIDE, RecallProbe
from fastar_backend.config import AttentionConfig

SMALL = {"budget_frames": 5, "recent_frames": 3, "index": "exact"}


def test_dense_recall_is_one():
    shape = shape_of()
    run = drive(shape, AttentionConfig(kind="dense"), tokens(shape, 12, seed=1), recall=True)
    assert run.recall == pytest.approx([1.0] * 6, abs=1e-5)


def known_stream(shape, frames: int) -> list[Tensor]:
    """Frame t's keys all have logit log(t + 1) with every query, so its share of the mass is (t + 1) / sum."""
    direction = torch.zeros(shape.head_dim)
    direction[-1] = 1  # a spatial dimension: time does not turn it
    query = direction.expand(shape.heads, frames * shape.frame_tokens, -1)
    logit = torch.arange(1.0, frames + 1).log().repeat_interleave(shape.frame_tokens)
    key = query * logit[:, None] * shape.head_dim**0.5
    return [query, key, torch.randn_like(key)]


def test_recall_of_a_window_is_the_mass_it_kept():
    shape = shape_of(chunk_frames=1)
    run = drive(shape, AttentionConfig(kind="window", budget_frames=2), known_stream(shape, 6), recall=True)
    kept = [sum(range(max(1, t - 1), t + 2)) / sum(range(1, t + 2)) for t in range(6)]
    assert run.recall == pytest.approx(kept, abs=1e-5)


@pytest.mark.parametrize("sinks", [1, 2])
def test_recall_of_a_window_with_sinks(sinks):
    shape = shape_of(chunk_frames=1)
    config = AttentionConfig(kind="window", budget_frames=sinks + 1, sink_frames=sinks)
    run = drive(shape, config, known_stream(shape, 6), recall=True)
    assert run.recall[5] == pytest.approx((sum(range(1, sinks + 1)) + 5 + 6) / 21, abs=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"budget_frames": 6, "sink_frames": 1}, {"recent_frames": 1}, {"sparse_density": 1.0}]
)
def test_recall_of_exact_merging_is_one(settings):
    """Equal frames in one group lose nothing; that includes frames that leave in the chunk that brought them."""
    shape = shape_of(reach=1)
    one = tokens(shape, 1, seed=2)
    qkv = [x.repeat(1, 20, 1) for x in one]
    run = drive(shape, AttentionConfig(**{**SMALL, **settings}), qkv, recall=True)
    assert isinstance(run.cache, TempCache)
    assert run.cache.merged > 5 * shape.frame_tokens
    assert run.recall == pytest.approx([1.0] * 10, abs=1e-4)


def test_recall_falls_with_wrong_group_weights():
    shape = shape_of(reach=1)
    qkv = [x.repeat(1, 20, 1) for x in tokens(shape, 1, seed=2)]
    run = drive(shape, AttentionConfig(**SMALL, weight="none"), qkv, recall=True)
    assert run.recall[0] == pytest.approx(1, abs=1e-5)
    assert run.recall[-1] < 0.5
    assert sorted(run.recall[1:], reverse=True) == run.recall[1:]


@pytest.mark.parametrize("fold", [1.0, -1.0])
def test_recall_by_hand(fold):
    """A merging stream beyond its budget, against the definition in loops: sum of min(dense mass, fast mass)."""
    shape = shape_of(heads=1, frame_tokens=5, chunk_frames=1)
    config = AttentionConfig(budget_frames=3, recent_frames=2, index="exact", fold_threshold=fold)
    qkv = tokens(shape, 12, seed=3, change=0.3)
    cache = make_cache(shape, config)
    probe = RecallProbe(shape, cache)
    drive_with(shape, cache, probe, qkv, 11)
    owner = probe.owner[0].clone()
    query, key, value = (x[:, 55:60] for x in qkv)
    cache.begin(11)
    probe.begin(11)
    cache.attend(query, key, value, 1.0)
    probe.measure(query, key, value)

    layout = layout_of(shape)
    times = [t for t in range(12) for _ in range(5)]
    keys = layout.place(qkv[1], times, 11)[0]
    q = query[0, 0].double()
    weight = ((keys @ q) / shape.head_dim**0.5).exp()
    dense = weight / weight.sum()
    entries: list[tuple[float, float]] = []  # dense and fast mass, the latter not yet normalised
    for slot in range(cache.slots):
        if cache.count[0, slot] > 0:
            members = [i for i in range(50) if owner[i] == slot and times[i] not in cache.times]
            logit = cache.keys[0, slot].double() @ q / shape.head_dim**0.5
            entries.append((float(dense[members].sum()), float(cache.count[0, slot] * logit.exp())))
    for i, time in enumerate(times):
        if time in cache.times or time == 11:
            entries.append((float(dense[i]), float(weight[i])))
    total = sum(fast for _, fast in entries)
    by_hand = sum(min(mass, fast / total) for mass, fast in entries)
    assert cache.merged > 3
    assert (owner[: 5 * 9] == -1).any() == (fold == 1.0), "folding loses nothing, dropping does"
    assert 0.3 < by_hand < 0.999
    assert probe.recall == pytest.approx(by_hand, abs=1e-4)
    assert QUERY_STRIDE >= 5, "only the first query is measured"


def drive_with(shape, cache, probe, qkv, chunks: int) -> None:
    for time in range(chunks):
        part = [x[:, time * shape.chunk_tokens : (time + 1) * shape.chunk_tokens] for x in qkv]
        cache.begin(time)
        probe.begin(time)
        before = list(cache.times)
        cache.append(*part)
        probe.appended(*part, before)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(SMALL, id="fastar"),
        pytest.param({"kind": "window", "budget_frames": 3}, id="window"),
        pytest.param({**SMALL, "sparse_density": 0.3, "sparse_block": 7}, id="sparse"),
        pytest.param({**SMALL, "index": "lsh"}, id="lsh"),
    ],
)
def test_recall_is_a_share_and_measuring_changes_nothing(settings):
    shape = shape_of()
    qkv = tokens(shape, 16, seed=4, change=0.3)
    run = drive(shape, AttentionConfig(**settings), qkv, recall=True)
    assert all(0 < recall <= 1 + 1e-5 for recall in run.recall)
    assert run.recall[-1] < 1
    assert run.clean.equal(drive(shape, AttentionConfig(**settings), qkv).clean)


def test_sparse_recall_is_below_that_of_the_cache():
    shape = shape_of()
    qkv = tokens(shape, 16, seed=5, change=0.3)
    whole = drive(shape, AttentionConfig(**SMALL), qkv, recall=True).recall
    half = drive(shape, AttentionConfig(**SMALL, sparse_density=0.5), qkv, recall=True).recall
    tenth = drive(shape, AttentionConfig(**SMALL, sparse_density=0.1), qkv, recall=True).recall
    assert tenth[-1] < half[-1] < whole[-1]
