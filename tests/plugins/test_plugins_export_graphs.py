"""The graphs' modules against PyTorch's path: the same passes over `FlatCaches`, its kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch
from plugins_eager import EagerExecutor
from plugins_streams import ATTENTION, SPARSE, begin, by_kernels, make_world, merge, run_pass, text_of

from fastar_backend.attention.cache import by_place
from fastar_backend.attention.flat_cache import FlatCaches
from fastar_backend.attention.flat_select import select
from fastar_backend.config import AttentionConfig
from fastar_backend.errors import InvalidInput
from fastar_backend.kernels import ops as kernels
from plugins import step

CHUNKS, RING = 6, 3
CONFIGS = {
    "dense": ATTENTION,
    "near": SPARSE,
    "alike": SPARSE.model_copy(update={
        "sparse_order": "bucket", "merge_early": True, "sink_frames": 2, "budget_frames": 26, "fold_threshold": 1.0,
        "select_text": True, "text_mass": 0.7,
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world") / "graphs", layers=1)


@pytest.fixture(autouse=True)
def _ties(monkeypatch):
    """Of equally near slots, and codes make them equal, the kernel takes any: here both paths take the first."""

    def nearest(probe, code, first):
        return torch.ops.fastar.nearest(probe.view(torch.int32), code.contiguous().view(torch.int32), first)

    monkeypatch.setattr(kernels, "nearest", nearest)


def close(mine: FlatCaches, theirs: FlatCaches, what: str) -> None:
    for name in FlatCaches.TENSORS:
        a, b = getattr(mine, name).float(), getattr(theirs, name).float()
        assert torch.allclose(a, b, atol=1.01 if name == "code" else 2e-4), (what, name, (a - b).abs().max())


def copy_state(to: FlatCaches, source: FlatCaches) -> None:
    for name in (*FlatCaches.TENSORS, "lines", "leaving"):
        getattr(to, name).copy_(getattr(source, name))


@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_are_the_path_by_kernels(world, name):
    """Two streams, the second one chunk older: at other rows of its caches. From the same state, step by step: near
    ties may be decided otherwise, and would lead apart."""
    seed = torch.seed() % 1000
    attention, generator = CONFIGS[name], torch.Generator().manual_seed(seed)
    plan = step.plan(world.config, attention)
    executors = {graph: EagerExecutor(plan, world.dit, graph) for graph in (*plan.graphs, "write")}
    model, sparse = world.config.model, name != "dense"
    size = plan.shape.frame_tokens
    latents = plan.shape.chunk_frames, model.latent_channels, model.latent_height, model.latent_width
    texts = [text_of(world, prompt, attention) for prompt in ("a dark maze", "round")]
    caches = [FlatCaches(plan.shape, attention, model.layers) for _ in texts]
    late = ("denoise_sparse", "write_sparse") if sparse else ("denoise", "write")
    for index in range(-1, CHUNKS):
        some = slice(0, 2) if index >= 0 else slice(1, 2)  # the second stream has a chunk more
        mine, prompts = caches[some], texts[some]
        x = torch.randn(len(mine), *latents, generator=generator)
        actions = torch.randint(0, 2, (len(mine), latents[0], model.action_dim), generator=generator).float()
        checked = index == CHUNKS - 1
        theirs = [one.fork() for one in mine] if checked else []
        for one in mine:
            begin(executors, one, one.history_frames)
        for one, twin in zip(mine, theirs, strict=False):
            twin.begin(twin.history_frames)
            close(one, twin, f"begin {index}")
        for graph, level, progress in ((late[0], 0.7, 0.5), (late[1], 0.1, 1.0)):
            out = run_pass(executors, plan, graph, mine, prompts, x, level, actions)
            if checked:
                for layer in (layer for twin in theirs for layer in twin):
                    layer.selection = None  # a graph selects anew in every pass
                wanted = by_kernels(
                    world, plan, theirs, prompts, x, level, actions, progress, graph.startswith("write")
                )
                assert torch.allclose(out, wanted, atol=2e-4), (index, graph, (out - wanted).abs().max())
        for one, twin in zip(mine, theirs, strict=False):
            close(one, twin, f"passes {index}")
            copy_state(one, twin)
            twin.merge()
        for number, one in enumerate(mine):
            if index == RING - 1 and not checked:  # the first to be merged, into a free memory
                theirs.append(one.fork())
                theirs[-1].merge()
            merge(executors, one)
            one.took()
            if theirs:
                close(one, theirs[number], f"merge {index}")
    first, held = caches[0].first, caches[0].count[:, : plan.caches.slots]
    assert sparse or (first < size).all(), "the memory must have been filled"
    assert name == "near" or (held > 1).any(), "and tokens merged"


@pytest.mark.parametrize("order", ["place", "bucket"])
def test_the_blocks_chosen_are_the_paths(world, order, monkeypatch):
    """Of many, two streams in one batch; the same key blocks for the same blocks of queries."""
    attention = SPARSE.model_copy(update={"sparse_order": order})
    plan, rows, dim = step.plan(world.config, attention), 9 * 128, world.config.model.head_dim
    shape, heads = plan.shape, world.config.model.heads
    query, keys = torch.randn(shape.chunk_tokens, 2 * heads, dim), torch.randn(2 * heads, rows, dim)
    count = torch.randint(1, 4, (2 * heads, rows)).float()
    count[:, :300] = 0
    start = torch.tensor([500, 1000], dtype=torch.int32)
    taken = []
    monkeypatch.setattr(torch.ops.fastar, "attend_sparse", lambda *given: taken.extend(given[4:]))
    layer = step.make(plan, world.dit, "denoise_sparse").layers[0]
    layer.attend_sparse(query, keys, torch.zeros_like(keys), count, start)
    for stream, first in enumerate(start.tolist()):
        part, own = slice(stream * heads, (stream + 1) * heads), slice(first, first + shape.chunk_tokens)
        order, counts, blocks = select(query[:, part], keys[part], count[part], own, rows, attention, by_place(shape))
        mine = [tensor[part] for tensor in taken]
        assert torch.equal(mine[0], order)
        assert torch.equal(mine[1], counts)
        assert 1 < counts.min() <= counts.max() < 6, "neither all nor the chunk's own alone"
        for a, b, size in zip(mine[2].flatten(0, 1), blocks.flatten(0, 1), counts.flatten().tolist(), strict=True):
            assert set(a[:size].tolist()) == set(b[:size].tolist())


def test_pass_of_a_window(world):
    """No memory: no update."""
    attention = AttentionConfig(kind="window", budget_frames=4)
    plan = step.plan(world.config, attention)
    assert plan.graphs == ("denoise", "write", "begin", "prompt")
    executors = {graph: EagerExecutor(plan, world.dit, graph) for graph in plan.graphs}
    texts, model = [text_of(world, "a maze", ATTENTION)], world.config.model
    mine = FlatCaches(plan.shape, attention, model.layers)
    for index in range(4):
        x, actions = torch.randn(1, 2, model.latent_channels, 8, 10), torch.zeros(1, 2, model.action_dim)
        theirs = mine.fork()
        begin(executors, mine, 2 * index)
        out = run_pass(executors, plan, "write", [mine], texts, x, 0.1, actions)
        if index == 3:
            theirs.begin(2 * index)
            wanted = by_kernels(world, plan, [theirs], texts, x, 0.1, actions, 1.0, True)
            assert torch.allclose(out, wanted, atol=2e-4)
            close(mine, theirs, "window")
        mine.took()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("attention.kind", {"kind": "dense"}),
        ("attention.kind", {"kind": "flowcache"}),
        ("attention.guard", {"guard": "observe"}),
        ("attention.text_mass", {"select_text": True, "text_mass": None}),
        ("attention.index", {"index": "lsh"}),
        ("attention.match", {"match": "query"}),
        ("attention.weight", {"weight": "none"}),
        ("attention.representative", {"representative": "mean"}),
        ("attention.recent_frames", {"recent_frames": 3}),
        ("attention.sink_frames", {"sink_frames": 1}),
    ],
)
def test_what_the_graphs_do_not_know_is_named(world, field, changes):
    with pytest.raises(InvalidInput, match=field):
        step.plan(world.config, ATTENTION.model_copy(update=changes))


def test_heads_and_graphs_that_cannot_be_are_named(world):
    config = world.config.model_copy(update={"model": world.config.model.model_copy(update={"heads": 4})})
    with pytest.raises(InvalidInput, match="world.model.head_dim"):
        step.plan(config, ATTENTION)
    with pytest.raises(InvalidInput, match="attention.sparse_density"):
        step.make(step.plan(world.config, ATTENTION), world.dit, "write_sparse")
    with pytest.raises(InvalidInput, match="graph"):
        step.make(step.plan(world.config, AttentionConfig(kind="window", budget_frames=4)), world.dit, "update")
    with pytest.raises(InvalidInput, match="'dream'"):
        step.make(step.plan(world.config, ATTENTION), world.dit, "dream")
