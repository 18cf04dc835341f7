"""The quality guard's measurement, against its reference in loops and against what the attention really gave."""

from __future__ import annotations

import itertools

import pytest
import torch
from random_streams import shape_of, tokens

from fastar_backend.attention import guard, reference
from fastar_backend.attention.ann_sa import Selection
from fastar_backend.attention.cache import CacheShape, attention
from fastar_backend.attention.flat_cache import FlatCaches
from fastar_backend.attention.guard import Sample
from fastar_backend.attention.layers import PortableCaches
from fastar_backend.config import AttentionConfig, parse
from fastar_backend.errors import InvalidInput

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WATCHED = AttentionConfig(budget_frames=5, recent_frames=3, sparse_density=0.2, sparse_block=5, guard="observe")


@pytest.fixture(autouse=True)
def _fresh_random_numbers():
    with torch.random.fork_rng(devices=[]):
        print("seed", torch.seed())  # shown where a test fails
        yield


def measured_by_hand(query, keys, values, counts, allowed) -> tuple[float, float]:
    return reference.sparse_quality(query.double(), keys.double(), values.double(), counts.double(), allowed)


def counted(heads: int, keys: int, own: int) -> torch.Tensor:
    """Random counts, among them free slots; the last `own` count once."""
    counts = torch.randint(0, 5, (heads, keys)).float()
    counts[:, -own:] = 1
    return counts


@pytest.mark.parametrize(
    "sample", [Sample(torch.arange(5), torch.arange(15)), Sample(torch.tensor([1, 3]), torch.tensor([7, 0, 13]))]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_selection_of_keys(sample, weighted):
    heads, own, held, blocks, chosen = 5, 15, 23, 3, 4
    query, (keys, values) = 2 * torch.randn(heads, own, 10), torch.randn(2, heads, held + own, 10)
    counts = counted(heads, held + own, own) if weighted else torch.ones(heads, held + own)
    order = torch.rand(heads, own).argsort(-1)
    selection = Selection(order, torch.rand(heads, blocks, held).topk(chosen).indices, blocks)
    allowed = torch.zeros(heads, own, held + own, dtype=torch.bool)
    allowed[..., held:] = True
    for head, row in itertools.product(range(heads), range(own)):
        for key in selection.keys[head, row // (own // blocks)]:
            allowed[head, order[head, row], key] = True
    bias = counts.log() if weighted else None
    found = guard.by_keys(sample, query, keys, values, bias, selection)
    parts = (x[sample.heads] for x in (query[:, sample.queries], keys, values, counts, allowed[:, sample.queries]))
    expected = measured_by_hand(*parts)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert expected[0] < 0.99
    assert expected[1] > 0.01


@pytest.mark.parametrize(
    "sample", [Sample(torch.arange(5), torch.arange(21)), Sample(torch.tensor([4, 2]), torch.tensor([20, 4]))]
)
def test_a_selection_of_blocks_of_keys(sample):
    """Sums instead of mean values, blocks that end beyond the last key, query blocks that are not full."""
    heads, own, rows, tile = 5, 21, 75, (8, 16)
    query, keys, values = 2 * torch.randn(own, heads, 10), torch.randn(heads, rows, 10), torch.randn(heads, rows, 10)
    counts = counted(heads, rows, own)
    order = torch.rand(heads, own).argsort(-1)
    blocks = torch.rand(heads, 3, 5).argsort(-1)[..., :4].int()
    taken = torch.randint(1, 5, (heads, 3)).int()
    blocks[..., 0] = 4  # the chunk's own, without which a query might see nothing
    blocks[..., 1:] = torch.rand(heads, 3, 4).argsort(-1)[..., :3].int()
    allowed = torch.zeros(heads, own, rows, dtype=torch.bool)
    for head, row in itertools.product(range(heads), range(own)):
        block = row // tile[0]
        for visit in range(taken[head, block]):
            first = blocks[head, block, visit] * tile[1]
            allowed[head, order[head, row], first : first + tile[1]] = True
    found = guard.by_blocks(sample, query, keys, values * counts[..., None], counts, tile, (order, taken, blocks))
    parts = (query.transpose(0, 1)[:, sample.queries], keys, values, counts, allowed[:, sample.queries])
    expected = measured_by_hand(*(part[sample.heads] for part in parts))
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert expected[0] < 0.99


@pytest.mark.parametrize(("layers", "heads", "frame_tokens"), [(1, 1, 1), (7, 4, 9), (13, 7, 5), (6, 13, 2)])
def test_everything_has_its_turn_and_no_chunk_much(layers, heads, frame_tokens):
    shape = shape_of(heads=heads, frame_tokens=frame_tokens)
    queries = shape.chunk_tokens
    chunks = -(-layers // guard.LAYERS) * -(-heads // guard.HEADS) * -(-queries // guard.QUERIES)
    first = int(torch.randint(0, 1000, ()))
    seen = torch.zeros(layers, heads, queries, dtype=torch.bool)
    for chunk in range(first, first + chunks):
        plan = guard.plan(WATCHED, shape, layers, chunk * shape.chunk_frames)
        assert 1 <= sum(sample is not None for sample in plan) <= guard.LAYERS
        for layer, sample in enumerate(plan):
            if sample is not None:
                assert len(sample.heads) <= guard.HEADS
                assert len(sample.queries) <= guard.QUERIES
                for head in sample.heads:
                    seen[layer, head, sample.queries] = True
    assert seen.all()


def test_a_sample_is_not_a_stripe_of_the_picture():
    shape = shape_of(frame_tokens=96)
    rows = torch.cat([guard.plan(WATCHED, shape, 1, 2 * chunk)[0].queries for chunk in range(4)])
    assert len({int(row) % 12 for row in rows}) > 3


class Watch:
    """Drives PortableCaches over a random stream, with every query of every head in each sample, if asked."""

    def __init__(self, config: AttentionConfig, layers: int = 2, everything: bool = False) -> None:
        self.shape, self.layers, self.everything = shape_of(frame_tokens=15, chunk_frames=1), layers, everything
        self.caches = PortableCaches(self.shape, config, layers)

    def run(self, chunks: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of the last chunk's writing pass by its own attention and over all kept keys."""
        qkv = [x.split(self.shape.chunk_tokens, 1) for x in tokens(self.shape, chunks, seed, 0.3)]
        for chunk in range(chunks):
            self.caches.begin(chunk)
            outs, dense = [], []
            for cache in self.caches:
                query, key, value = (x[chunk] for x in qkv)
                if self.everything:
                    cache.sample = Sample(torch.arange(len(query)), torch.arange(query.shape[1]))
                cache.attend(query, key, value, 0.0)
                cache.attend(query + 0.1, key, value, 0.5)
                outs.append(cache.attend(query, key, value, 1.0))
                dense.append(attention(query, *cache.view(key, value), cache.bias))
                cache.append(query, key, value)
        return torch.stack(outs), torch.stack(dense)


def test_the_error_is_that_of_the_attention_itself():
    seed = int(torch.randint(0, 1 << 30, ()))
    watch = Watch(WATCHED, everything=True)
    sparse, dense = watch.run(seed=seed)
    recall, error = watch.caches.stats().guard
    assert watch.caches[0].merged > 0
    errors = (sparse - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)
    assert error == pytest.approx(errors.mean().item(), rel=1e-3)
    assert 0.2 < recall < 0.99
    more = Watch(WATCHED.model_copy(update={"sparse_density": 0.7}), everything=True)
    more.run(seed=seed)
    assert more.caches.stats().guard[0] > recall
    assert more.caches.stats().guard[1] < error


def test_a_sample_is_near_the_whole():
    seed = int(torch.randint(0, 1 << 30, ()))
    few, everything = Watch(WATCHED, layers=6), Watch(WATCHED, layers=6, everything=True)
    few.run(seed=seed)
    everything.run(seed=seed)
    assert few.caches.stats().guard == pytest.approx(everything.caches.stats().guard, abs=0.12)
    assert few.caches.stats().guard != everything.caches.stats().guard


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_watching_changes_nothing(density):
    seed, config = int(torch.randint(0, 1 << 30, ())), WATCHED.model_copy(update={"sparse_density": density})
    watched, other = Watch(config), Watch(config.model_copy(update={"guard": "off"}))
    assert all(a.equal(b) for a, b in zip(watched.run(seed=seed), other.run(seed=seed), strict=True))
    assert other.caches.stats().guard is None
    assert watched.caches.stats().guard is not None


def test_where_nothing_is_left_out_there_is_nothing_to_do(monkeypatch):
    monkeypatch.setattr(guard, "compare", None)  # would fail
    watch = Watch(WATCHED.model_copy(update={"sparse_density": 1.0}))
    watch.run(3)
    assert watch.caches.stats().guard == (1.0, 0.0)
    first = Watch(WATCHED)  # nothing is cached
    first.run(1)
    assert first.caches.stats().guard == (1.0, 0.0)
    Watch(WATCHED.model_copy(update={"guard": "off"})).run(3)


def test_a_layer_is_measured_once_a_chunk(monkeypatch):
    calls, compare = [], guard.compare
    monkeypatch.setattr(guard, "compare", lambda *parts: calls.append(1) or compare(*parts))
    Watch(WATCHED, layers=3).run(5)
    assert len(calls) == 3 * 4, "in the writing pass of the chunks after the first"


def test_forks_are_watched_each_by_itself():
    watch = Watch(WATCHED)
    watch.run(6)
    twin = watch.caches.fork()
    twin.configure(WATCHED.model_copy(update={"sparse_density": 1.0}))
    twin.begin(6)
    assert twin.stats().guard == (1.0, 0.0)
    assert watch.caches.stats().guard[0] < 1


class Flat:
    """Drives the GPU's caches, in Triton's interpreter where there is no GPU, over keys that recur a little changed."""

    def __init__(self, config: AttentionConfig, seed: int, frame_tokens: int) -> None:
        self.shape = CacheShape(2, 32, frame_tokens, 1, 2, (16, 8, 8), 100.0, DEVICE, torch.float32)
        self.caches = FlatCaches(self.shape, config, 1)
        self.generator = torch.Generator().manual_seed(seed)
        self.places = torch.randn(40, 2, 32, generator=self.generator)

    def draw(self) -> list[torch.Tensor]:
        """Query, key, value of one layer, [chunk tokens, heads, head_dim]."""
        size = self.shape.chunk_tokens
        where = torch.randint(0, 40, (size,), generator=self.generator)
        noise = torch.randn(3, size, 2, 32, generator=self.generator)
        key = self.places[where] + 1e-3 * noise[0]
        return [x.to(DEVICE) for x in (self.places[where.flip(0)] + 0.3 * noise[1], key, noise[2])]

    def run(self, chunks: int) -> list[torch.Tensor]:
        outs = []
        for chunk in range(chunks):
            self.caches.begin(chunk)
            outs += [layer.attend(*self.draw(), 1.0, True) for layer in self.caches]
            self.caches.commit()
        return outs


FLAT = AttentionConfig(budget_frames=5, recent_frames=3, merge_early=True, sparse_density=0.3, guard="observe")


def test_the_gpus_caches_measure_what_their_attention_gave():
    """Sparse outputs against those of a fork that attends to everything it keeps."""
    flat = Flat(FLAT, int(torch.randint(0, 1 << 30, ())), 71)
    flat.run(5)
    caches, dense = flat.caches, flat.caches.fork()
    assert caches.stats().guard[0] < 1
    assert (caches.count[:, : caches.slots] > 1).any(), "groups, whose values are sums"
    dense.configure(FLAT.model_copy(update={"sparse_density": 1.0}))
    caches.begin(5)
    dense.begin(5)
    caches[0].sample = Sample(*(torch.arange(size, device=DEVICE) for size in (2, flat.shape.chunk_tokens)))
    own = flat.draw()
    sparse, whole = (each[0].attend(*own, 1.0, True) for each in (caches, dense))
    recall, error = caches.stats().guard
    assert error == pytest.approx(float((sparse - whole).norm() / whole.norm()), rel=1e-3)
    assert 0.2 < recall < 1
    assert dense.stats().guard == (1.0, 0.0)


def test_the_gpus_caches_watched_and_not_are_the_same():
    seed = int(torch.randint(0, 1 << 30, ()))
    watched, other = Flat(FLAT, seed, 60), Flat(FLAT.model_copy(update={"guard": "off"}), seed, 60)
    assert all(a.equal(b) for a, b in zip(watched.run(4), other.run(4), strict=True))
    assert other.caches.stats().guard is None
    assert 0.2 < watched.caches.stats().guard[0] < 1


def test_the_gpus_caches_look_by_tensors_that_stay():
    """So that a recorded chunk looks at what the next one has to."""
    flat = Flat(FLAT, int(torch.randint(0, 1 << 30, ())), 71)
    flat.run(5)
    caches, seen = flat.caches, []
    caches.begin(5)
    own = flat.draw()
    held = None
    for chunk in range(5, 10):
        caches.prepare(chunk)
        planned, sample = guard.plan(FLAT, flat.shape, 1, chunk)[0], caches[0].sample
        held = held or sample
        assert sample is held
        assert sample.heads.equal(planned.heads)
        assert sample.queries.equal(planned.queries)
        caches.turn_history()
        caches[0].attend(*own, 1.0, True)
        seen.append(caches.stats().guard)
    assert len(set(seen)) > 3
    assert caches.fork()[0].looked_at is None, "a fork is recorded by itself"


@pytest.mark.parametrize(
    ("values", "field"),
    [({"guard": "watch"}, "guard"), ({"recall_floor": 1.1}, "recall_floor"), ({"recall_floor": -0.1}, "recall_floor"),
     ({"kind": "window", "guard": "observe"}, "attention: "), ({"kind": "dense", "guard": "hold"}, "attention: ")],
)  # fmt: skip
def test_settings_that_make_no_sense(values, field):
    with pytest.raises(InvalidInput, match=rf"{field}.*; allowed: "):
        parse(AttentionConfig, values, "attention")
