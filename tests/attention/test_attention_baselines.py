"""Every named policy under the same laws, and the baselines against the float64 loops of their rules."""

from __future__ import annotations

import pytest
import torch
from random_streams import distance, drive, layout_of, shape_of, tokens
from torch import Tensor

from fastar_backend.attention import CacheShape, FrameCache, make_cache, reference
from fastar_backend.attention.baselines import flow_cache, history, radial, svg1, svg2
from fastar_backend.attention.baselines import reference as rules
from fastar_backend.attention.cache import attention
from fastar_backend.attention.layers import PortableCaches
from fastar_backend.attention.policies import POLICIES
from fastar_backend.config import AttentionConfig, BaselineConfig, parse
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.snapshot import Snapshot
from fastar_backend.engine.stream import ChunkRequest, StreamOptions
from fastar_backend.errors import InvalidInput

EACH = pytest.mark.parametrize("name", POLICIES)
SPARSE = ("radial", "svg1", "svg2")
ODD = [
    pytest.param({"heads": 3, "head_dim": 10, "frame_tokens": 7, "chunk_frames": 2}, id="7x10"),
    pytest.param({"heads": 1, "head_dim": 22, "frame_tokens": 25, "chunk_frames": 1}, id="25x22"),
    pytest.param({"heads": 2, "head_dim": 6, "frame_tokens": 5, "chunk_frames": 3}, id="5x6"),
]
# Settings at which nothing is left out (Radial's mask has none).
EXACT = {
    "dense": {"kind": "dense"},
    "dense, AnnSA of everything": {"kind": "dense", "sparse_density": 0.9999, "dense_steps": 0.0},
    "window": {"kind": "window", "budget_frames": 12},
    "flowcache": {"kind": "flowcache", "budget_frames": 12},
    "svg1": {"kind": "svg1", "baseline": {"svg1_share": 1.0}},
    "svg2": {"kind": "svg2", "baseline": {"svg2_top_p": 1.0}},
}


def config_of(name: str, budget: int = 6, chunk: int = 2, **changes) -> AttentionConfig:
    """The policy, in every layer and pass."""
    config = POLICIES[name](budget, chunk)
    baseline = config.baseline.model_copy(update={"dense_layers": 0} | changes)
    return config.model_copy(update={"baseline": baseline})


class Watched:
    """What a cache's passes were given, gave and said about it."""

    def __init__(self, cache: FrameCache) -> None:
        self.cache, self.passes = cache, []
        self.attend, cache.attend = cache.attend, self

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, progress: float) -> Tensor:
        before = self.cache.executed
        out = self.attend(query, key, value, progress)
        keys, values = (x.clone() for x in self.cache.view(key, value))
        allowed = self.cache.allowed(torch.arange(query.shape[1]))
        seen = torch.ones(len(query), query.shape[1], keys.shape[1], dtype=torch.bool) if allowed is None else allowed
        self.passes.append((query.clone(), keys, values, self.cache.bias, seen, self.cache.executed - before, out))
        return out


@EACH
@pytest.mark.parametrize("sizes", ODD)
def test_finite_causal_and_repeatable(name, sizes):
    shape = shape_of(**sizes)
    config, chunks = config_of(name, chunk=shape.chunk_frames), 8
    qkv = tokens(shape, chunks * shape.chunk_frames, seed=1, change=0.3)
    run = drive(shape, config, qkv)
    for passes in run.outputs:
        assert all(out.isfinite().all() and out.shape == passes[0].shape for out in passes)
    assert drive(shape, config, qkv).clean.equal(run.clean)
    split = 5 * shape.chunk_tokens
    other = [torch.cat([a[:, :split], -b[:, split:]], 1) for a, b in zip(qkv, qkv, strict=True)]
    later = drive(shape, config, other)
    assert later.clean[:, :split].equal(run.clean[:, :split]), "later input changed earlier output"
    assert not later.clean[:, split:].equal(run.clean[:, split:])


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("sizes", ODD[::2])
def test_streamed_equals_the_whole_where_nothing_is_left_out(name, sizes):
    shape = shape_of(**sizes)
    qkv = tokens(shape, 3 * shape.chunk_frames, seed=2)
    settings = {"dense_steps": 0.0, **EXACT[name]}
    config = AttentionConfig.model_validate(
        settings | {"baseline": {"dense_layers": 0, **settings.get("baseline", {})}}
    )
    run = drive(shape, config, qkv)
    assert run.density == pytest.approx([1.0] * 3)
    assert distance(run.clean, reference.whole_sequence(*qkv, layout_of(shape))) < 1e-4


@EACH
def test_the_budget_is_held_where_there_is_one(name):
    shape, config = shape_of(), config_of(name)
    run = drive(shape, config, tokens(shape, 24, seed=3, change=0.3))
    assert all(0 < density <= 1 for density in run.density)
    if config.bounded:
        assert max(run.tokens) == run.tokens[-1] == 6 * shape.frame_tokens
        assert len(set(run.bytes)) == 1
        assert run.density[-1] < 0.5
    else:
        assert run.tokens[-1] == 24 * shape.frame_tokens
    exact = name in ("dense", "teacache", "annca-lsh", "annca-quant")
    assert (run.density[-1] == 1) == exact


@EACH
def test_output_and_density_are_those_of_the_mask(name):
    shape = shape_of(heads=2, head_dim=6, frame_tokens=5)
    cache = make_cache(shape, config_of(name))
    watched = Watched(cache)
    drive(shape, config_of(name), tokens(shape, 10, seed=4, change=0.3), cache=cache)
    for query, keys, values, bias, seen, executed, out in watched.passes[-4:]:
        weight = 1.0 if bias is None else bias.exp()[:, None]
        for row in range(query.shape[1]):
            one = slice(row, row + 1)
            slow = reference.attention(query[:, one], keys, values, (weight * seen[:, one])[:, 0])
            assert distance(out[:, one], slow) < 1e-5
        assert executed == pytest.approx(sum(int(entry) for entry in seen.flatten()) / shape.heads)


@EACH
def test_a_snapshot_and_a_fork_go_on_to_the_bit(world, name):
    engine = StreamEngine(world, AttentionConfig(), max_streams=3, deterministic=True)
    engine.open(1, "a dark maze", StreamOptions(seed=3, attention=config_of(name)))
    for action in ("forward", "", "turn_left", "", ""):
        engine.step([ChunkRequest(1, (action,))])
    engine.restore(2, Snapshot.from_bytes(engine.snapshot(1).to_bytes()))
    engine.fork(1, 3)
    for action in ("forward", "attack", ""):
        original, restored, forked = engine.step([ChunkRequest(stream, (action,)) for stream in (1, 2, 3)])
        assert (restored.frames == original.frames).all()
        assert (forked.frames == original.frames).all()
        assert restored.stats.density == forked.stats.density == original.stats.density
    assert all(stream.caches.config == config_of(name) for stream in engine.streams.values())


@pytest.mark.parametrize("kind", SPARSE)
def test_first_layers_and_first_steps_are_dense(kind):
    shape = shape_of()
    config = AttentionConfig(kind=kind, dense_steps=0.3, baseline=BaselineConfig(svg2_least=0.0, svg2_top_p=0.1))
    qkv = tokens(shape, 16, seed=5)
    layers = PortableCaches(shape, config, 2)
    first, second = (drive(shape, config, qkv, cache=cache) for cache in layers)
    assert first.density == [1.0] * 8
    assert second.density[-1] < 0.9
    dense = drive(shape, AttentionConfig(kind="dense"), qkv)
    for mine, exact in zip(second.outputs, dense.outputs, strict=True):
        assert mine[0].equal(exact[0]), "progress 0 is below dense_steps"
    assert not second.outputs[-1][1].equal(dense.outputs[-1][1])


@pytest.mark.parametrize(
    ("frames", "chunk", "size", "block", "decay"),
    [
        (9, 2, 7, 1, 0.2),
        (12, 3, 25, 4, 0.2),
        (20, 1, 24, 2, 1.0),
        (18, 2, 13, 5, 0.2),
        (2, 2, 5, 8, 0.2),
        (11, 1, 1, 1, 2),
        (9, 2, 13, 3, 2.0),
        (9, 2, 13, 4, 0.2),
    ],
)
def test_radial_mask(frames, chunk, size, block, decay):
    plan = radial.plan_of(frames, chunk, size, block, decay, torch.device("cpu"))
    assert history.mask(plan, torch.arange(chunk * size), frames * size).equal(
        rules.radial(frames, chunk, size, block, decay)
    )
    assert history.pairs(plan) == rules.radial(frames, chunk, size, block, decay).sum()


def test_radial_density_falls_with_distance():
    """At the paper's own size: within a frame all, then half, then a narrowing band; far away one frame in two."""
    share = [radial.pair_mask(d, 1560, 128, 0.2).float().mean().item() for d in (0, 1, 2, 4, 15, 16, 17)]
    assert share[0] == 1
    assert sorted(share[:5], reverse=True) == share[:5]
    assert 0 < share[4] < 0.3
    assert share[5] > 0 == share[6]


@pytest.mark.parametrize(
    ("frames", "chunk", "size", "block", "share"),
    [(9, 2, 7, 1, 0.3), (13, 3, 25, 4, 0.5), (20, 1, 24, 2, 0.1), (3, 3, 5, 2, 0.3), (6, 2, 9, 4, 1.0)],
)
def test_svg1_masks(frames, chunk, size, block, share):
    spatial = svg1.spatial(frames, chunk, size, share, torch.device("cpu"))
    temporal = svg1.temporal(frames, chunk, size, block, share, torch.device("cpu"))
    for plan, slow in zip((spatial, temporal), rules.svg1(frames, chunk, size, block, share), strict=True):
        assert history.mask(plan, torch.arange(chunk * size), frames * size).equal(slow)
        assert history.pairs(plan) == slow.sum()


def test_svg1_gives_each_head_the_mask_that_serves_it():
    """Head 0 attends to the newest frames, head 1 to its own place in all frames."""
    shape = shape_of(heads=2, head_dim=24, frame_tokens=9, chunk_frames=1, reach=1)
    frames = 20
    query, key, value = (torch.zeros(2, frames * 9, 24) for _ in range(3))
    value.normal_(generator=torch.Generator().manual_seed(6))
    free = slice(shape.rope_split[0], None)  # dimensions that time does not turn
    place = torch.eye(9).repeat(frames, 1)
    key[1, :, free][:, :9], query[1, :, free][:, :9] = 9 * place, 9 * place
    key[0, :, free][:, 0] = 9 * (torch.arange(frames) >= frames - 4).float().repeat_interleave(9)
    query[0, :, free][:, 0] = 9
    cache = make_cache(shape, AttentionConfig(kind="svg1", dense_steps=0.0, baseline=BaselineConfig(dense_layers=0)))
    drive(shape, AttentionConfig(), [query, key, value], cache=cache)
    assert cache.temporal.tolist() == [False, True]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("top_p", "least"), [(0.9, 0.1), (0.5, 0.0), (0.0, 0.4), (1.0, 0.0)])
def test_svg2_choice(seed, top_p, least):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 5, 10, generator=generator), torch.randn(2, 13, 10, generator=generator)
    size = torch.randint(1, 9, (2, 13), generator=generator).float()
    chosen = svg2.choose(query, key, size, top_p, least)
    for head in range(2):
        assert chosen[head].equal(rules.svg2_choice(query[head], key[head], size[head], top_p, least))


def test_svg2_leaves_out_empty_clusters():
    query, key = torch.randn(1, 3, 6), torch.randn(1, 4, 6)
    size = torch.tensor([[3.0, 0.0, 2.0, 1.0]])
    chosen = svg2.choose(query, key, size, 0.99, 0.0)
    assert not chosen[..., 1].any()
    assert chosen[..., [0, 2, 3]].any()


def test_kmeans_finds_separate_clusters_and_ends():
    generator = torch.Generator().manual_seed(7)
    centers = 20 * torch.randn(3, 5, 8, generator=generator)
    true = torch.randint(0, 5, (3, 101), generator=generator)
    x = centers.gather(1, true[..., None].expand(-1, -1, 8)) + torch.randn(3, 101, 8, generator=generator)
    label, centroids, size = svg2.kmeans(x, centers + 1, 50)
    assert label.equal(true)
    for head in range(3):
        for cluster in range(5):
            members = x[head][true[head] == cluster]
            assert size[head, cluster] == len(members)
            torch.testing.assert_close(centroids[head, cluster], members.mean(0), rtol=1e-5, atol=1e-4)


def test_kmeans_leaves_an_empty_cluster_where_it_was():
    x = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(8))
    start = torch.cat([x[:, :2], torch.full((1, 1, 4), 1e3)], 1)
    _, centroids, size = svg2.kmeans(x, start, 10)
    assert size[0, 2] == 0
    assert centroids[0, 2].equal(start[0, 2])


def test_svg2_clusters_grow_with_the_history_up_to_a_number():
    shape = shape_of(heads=2, head_dim=6, frame_tokens=12)
    settings = {"dense_layers": 0, "svg2_key_clusters": 17, "svg2_query_clusters": 2}
    config = AttentionConfig(kind="svg2", dense_steps=0.0, baseline=BaselineConfig(**settings))
    cache, found = make_cache(shape, config), []
    drive(
        shape,
        config,
        tokens(shape, 14, seed=9),
        cache=cache,
        before_chunk=lambda c: found.append(c.key_centroids.shape[1]),
    )
    assert found == [0, 3, 6, 9, 12, 15, 17]
    assert cache.query_centroids.shape == (2, 2, 6)


@pytest.mark.parametrize("mix", [0.0, 0.07, 1.0])
def test_flowcache_scores(mix):
    generator = torch.Generator().manual_seed(10)
    query, keys, raw = (torch.randn(2, n, 10, generator=generator) for n in (5, 23, 23))
    found = flow_cache.scores(query, keys, raw, mix)
    for head in range(2):
        slow = rules.flowcache_scores(query[head], keys[head], raw[head], mix)
        torch.testing.assert_close(found[head].double(), slow, rtol=1e-4, atol=1e-7)


def test_flowcache_keeps_the_best_tokens_and_the_last_chunk():
    """Followed for a whole stream in float64: which tokens are left, their keys, values and times."""
    shape = shape_of(heads=2, head_dim=10, frame_tokens=3, dtype=torch.float64)
    config = AttentionConfig(kind="flowcache", budget_frames=5)
    qkv = tokens(shape, 16, seed=11)
    cache, layout = make_cache(shape, config), layout_of(shape)
    held = [[], []]  # of each head: token numbers before the last chunk
    for start in range(0, 16, 2):
        own = slice(start * 3, (start + 2) * 3)
        drive(shape, config, [x[:, own] for x in qkv], start=start, cache=cache)
        if start == 0:
            continue
        query = layout.place(qkv[0][:, own], [time for time in (start, start + 1) for _ in range(3)], start)
        for head in range(2):
            pool = held[head] + list(range((start - 2) * 3, start * 3))
            raw = qkv[1][head, pool]
            keys = layout.place(raw[None], [token // 3 for token in pool], start)[0]
            worth = rules.flowcache_scores(query[head], keys, raw, 0.07)
            best = sorted(range(len(pool)), key=lambda i: -worth[i])[: 3 * 3]
            held[head] = sorted(pool[i] for i in best)
            slots = slice(cache.slots - len(held[head]), cache.slots)
            assert cache.time[head, slots].tolist() == [token // 3 for token in held[head]]
            assert cache.values[head, slots].equal(qkv[2][head, held[head]])
    assert cache.times == [14, 15]
    assert cache.used == 9


def test_recall_of_flowcache_is_that_of_the_tokens_it_holds():
    """Values are unique, so they tell which token an entry is."""
    shape = shape_of(heads=2, head_dim=10, frame_tokens=5)
    qkv = tokens(shape, 14, seed=12)
    cache = make_cache(shape, AttentionConfig(kind="flowcache", budget_frames=5))
    watched = Watched(cache)
    run = drive(shape, AttentionConfig(), qkv, cache=cache, recall=True)
    query, keys, values, _, _, _, _ = watched.passes[-1]
    place = layout_of(shape).place
    whole = place(qkv[1], [time for time in range(14) for _ in range(5)], 12)
    recall = []
    for head in range(2):
        token = [int((qkv[2][head] == value).all(-1).nonzero()) for value in values[head]]
        for q in query[head, ::12].double():
            dense = (whole[head].double() @ q / 10**0.5).softmax(0)
            held = (keys[head].double() @ q / 10**0.5).softmax(0)
            recall.append(sum(min(float(dense[t]), float(part)) for t, part in zip(token, held, strict=True)))
    assert run.recall[-1] == pytest.approx(sum(recall) / len(recall), abs=1e-5)
    assert 0.2 < run.recall[-1] < 0.9


def test_budgets_of_service_are_those_of_the_policy(world):
    engine = StreamEngine(world, AttentionConfig(budget_frames=6, recent_frames=3))
    for name in POLICIES:
        config = config_of(name)
        booked = engine.bytes_of(StreamOptions(attention=config))
        assert (booked == engine.stream_bytes) == (not config.bounded)
    with pytest.raises(InvalidInput, match="budget_frames"):
        engine.open(1, "a maze", StreamOptions(attention=AttentionConfig(kind="flowcache", budget_frames=1)))
    engine.open(1, "a maze", StreamOptions(attention=AttentionConfig(kind="radial", budget_frames=1)))
    engine.close(1)
    engine.stream_bytes = 2 * engine.bytes_of(StreamOptions())
    with pytest.raises(InvalidInput, match="budget_frames: got 4000; allowed: about"):
        engine.open(1, "a maze", StreamOptions(attention=AttentionConfig(kind="flowcache", budget_frames=4000)))
    engine.open(1, "a maze", StreamOptions(attention=AttentionConfig(kind="svg1", budget_frames=4000)))


@pytest.mark.parametrize(
    ("values", "field", "allowed"),
    [
        ({"kind": "svg3"}, "kind", "svg2"),
        ({"kind": "svg1", "baseline": {"svg1_share": 0}}, "baseline.svg1_share", "greater than 0"),
        ({"kind": "svg2", "baseline": {"svg2_top_p": 1.5}}, "baseline.svg2_top_p", "less than or equal to 1"),
        ({"baseline": {"radial": 1}}, "baseline.radial", "radial_decay"),
        ({"kind": "dense", "reuse": "always"}, "reuse", "teacache"),
        ({"kind": "fastar", "reuse": "teacache"}, "", "reuse must be off where kind is fastar"),
        ({"kind": "flowcache", "budget_frames": 2, "sink_frames": 2}, "", "budget_frames must exceed sink_frames"),
    ],
)
def test_wrong_settings_are_named(values, field, allowed):
    with pytest.raises(InvalidInput) as caught:
        parse(AttentionConfig, values, "attention")
    assert str(caught.value).startswith(".".join(filter(None, ["attention", field])))
    assert allowed in str(caught.value)


def test_attention_of_chosen_heads_leaves_others_alone():
    query, keys, values = (torch.randn(3, n, 6) for n in (4, 9, 9))
    out = torch.full((3, 4, 6), torch.nan)
    plan = [
        history.Block(torch.tensor([0, 2]), torch.tensor([1, 5, 8])),
        history.Block(torch.tensor([1, 3]), torch.tensor([0])),
    ]
    history.attend(query, keys, values, plan, torch.tensor([2]), out)
    assert out[:2].isnan().all()
    torch.testing.assert_close(
        out[2:, [0, 2]], attention(query[2:, [0, 2]], keys[2:, [1, 5, 8]], values[2:, [1, 5, 8]], None)
    )
    torch.testing.assert_close(out[2, [1, 3]], values[2, [0, 0]])


def shape_bytes(shape: CacheShape, frames: int) -> int:
    return 2 * 4 * shape.heads * shape.head_dim * frames * shape.frame_tokens


def test_flowcache_takes_little_more_than_a_window_of_its_budget():
    shape = shape_of(head_dim=64)
    flow, window = (make_cache(shape, AttentionConfig(kind=kind, budget_frames=12)) for kind in ("flowcache", "window"))
    assert window.nbytes == shape_bytes(shape, 12 + shape.chunk_frames)
    assert window.nbytes < flow.nbytes < 1.05 * window.nbytes
