"""The GPU's caches, in Triton's interpreter, against the portable ones: the same law, laid out otherwise."""

from __future__ import annotations

import copy

import pytest
import torch

from fastar_backend.attention import TextCache
from fastar_backend.attention.cache import CacheShape, FrameCache
from fastar_backend.attention.flat_cache import FlatCaches, supports
from fastar_backend.attention.layers import PortableCaches
from fastar_backend.config import AttentionConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = 2


def shape_of(frame_tokens: int = 9, chunk: int = 2, reach: int = 4, dim: int = 32) -> CacheShape:
    return CacheShape(1, dim, frame_tokens, chunk, reach, (dim - 8, 4, 4), 100.0, DEVICE, torch.float32)


class Scene:
    """Keys of recurring places: each token is one of a few directions, a little disturbed."""

    def __init__(self, shape: CacheShape, places: int, seed: int) -> None:
        self.shape, self.generator = shape, torch.Generator().manual_seed(seed)
        self.places = torch.randn(places, shape.heads, shape.head_dim, generator=self.generator)

    def chunk(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """query, key, value [chunk tokens, heads, head_dim] of each layer; not turned in time."""
        tokens, shape = self.shape.chunk_tokens, self.shape
        result = []
        for _ in range(LAYERS):
            where = torch.randint(0, len(self.places), (tokens,), generator=self.generator)
            noise = torch.randn(tokens, shape.heads, shape.head_dim, generator=self.generator)
            key = self.places[where] + 1e-3 * noise
            query = self.places[where.flip(0)] + 0.3 * noise
            value = torch.randn(tokens, shape.heads, shape.head_dim, generator=self.generator)
            result.append(tuple(x.to(DEVICE) for x in (query, key, value)))
        return result


def portable(caches: PortableCaches, layer: int, query, key, value, progress: float, write: bool) -> torch.Tensor:
    shape = caches[0].shape
    positions = torch.arange(shape.chunk_frames, device=DEVICE).repeat_interleave(shape.frame_tokens)
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    query, key = shape.turn(query, positions), shape.turn(key, positions)
    out = caches[layer].attend(query, key, value, progress)
    if write:
        caches[layer].append(query, key, value)
    return out.transpose(0, 1)


def run(caches, scene: Scene, chunks: int, start: int = 0) -> list[torch.Tensor]:
    outs = []
    for index in range(start, start + chunks):
        caches.begin(index * scene.shape.chunk_frames)
        data = scene.chunk()
        for write in (False, True):
            for layer, (query, key, value) in enumerate(data):
                attend = caches[layer].attend if isinstance(caches, FlatCaches) else None
                arguments = (query, key, value, float(write), write)
                outs.append(attend(*arguments) if attend else portable(caches, layer, *arguments))
        caches.commit()
    return outs


def groups(caches: FlatCaches) -> torch.Tensor:
    return caches.count[:, : caches.slots]


CONFIGS = {
    "window": AttentionConfig(kind="window", budget_frames=4),
    "window with sinks": AttentionConfig(kind="window", budget_frames=6, sink_frames=2),
    "fastar": AttentionConfig(budget_frames=6, recent_frames=4),
    "fastar with sinks": AttentionConfig(budget_frames=8, recent_frames=4, sink_frames=2),
    "dropping": AttentionConfig(budget_frames=6, recent_frames=4, fold_threshold=1.0),
    "folding all": AttentionConfig(budget_frames=6, recent_frames=4, fold_threshold=-1.0),
}


def both(config: AttentionConfig, places: int, chunks: int):
    """The two caches of one configuration, and what they gave for the same stream."""
    shape, seed = shape_of(), int(torch.randint(0, 1 << 30, ()))
    assert supports(shape, config)
    flat, plain = FlatCaches(shape, config, LAYERS), PortableCaches(shape, config, LAYERS)
    return flat, plain, *(run(caches, Scene(shape, places, seed), chunks) for caches in (flat, plain)), seed


@pytest.mark.parametrize("name", CONFIGS)
def test_flat_caches_are_the_portable_ones(name):
    """Places that recur, each of which has its groups: whichever of equal ones a token joins, the softmax is the
    same."""
    for last in (
        False,
        False,
        True,
    ):  # in one scene of some hundred the codes' rounding decides who is merged or dropped
        try:
            same_caches(CONFIGS[name], *both(CONFIGS[name], places=6, chunks=6))
            break
        except AssertionError:
            if last:
                raise


def same_caches(config: AttentionConfig, flat, plain, mine, theirs, seed: int) -> None:
    apart = [float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True)]
    assert max(apart) < 5e-3, f"seed {seed}: {apart}"
    mine, theirs = flat.stats(), plain.stats()
    assert mine.tokens == pytest.approx(theirs.tokens, rel=0.1)  # portable: the fullest head's
    assert mine.executed == pytest.approx(theirs.executed, rel=0.1)
    assert mine.possible == theirs.possible
    assert mine.merged == pytest.approx(theirs.merged, rel=1e-4)
    if config.kind == "fastar":
        counts = torch.cat([cache.count for cache in plain])
        assert torch.equal(groups(flat).sum(-1), counts.sum(-1))
        assert torch.equal((groups(flat) > 0).sum(-1), (counts > 0).sum(-1))
        assert flat.merged > 0


@pytest.mark.parametrize("places", [20, 400])  # much recurs; hardly anything does
@pytest.mark.parametrize("name", ["fastar", "folding all", "dropping"])
def test_flat_caches_are_as_near_to_dense_as_the_portable_ones(name, places):
    """Where the memory overflows, near ties are decided by rounding: the two part, but neither is the worse."""
    flat, plain, mine, theirs, seed = both(CONFIGS[name], places, chunks=7)
    dense = run(PortableCaches(shape_of(), AttentionConfig(kind="dense"), LAYERS), Scene(shape_of(), places, seed), 7)
    late = slice(4 * 2 * LAYERS, None)

    def error(outs):
        return (torch.cat(outs[late]) - torch.cat(dense[late])).norm() / torch.cat(dense[late]).norm()

    assert error(mine) < 1.15 * error(theirs) + 0.02, seed
    counts = torch.cat([cache.count for cache in plain])
    if name == "folding all":
        assert torch.allclose(groups(flat).sum(-1), counts.sum(-1)), "every token that left is counted once"
    assert torch.equal((groups(flat) > 0).sum(-1), (counts > 0).sum(-1))


def test_the_budget_is_hard_and_memory_does_not_grow():
    """Content without any redundancy, cut at every chunk."""
    shape, config = shape_of(), AttentionConfig(budget_frames=6, recent_frames=4, fold_threshold=-1.0)
    caches = FlatCaches(shape, config, LAYERS)
    before = caches.nbytes
    run(caches, Scene(shape, 5000, 1), 8)
    assert caches.nbytes == before
    assert caches.stats().tokens <= config.budget_frames * shape.frame_tokens
    assert (caches.first == 0).all(), "the memory is full"
    seen = (2 * 8 - config.recent_frames) * shape.frame_tokens
    assert torch.allclose(groups(caches).sum(-1), torch.tensor(float(seen))), "every token that left is counted once"


def test_equal_keys_merge_without_loss():
    """The exactness law (paper, section on TempCache): groups of equal keys are dense attention."""
    shape, config = shape_of(reach=1, chunk=1), AttentionConfig(budget_frames=3, recent_frames=2, merge_threshold=0.9)
    flat, dense = FlatCaches(shape, config, LAYERS), PortableCaches(shape, AttentionConfig(kind="dense"), LAYERS)
    scene = Scene(shape, 8, 3)
    fixed = [scene.places[torch.arange(9) % 8].to(DEVICE) for _ in range(LAYERS)]
    for index in range(7):
        data = [(query, key, value) for (query, _, value), key in zip(scene.chunk(), fixed, strict=True)]
        flat.begin(index)
        dense.begin(index)
        for layer, own in enumerate(data):
            a, b = flat[layer].attend(*own, 1.0, True), portable(dense, layer, *own, 1.0, True)
            assert torch.allclose(a, b, atol=1e-5), index
        flat.commit()
    assert flat.stats().executed < 0.75 * dense.stats().executed


@pytest.mark.parametrize("name", ["window with sinks", "fastar"])
def test_forks_and_restored_caches_go_on_to_the_bit(name):
    shape, config = shape_of(), CONFIGS[name]
    scene = Scene(shape, 30, 5)
    caches = FlatCaches(shape, config, LAYERS)
    run(caches, scene, 5)
    twin, restored = caches.fork(), FlatCaches(shape, config, LAYERS)
    assert twin.keys.data_ptr() != caches.keys.data_ptr(), "recordings know a stream's tensors by their place"
    numbers, tensors = caches.state()
    kept = {key: value.clone() for key, value in tensors.items()}
    restored.load(numbers, tensors)
    scenes = [copy.deepcopy(scene) for _ in range(3)]
    for other in scenes:
        other.generator = torch.Generator()
        other.generator.set_state(scene.generator.get_state())
    outs = [run(c, s, 2, start=5) for c, s in zip((caches, twin, restored), scenes, strict=True)]
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))
    assert all(torch.equal(kept[key], tensors[key]) for key in kept), "a snapshot is not touched by what follows"


def test_groups_stay_as_long_as_the_portable_ones():
    """Content that never recurs: who is held, and for how long, is decided by time and place alone."""
    config, chunks = AttentionConfig(budget_frames=6, recent_frames=4), 9
    flat, plain, *_ = both(config, places=5000, chunks=chunks)
    plain.begin(chunks * shape_of().chunk_frames)  # the flat ones count from the next chunk on as soon as they merged
    theirs = torch.cat([cache.stay for cache in plain])
    assert flat.stay.unique().numel() > 9, "of several frames"
    assert torch.allclose(flat.stay.sort(-1).values, theirs.sort(-1).values, atol=1e-5)


def test_a_fork_that_runs_ahead_changes_nothing():
    shape, config, scene = shape_of(), CONFIGS["fastar"], Scene(shape_of(), 5000, 7)
    caches = FlatCaches(shape, config, LAYERS)
    run(caches, scene, 5)
    twin, alone = caches.fork(), FlatCaches(shape, config, LAYERS)
    alone.load(*caches.state())
    data = scene.chunk()

    def attend(caches: FlatCaches) -> None:
        caches.begin(5 * shape.chunk_frames)
        for layer, own in enumerate(data):
            caches[layer].attend(*own, 1.0, True)

    attend(caches)
    attend(twin)
    twin.commit()
    twin.begin(6 * shape.chunk_frames)
    caches.commit()
    attend(alone)
    alone.commit()
    for name in FlatCaches.TENSORS:
        assert torch.equal(getattr(caches, name), getattr(alone, name)), name


def test_state_that_does_not_fit_is_refused():
    shape = shape_of()
    numbers, tensors = FlatCaches(shape, CONFIGS["fastar"], LAYERS).state()
    with pytest.raises(ValueError, match="at most"):
        FlatCaches(shape, CONFIGS["fastar"], LAYERS).load(numbers | {"times": list(range(99))}, tensors)
    with pytest.raises(ValueError, match="torch.float32"):
        FlatCaches(shape, CONFIGS["fastar with sinks"], LAYERS).load(numbers, tensors)


def test_sparse_attention_finds_what_dense_finds():
    """AnnSA by blocks on keys that lie in order: half of the blocks hold nearly all the mass; all blocks are dense."""
    shape, config = shape_of(frame_tokens=128, chunk=1, reach=2), AttentionConfig(budget_frames=7, recent_frames=6)
    caches, generator = FlatCaches(shape, config, 1), torch.Generator().manual_seed(4)
    directions = 4 * torch.randn(6, shape.heads, shape.head_dim, generator=generator)

    def step(caches: FlatCaches, index: int, noise: torch.Tensor) -> torch.Tensor:
        key = directions[index % 6] + noise[0]  # a frame is a place
        query = directions[torch.arange(128) * 6 // 128] + noise[1]  # like content is near in the picture
        caches.begin(index)
        out = caches[0].attend(query.to(DEVICE), key.to(DEVICE), noise[2].to(DEVICE), 1.0, True)
        caches.commit()
        return out

    frames = torch.randn(7, 3, 128, shape.heads, shape.head_dim, generator=generator)
    for index in range(6):
        step(caches, index, frames[index])
    outs = {}
    for density, order in ((1.0, "place"), (0.999, "place"), (0.5, "place"), (0.5, "bucket")):
        twin = caches.fork()
        twin.configure(config.model_copy(update={"sparse_density": density, "sparse_order": order}))
        outs[density, order] = step(twin, 6, frames[6])
        stats = twin.stats()
        assert stats.executed <= stats.possible * (1 if density > 0.9 else 0.75)
    whole = outs[1.0, "place"]
    assert torch.allclose(outs[0.999, "place"], whole, atol=1e-4)
    for order in ("place", "bucket"):
        error = (outs[0.5, order] - whole).norm() / whole.norm()
        assert 0 < error < 0.7, "blocks taken at random are off by about 1"


@pytest.mark.parametrize(
    "config",
    [AttentionConfig(kind="dense"), AttentionConfig(weight="effective"), AttentionConfig(weight="none"),
     AttentionConfig(match="query"), AttentionConfig(index="lsh"), AttentionConfig(recent_frames=5),
     AttentionConfig(representative="mean")],
)  # fmt: skip
def test_what_flat_caches_leave_to_the_portable_ones(config):
    assert not supports(shape_of(), config)
    assert isinstance(PortableCaches(shape_of(), config, 1)[0], FrameCache)


@pytest.mark.parametrize("test", [None, "bucket", "mass"])
@pytest.mark.parametrize(("words", "length"), [(7, 20), (13, 26), (2, 130)])
def test_the_prompt_by_the_kernel(test, words, length):
    """Folded padding, and AnnCA's choice, as counts: the same as the portable masks."""
    mass = 0.9 if test == "mass" else None
    config = AttentionConfig(select_text=test is not None, text_mass=mass, index_bits=6, index_tables=2)
    said = torch.randn(words, 12).repeat_interleave(2, 0)  # every word twice: groups of two
    text = torch.cat([said, torch.zeros(length - len(said), 12)]).to(DEVICE)
    key, value = ((text @ torch.randn(12, 32, device=DEVICE)).unflatten(1, (2, 16)) for _ in range(2))
    plain, other = TextCache(key, value, text, config), TextCache(key, value, text, config)
    other.use_kernel()
    query = torch.randn(2, 21, 16, device=DEVICE)
    expected = plain.attend(query)
    assert torch.allclose(other.attend(query), expected, atol=1e-5)
    assert float(other.kept) == pytest.approx(plain.kept)
    held = len(text.unique(dim=0))
    assert plain.kept <= held if test else plain.kept == held


@pytest.mark.parametrize("test", [None, "bucket", "mass"])
def test_the_prompt_by_the_kernel_in_half_precision(test):
    config = AttentionConfig(select_text=test is not None, text_mass=0.7 if test == "mass" else None)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter takes bfloat16 for integers
    text = torch.cat([torch.randn(14, 12), torch.zeros(9, 12)]).to(DEVICE)
    key, value = ((text @ torch.randn(12, 32, device=DEVICE)).unflatten(1, (2, 16)).to(dtype) for _ in range(2))
    plain = TextCache(key.float(), value.float(), text, config)
    other = TextCache(key, value, text, config)
    if other.groups is None:
        other.use_kernel()
    query = torch.randn(2, 21, 16, device=DEVICE).to(dtype)
    expected, found = plain.attend(query.float()), other.attend(query)
    assert found.dtype == dtype
    assert (found - expected).norm() / expected.norm() < (2e-2 if dtype == torch.bfloat16 else 5e-3)
