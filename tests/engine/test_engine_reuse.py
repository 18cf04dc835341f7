"""TeaCache and FlowCache in the engine: which passes are skipped, and that nobody notices but the stream that skips."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import random_world
import torch

from fastar_backend.config import AttentionConfig, BaselineConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.reuse import Passes, Reuse, embedded, modulated
from fastar_backend.engine.stream import ChunkRequest, StreamOptions
from fastar_backend.model.world import World, load_world

STEPS = (1000.0, 950.0, 900.0, 600.0, 300.0)
TOLERANCE = 2  # of 255, where batches are computed together: sums are ordered differently
ALWAYS, NEVER = 1e9, 0.0
ACTIONS = ("forward", "turn_left", "", "attack")


@pytest.fixture(scope="module")
def slow_world(tmp_path_factory) -> World:
    """Five denoising passes a chunk, and the one that writes."""
    config = copy.deepcopy(random_world.CONFIG)
    config["sampler"]["steps"] = list(STEPS)
    return load_world(str(random_world.write(tmp_path_factory.mktemp("slow") / "world", config)), "cpu")


def options(reuse: str, change: float = ALWAYS, warm_up: int = 1, kind: str = "dense", seed: int = 5) -> StreamOptions:
    baseline = BaselineConfig(flowcache_change=change, teacache_change=change, reuse_warm_up=warm_up, dense_layers=0)
    return StreamOptions(
        seed=seed, start="nothing", attention=AttentionConfig(kind=kind, reuse=reuse, baseline=baseline)
    )


class Counted:
    """An engine; `batches`: streams in each pass through the model since the last look."""

    def __init__(self, world: World, **settings) -> None:
        self.engine, self.batches = StreamEngine(world, AttentionConfig(), **settings), []
        forward = self.engine._forward

        def counted(streams, *args, **kwargs):
            self.batches.append(len(streams))
            return forward(streams, *args, **kwargs)

        self.engine._forward = counted

    def run(self, *streams: StreamOptions, chunks: int = 3) -> list[np.ndarray]:
        """Each stream's frames, all stepped together."""
        for number, one in enumerate(streams):
            self.engine.open(number, "a dark maze", one)
        frames = [[] for _ in streams]
        self.batches.clear()
        for index in range(chunks):
            actions = [ACTIONS[(index + one.seed) % len(ACTIONS)] for one in streams]
            self.last = self.engine.step([ChunkRequest(number, (action,)) for number, action in enumerate(actions)])
            for mine, chunk in zip(frames, self.last, strict=True):
                mine.append(chunk.frames)
        for number in range(len(streams)):
            self.engine.close(number)
        return [np.concatenate(mine) for mine in frames]


@pytest.mark.parametrize("reuse", ["teacache", "flowcache"])
@pytest.mark.parametrize("warm_up", [1, 3, 5, 9])
def test_a_skipped_pass_is_not_made(slow_world, reuse, warm_up):
    counted = Counted(slow_world)
    skipped = max(0, len(STEPS) - 1 - warm_up)  # the last pass and the one that writes are always made
    (frames,) = counted.run(options(reuse, warm_up=warm_up))
    assert len(counted.batches) == 3 * (len(STEPS) + 1 - skipped)
    made = (len(STEPS) + 1 - skipped) / (len(STEPS) + 1)
    assert counted.last[0].stats.density == pytest.approx(made)
    (exact,) = counted.run(options("off"))
    assert (frames == exact).all() == (skipped == 0)


@pytest.mark.parametrize("reuse", ["teacache", "flowcache"])
@pytest.mark.parametrize("kind", ["dense", "radial", "svg1", "svg2", "flowcache"])
def test_threshold_nought_is_off(slow_world, reuse, kind):
    counted = Counted(slow_world)
    (frames,) = counted.run(options(reuse, NEVER, kind=kind))
    assert len(counted.batches) == 3 * (len(STEPS) + 1)
    assert (frames == counted.run(options("off", kind=kind))[0]).all()


def test_a_skipped_pass_gives_the_last_outputs_latents(slow_world):
    """Clean latents are predicted, so a chunk whose middle passes are skipped is one of the first and last level."""
    engine = Counted(slow_world).engine
    engine.open(1, "a dark maze", options("flowcache"))
    stream = engine.streams[1]
    sigmas, actions = slow_world.config.sampler.sigmas, torch.zeros(1, 2, 3)
    noise = torch.randn(len(sigmas), 1, *engine.latent_shape)
    stream.begin_chunk()
    with torch.inference_mode():
        found = engine.sample([stream], actions, noise)
        first = engine._forward([stream], sigmas[0] * noise[0], sigmas[0], actions, progress=0, write=False)
        x = (1 - sigmas[-1]) * first + sigmas[-1] * noise[-1]
        last = engine._forward([stream], x, sigmas[-1], actions, progress=0.8, write=False)
    torch.testing.assert_close(found, last * last.square().mean(2, keepdim=True).rsqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_company_changes_nothing(slow_world, deterministic):
    """Streams that skip, that never do and that decide by their own content, in one batch and alone."""
    kinds = [
        options("teacache"),
        options("off", seed=6),
        options("flowcache", NEVER, seed=7),
        options("flowcache", 0.5, kind="flowcache", seed=8),
        options("teacache", 0.3, kind="svg1", seed=9),
    ]
    together = Counted(slow_world, deterministic=deterministic)
    frames = together.run(*kinds)
    if not deterministic:
        assert together.batches[0] == together.batches[-1] == 5
        assert set(together.batches) > {5}, "some passes are made for a part of the streams only"
    for index, one in enumerate(kinds):
        alone = Counted(slow_world, deterministic=deterministic)
        (expected,) = alone.run(one)
        gap = np.abs(frames[index].astype(int) - expected).max()
        assert gap <= (0 if deterministic else TOLERANCE)
        assert together.last[index].stats.density == alone.last[0].stats.density


def slow_decisions(features: list[torch.Tensor], limit: float, warm_up: int, steps: int) -> list[bool]:
    skipped, total = [], 0.0
    for index, feature in enumerate(features):
        if index < warm_up or index == steps - 1:
            skipped.append(False)
            total = 0.0
            continue
        before = features[index - 1].double()
        total += float((feature.double() - before).abs().sum() / before.abs().sum())
        skipped.append(total < limit)
        if not skipped[-1]:
            total = 0.0
    return skipped


@pytest.mark.parametrize("reuse", ["teacache", "flowcache"])
@pytest.mark.parametrize("warm_up", [1, 2, 5])
def test_changes_add_up_until_a_pass_is_made(reuse, warm_up):
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(1, 2, 7, 5, generator=generator)]
    for size in torch.rand(39, generator=generator).tolist():
        features.append(features[-1] + 0.1 * size * torch.randn(1, 2, 7, 5, generator=generator))
    config = options(reuse, 0.2, warm_up).attention
    passes = Passes(config, len(features))
    found = [passes.skips(feature) for feature in features]
    assert found == slow_decisions(features, 0.2, warm_up, len(features))
    assert 5 < sum(found) < 35


@pytest.mark.parametrize(("change", "skips"), [(NEVER, False), (1e-9, True)])
def test_an_input_that_does_not_change_at_all(change, skips):
    passes, same = Passes(options("flowcache", change).attention, 5), torch.ones(1, 2, 7, 5)
    assert [passes.skips(same) for _ in range(5)] == [False, skips, skips, skips, False]


def test_teacache_looks_at_the_first_blocks_input(slow_world, monkeypatch):
    engine = Counted(slow_world).engine
    engine.open(1, "a dark maze", options("off"))
    engine.streams[1].begin_chunk()
    attention, seen = slow_world.dit.blocks[0].self_attn, []
    made = attention.key_value
    monkeypatch.setattr(attention, "key_value", lambda x: (seen.append(x), made(x))[1])
    x, actions = torch.randn(1, *engine.latent_shape), torch.rand(1, 2, 3)
    with torch.inference_mode():
        engine._forward([engine.streams[1]], x, 0.7, actions, progress=0, write=False)
        feature = modulated(slow_world.dit, x, 0.7, actions)
        torch.testing.assert_close(feature, seen[0].view_as(feature))
        assert embedded(slow_world.dit, x).shape == feature.shape
        assert not torch.allclose(modulated(slow_world.dit, x, 0.2, actions), feature)


def test_nothing_is_carried_over_to_the_next_chunk(slow_world):
    """A chunk's first pass is computed however like the last chunk's it is."""
    engine = Counted(slow_world).engine
    engine.open(1, "a dark maze", options("flowcache"))
    calls = []

    def forward(streams, x, sigma, actions):
        calls.append(sigma)
        return x

    x, actions = torch.ones(1, *engine.latent_shape), torch.zeros(1, 2, 3)
    for _ in range(2):
        reuse = Reuse(slow_world.dit, [engine.streams[1]], 3)
        for sigma in (0.9, 0.8, 0.7):
            reuse.run(x, sigma, actions, forward)
    assert calls == [0.9, 0.7, 0.9, 0.7]
