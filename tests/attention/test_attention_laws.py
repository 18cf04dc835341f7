"""Laws that every attention policy obeys, and those of the caches one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_streams import distance, drive, shape_of, tokens
from torch import Tensor

from fastar_backend.attention import CacheShape, FrameCache, TempCache, make_cache
from fastar_backend.attention.cache import attention
from fastar_backend.config import AttentionConfig

CHUNK = 2  # latent frames, of `shape_of`
POLICIES = {
    "dense": {"kind": "dense"},
    "window": {"kind": "window", "budget_frames": 4},
    "window of one frame": {"kind": "window", "budget_frames": 1},
    "window and sink": {"kind": "window", "budget_frames": 5, "sink_frames": 1},
    "default": {},
    "small": {"budget_frames": 5, "recent_frames": 3},
    "sinks": {"budget_frames": 6, "recent_frames": 2, "sink_frames": 2},
    "no memory": {"budget_frames": 4, "recent_frames": 4},
    "lsh": {"budget_frames": 5, "recent_frames": 3, "index": "lsh", "index_bits": 4, "sparse_density": 0.5},
    "exact": {"budget_frames": 5, "recent_frames": 3, "index": "exact"},
    "sparse": {"budget_frames": 5, "recent_frames": 3, "sparse_density": 0.3, "sparse_block": 7},
    "sparse from the first step": {"budget_frames": 5, "recent_frames": 3, "sparse_density": 0.3, "dense_steps": 0},
    "paper": {"budget_frames": 8, "recent_frames": CHUNK, "match": "query", "weight": "effective"},
    "recent below a chunk": {"budget_frames": 3, "recent_frames": 1},
    "mean representative": {"budget_frames": 5, "recent_frames": 3, "representative": "mean"},
    "no weight": {"budget_frames": 5, "recent_frames": 3, "weight": "none"},
    "all merge": {"budget_frames": 5, "recent_frames": 3, "merge_threshold": -1.0},
}
EACH_POLICY = pytest.mark.parametrize("policy", [pytest.param(POLICIES[name], id=name) for name in POLICIES])


def config_of(policy: dict) -> AttentionConfig:
    return AttentionConfig.model_validate(policy)


def unclamped(cache: FrameCache) -> Tensor:
    """The whole frames' keys [heads, tokens, head_dim] with their temporal positions taken off."""
    times = torch.tensor(cache.times).repeat_interleave(cache.shape.frame_tokens)
    position = (times - cache.start).clamp(min=-cache.shape.reach)
    return cache.shape.turn(cache.keys[:, cache.prefix : cache.end], -position)


@EACH_POLICY
def test_output_is_finite_causal_and_repeatable(policy):
    shape, config = shape_of(), config_of(policy)
    qkv = tokens(shape, 10 * CHUNK, seed=1, change=0.3)
    run = drive(shape, config, qkv)
    for passes in run.outputs:
        for output in passes:
            assert output.shape == (shape.heads, shape.chunk_tokens, shape.head_dim)
            assert output.isfinite().all()
    again = drive(shape, config, qkv)
    assert again.clean.equal(run.clean)
    split = 6 * shape.chunk_tokens
    other = [torch.cat([a[:, :split], -b[:, split:]], 1) for a, b in zip(qkv, qkv, strict=True)]
    later = drive(shape, config, other)
    assert later.clean[:, :split].equal(run.clean[:, :split]), "later input changed earlier output"
    assert not later.clean[:, split:].equal(run.clean[:, split:])


@EACH_POLICY
def test_memory_and_density_are_bounded(policy):
    shape, config = shape_of(), config_of(policy)
    run = drive(shape, config, tokens(shape, 14 * CHUNK, seed=2, change=0.3))
    assert all(0 < density <= 1 for density in run.density)
    assert run.density[0] == 1
    if config.kind != "dense":
        assert max(run.tokens) <= config.budget_frames * shape.frame_tokens
        assert len(set(run.bytes)) == 1, "a bounded cache allocates once"
        assert run.density[-1] < 0.95
    else:
        assert run.density[-1] == 1


@EACH_POLICY
def test_first_chunk_is_plain_attention(policy):
    shape, config = shape_of(), config_of(policy)
    qkv = tokens(shape, CHUNK, seed=3)
    assert drive(shape, config, qkv).clean.equal(drive(shape, AttentionConfig(kind="dense"), qkv).clean)


@EACH_POLICY
def test_start_far_in_time_changes_nothing(policy):
    """Ten million latent frames are two weeks: positions are relative, so they stay exact."""
    shape, config = shape_of(), config_of(policy)
    qkv = tokens(shape, 8 * CHUNK, seed=4, change=0.3)
    near = drive(shape, config, qkv).clean
    far = drive(shape, config, qkv, start=10_000_000).clean
    assert far.isfinite().all()
    assert distance(far, near) < 1e-6


@EACH_POLICY
def test_unused_room_never_leaks(policy):
    shape, config = shape_of(), config_of(policy).model_copy(update={"merge_early": True})  # heads fill unevenly
    qkv = tokens(shape, 8 * CHUNK, seed=5, change=0.3)

    def poison(cache: FrameCache) -> None:
        for buffer in (cache.keys, cache.values):
            buffer[:, : cache.first] = torch.nan
            buffer[:, cache.end :] = torch.nan
        if isinstance(cache, TempCache):
            for head in range(shape.heads):  # slots that another head uses: finite, but never attended to
                free = (cache.count[head] == 0).nonzero()[:, 0]
                free = free[free >= cache.first]
                cache.keys[head, free], cache.values[head, free] = 50.0, 1e6

    poisoned = drive(shape, config, qkv, before_chunk=poison)
    assert poisoned.clean.equal(drive(shape, config, qkv).clean)


def test_memory_fills_unevenly_between_heads():
    """What the poisoned slots above rely on: heads differ in how many groups they hold."""
    shape = shape_of()
    config = AttentionConfig(merge_early=True, budget_frames=16, recent_frames=3)
    run = drive(shape, config, tokens(shape, 5 * CHUNK, seed=5, change=0.3))
    assert isinstance(run.cache, TempCache)
    assert len(set((run.cache.count > 0).sum(1).tolist())) > 1


def still(shape: CacheShape, frames: int, seed: int) -> list[Tensor]:
    """A stream whose every frame has the same keys and values; queries are new each time."""
    one = tokens(shape, 1, seed=seed)
    queries = tokens(shape, frames, seed=seed + 1)[0]
    return [queries, one[1].repeat(1, frames, 1), one[2].repeat(1, frames, 1)]


@pytest.mark.parametrize("weight", ["count", "effective"])
@pytest.mark.parametrize("index", ["exact", "quantised", "lsh"])
@pytest.mark.parametrize(
    ("reach", "recent", "budget"),
    [pytest.param(3, 4, 8, id="newest beyond reach"), pytest.param(1, CHUNK, CHUNK + 2, id="paper: one chunk whole")],
)
def test_merging_equal_keys_is_exact(reach, recent, budget, index, weight):
    """m equal keys as one with logit bias log m and their mean value: dense attention, 20 frames of it held in 2."""
    shape = shape_of(reach=reach, dtype=torch.float64)
    qkv = still(shape, 24, seed=6)
    config = AttentionConfig(budget_frames=budget, recent_frames=recent, index=index, weight=weight)
    dense = drive(shape, AttentionConfig(kind="dense"), qkv)
    fast = drive(shape, config, qkv)
    assert isinstance(fast.cache, TempCache)
    assert fast.cache.count.max() > 5
    assert fast.density[-1] < 0.5
    assert distance(fast.clean, dense.clean) < 1e-6


def test_merging_different_values_of_equal_keys_is_exact():
    shape = shape_of(reach=2, dtype=torch.float64)
    qkv = still(shape, 20, seed=7)
    qkv[2] = tokens(shape, 20, seed=8)[2]
    fast = drive(shape, AttentionConfig(budget_frames=6, recent_frames=3, index="exact"), qkv)
    assert distance(fast.clean, drive(shape, AttentionConfig(kind="dense"), qkv).clean) < 1e-6


@pytest.mark.parametrize(
    "policy", [{"weight": "none"}, {"merge_threshold": 1.0, "budget_frames": 5, "fold_threshold": 1.0}]
)
def test_the_exactness_tests_can_fail(policy):
    """Without counts, or with members dropped instead of merged, the same stream is far from dense."""
    shape = shape_of(reach=2, dtype=torch.float64)
    qkv = still(shape, 24, seed=6)
    config = AttentionConfig.model_validate({"budget_frames": 8, "recent_frames": 3, "index": "exact", **policy})
    assert distance(drive(shape, config, qkv).clean, drive(shape, AttentionConfig(kind="dense"), qkv).clean) > 1e-3


def test_groups_of_one_are_dense():
    shape = shape_of()
    qkv = tokens(shape, 5 * CHUNK, seed=9)
    config = AttentionConfig(budget_frames=16, recent_frames=2, merge_threshold=1.0)
    fast = drive(shape, config, qkv)
    assert isinstance(fast.cache, TempCache)
    assert fast.cache.used == (5 * CHUNK - 2) * shape.frame_tokens
    assert set(fast.cache.count.unique().tolist()) == {0.0, 1.0}
    assert distance(fast.clean, drive(shape, AttentionConfig(kind="dense"), qkv).clean) < 1e-6


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_hard_budget_and_guarded_frames_on_any_stream(data):
    """Whatever comes, the budget holds, and sinks and the newest frames are neither merged nor dropped."""
    sinks, recent, memory = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    config = AttentionConfig(
        budget_frames=sinks + recent + memory,
        sink_frames=sinks,
        recent_frames=recent,
        merge_threshold=data.draw(st.sampled_from([-1.0, 0.5, 0.9, 1.0])),
        index=data.draw(st.sampled_from(["exact", "lsh", "quantised"])),
        weight=data.draw(st.sampled_from(["count", "effective", "none"])),
        match=data.draw(st.sampled_from(["key", "query"])),
        representative=data.draw(st.sampled_from(["last", "mean"])),
    )
    shape = shape_of(heads=2, head_dim=6, frame_tokens=3)
    chunks = data.draw(st.integers(1, 8))
    qkv = tokens(
        shape, chunks * CHUNK, seed=data.draw(st.integers(0, 99)), change=data.draw(st.sampled_from([0, 0.3, 1]))
    )
    qkv[1] *= data.draw(st.sampled_from([0.0, 1.0, 100.0]))
    run = drive(shape, config, qkv)
    assert max(run.tokens) <= config.budget_frames * 3
    assert len(set(run.bytes)) == 1
    assert run.clean.isfinite().all()
    cache, frames = run.cache, chunks * CHUNK
    guarded = list(range(frames))
    if frames > sinks + recent:
        guarded = guarded[:sinks] + guarded[-recent:]
    assert cache.times == guarded
    rows = [time * 3 + i for time in guarded for i in range(3)]
    torch.testing.assert_close(unclamped(cache), qkv[1][:, rows], rtol=1e-5, atol=1e-4)
    assert cache.values[:, cache.prefix : cache.end].equal(qkv[2][:, rows])


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (5, 9)])
@pytest.mark.parametrize("start", [0, 7])
def test_a_full_memory_is_spread_over_the_past_and_the_picture(rows, columns, start):
    """Content that never recurs: what is kept thins out with age, evenly in the picture; a plain queue would hold the
    last three frames that left."""
    shape = shape_of(heads=2, head_dim=16, frame_tokens=rows * columns, chunk_frames=1, reach=2, columns=columns)
    config = AttentionConfig(budget_frames=4, recent_frames=1, index="exact", fold_threshold=1.0)
    frames = 61
    qkv = tokens(shape, frames, seed=10)
    qkv[2][..., 0] = torch.arange(rows * columns).repeat(frames)  # values say where in the frame they were
    cache = drive(shape, config, qkv, start=start).cache
    assert isinstance(cache, TempCache)
    assert (cache.count == 1).all(), "full, and nothing recurs"
    for head in range(shape.heads):
        held = {}
        places = cache.values[head, : cache.slots, 0].int().tolist()
        for time, place in zip(cache.time[head].tolist(), places, strict=True):
            held.setdefault(start + frames - 2 - time, []).append(divmod(place, columns))  # by age
        assert max(held) > 20
        share = [sum(len(held.get(age, [])) for age in ages) / len(ages) / rows / columns
                 for ages in (range(4), range(4, 12), range(12, 28))]  # fmt: skip
        assert share[0] > 1.3 * share[1] > 1.3**2 * share[2] > 0.05, share
        for age, places in held.items():
            if 12 <= age < 28:  # one in 8 at most: never two beside each other
                assert all(abs(a[0] - b[0]) + abs(a[1] - b[1]) > 1 for a in places for b in places if a != b), age


@pytest.mark.parametrize(("frames", "sinks"), [(1, 0), (3, 0), (4, 1), (5, 2)])
def test_window_drops_the_oldest_behind_the_sinks(frames, sinks):
    shape = shape_of()
    qkv = tokens(shape, 6 * CHUNK, seed=11)
    cache = make_cache(shape, AttentionConfig(kind="window", budget_frames=frames, sink_frames=sinks))
    run = drive(shape, AttentionConfig(), qkv, cache=cache)
    assert run.cache.times == list(range(sinks)) + list(range(12 - (frames - sinks), 12))
    rows = [time * shape.frame_tokens + i for time in cache.times for i in range(shape.frame_tokens)]
    torch.testing.assert_close(unclamped(cache), qkv[1][:, rows], rtol=1e-5, atol=1e-5)
    assert cache.values[:, : cache.end].equal(qkv[2][:, rows])


@pytest.mark.parametrize("reach", [1, 5, 18])
def test_rotating_step_by_step_is_rotating_at_once(reach):
    shape = shape_of(reach=reach)
    qkv = tokens(shape, 24, seed=12)
    cache = make_cache(shape, AttentionConfig(kind="dense"))
    drive(shape, AttentionConfig(), qkv, cache=cache)
    cache.begin(24)
    position = (torch.arange(24) - 24).clamp(min=-reach).repeat_interleave(shape.frame_tokens)
    assert distance(cache.keys[:, : cache.end], shape.turn(qkv[1], position)) < 1e-6


def test_dense_cache_grows_without_losing_anything():
    shape = shape_of(heads=1, frame_tokens=3)
    qkv = tokens(shape, 60, seed=13)
    run = drive(shape, AttentionConfig(kind="dense"), qkv)
    assert run.tokens == [3 * CHUNK * (chunk + 1) for chunk in range(30)]
    assert run.cache.values[:, : run.cache.end].equal(qkv[2])
    assert run.bytes[-1] > run.bytes[0]


def test_density_counts_executed_pairs():
    """Window of 2 frames, chunk of 2: 4 frames of keys executed where dense attention has chunk + 1 times 2."""
    shape = shape_of()
    run = drive(shape, AttentionConfig(kind="window", budget_frames=2), tokens(shape, 5 * CHUNK, seed=14))
    assert run.density == pytest.approx([1, 1, 4 / 6, 4 / 8, 4 / 10])


def test_effective_count_fades_old_members():
    """count' = count * min(1, exp(mean query . (old key - new key) / sqrt d)) + joined; the leaving frame's queries."""
    shape = shape_of(heads=1, head_dim=6, frame_tokens=1, chunk_frames=1, reach=1)
    query, old, new = torch.tensor([0.0, 0, 0, 0, 1, 0]), torch.eye(6)[4], torch.eye(6)[4] * 2
    qkv = [query.expand(1, 4, 6), torch.stack([old, new, new, new])[None], torch.randn(1, 4, 6)]
    config = AttentionConfig(budget_frames=2, recent_frames=1, weight="effective", index="exact")
    cache = make_cache(shape, config)
    drive(shape, config, [x[:, :3] for x in qkv], cache=cache)
    assert isinstance(cache, TempCache)
    assert cache.count.item() == pytest.approx(1 + torch.tensor(-(6**-0.5)).exp().item())


def test_bias_enters_the_logits():
    q, k, v = torch.zeros(1, 1, 2), torch.zeros(1, 2, 2), torch.tensor([[[1.0, 0], [0, 1]]])
    out = attention(q, k, v, torch.tensor([[3.0, 1]]).log())
    torch.testing.assert_close(out, torch.tensor([[[0.75, 0.25]]]))
