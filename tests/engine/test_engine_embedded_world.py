"""FAST-AR on the activations of the embedded, trained world: what is kept must be what matters."""

from __future__ import annotations

import pytest

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import Chunk, ChunkRequest, StreamOptions
from fastar_backend.model.world import World

# Chunks until a stream executes as little as SPARSE, of the default budget and of half of it.
HALF = AttentionConfig(budget_frames=6, recent_frames=4), 20
FULL = AttentionConfig(), 36
SPARSE = 0.2  # executed share of dense attention from which on recall counts
LEAST_RECALL = 0.9  # of dense attention's mass, mean over those chunks
ACTIONS = ("forward", "forward+turn_left", "turn_right", "forward")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(HALF, id="half"),
        pytest.param(FULL, id="full", marks=pytest.mark.slow),  # of three times the work
    ],
)
def measured(request, doom_world: World) -> dict[str, list]:
    """Stats per policy; one stream each, all in one batch, of the same seed and actions."""
    fastar, chunks = request.param
    policies = {
        "fastar": fastar,
        "window": AttentionConfig(kind="window", budget_frames=fastar.budget_frames),
        "tight window": AttentionConfig(kind="window", budget_frames=2),
    }
    engine = StreamEngine(doom_world, fastar)
    prompt = next(iter(doom_world.config.scenarios.values())).prompt
    for stream, attention in enumerate(policies.values()):
        engine.open(stream, prompt, StreamOptions(seed=7, measure_recall=True, attention=attention))
    stats: dict[str, list] = {name: [] for name in policies}
    for chunk in range(chunks):
        actions = (ACTIONS[chunk // 3 % len(ACTIONS)],)
        for name, result in zip(stats, engine.step([ChunkRequest(s, actions) for s in range(len(stats))]), strict=True):
            assert isinstance(result, Chunk), result
            stats[name].append(result.stats)
    return stats


def late_recall(stats: list) -> float:
    late = [s.recall for s in stats if s.density <= SPARSE]
    assert late, "the stream must outgrow its budget"
    return sum(late) / len(late)


def test_fastar_keeps_the_attention_mass(measured):
    assert late_recall(measured["fastar"]) >= LEAST_RECALL


def test_fastar_recall_beats_a_window_of_equal_budget(measured):
    """Compared at the end, where the history is longest. A window of the whole budget is a strong baseline."""
    assert late_recall(measured["fastar"]) > late_recall(measured["window"])


def test_a_tight_window_loses_much_more(measured):
    """The measure tells good from bad on real activations."""
    assert late_recall(measured["tight window"]) < late_recall(measured["window"])
    lost = {name: 1 - late_recall(stats) for name, stats in measured.items()}
    assert lost["tight window"] > 2 * lost["fastar"], lost


def test_fastar_executes_less_than_dense_and_merges(measured):
    last = measured["fastar"][-1]
    assert last.density <= SPARSE
    assert last.merged_tokens > 0
    assert max(stats.cache_tokens for stats in measured["fastar"]) <= measured["window"][-1].cache_tokens


def test_recall_starts_at_one_and_stays_a_share(measured):
    for stats in measured.values():
        assert all(0 < s.recall <= 1 + 1e-4 for s in stats)
    assert measured["window"][0].recall == pytest.approx(1, abs=1e-3)
