"""The guard while streams run: the controller on simulated attention, then in the engine, on the embedded world."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch

from fastar_backend.attention import ann_sa, guard
from fastar_backend.config import AttentionConfig
from fastar_backend.engine.density import DENSITY_MIN, PATIENCE, RISE, SURE, Density
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.snapshot import Snapshot
from fastar_backend.engine.stream import ChunkRequest, ChunkStats, StreamOptions
from fastar_backend.errors import SnapshotError

HOLD = AttentionConfig(budget_frames=6, recent_frames=3, sparse_density=0.5, sparse_block=12, guard="hold")


@dataclasses.dataclass
class Plant:
    """Attention as the guard sees it: the mass lost falls with density as it does on real keys, and every chunk looks
    at other heads (`noise`) and other layers (`turns`), as shares of the mass lost."""

    scale: float = 0.03
    power: float = 0.6
    noise: float = 0.15
    turns: float = 0.1

    def true(self, density: float) -> float:
        return 1 - min(1.0, self.scale * (density**-self.power - 1))

    def run(self, state: Density, floor: float, chunks: int,
            change: Callable[[int], None] = lambda chunk: None) -> list[Density]:  # fmt: skip
        """The states before each chunk and after the last."""
        seed = random.randrange(1 << 30)
        print("seed", seed)  # shown where a test fails
        generator, states = random.Random(seed), [state]
        for chunk in range(chunks):
            change(chunk)
            wrong = self.noise * generator.gauss(0, 1) + self.turns * (-1) ** chunk
            recall = 1 - (1 - self.true(states[-1].value)) * (1 + wrong)
            states.append(states[-1].after(min(1.0, max(0.0, recall)), floor))
        return states


def reversals(values: list[float]) -> int:
    steps = [after - before for before, after in zip(values, values[1:], strict=False) if after != before]
    return sum(a * b < 0 for a, b in zip(steps, steps[1:], strict=False))


@pytest.mark.parametrize("start", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("floor", [0.9, 0.95, 0.98])
@pytest.mark.parametrize("plant", [Plant(), Plant(0.1, 0.3), Plant(0.005, 1.3)])
def test_recall_comes_to_rest_a_little_above_the_floor(plant, floor, start):
    states = plant.run(Density(start), floor, 300)
    values = [state.value for state in states[150:]]
    recalls = [plant.true(value) for value in values]
    mean = sum(recalls) / len(recalls)
    assert floor - 0.05 * (1 - floor) <= mean <= floor + 0.75 * (1 - floor)
    assert max(values) <= 1.6 * min(values)
    assert reversals(values) <= 6


def test_without_noise_nothing_moves_any_more():
    states = Plant(noise=0, turns=0).run(Density(0.05), 0.95, 200)
    assert len({state.value for state in states[20:]}) == 1
    assert Plant().true(states[-1].value) >= 0.95


@pytest.mark.parametrize(("floor", "most"), [(0.8, 0), (0.9, 2), (0.95, 2), (0.97, 4), (0.98, 8)])
def test_it_rises_quickly_and_falls_slowly(floor, most):
    plant = Plant(noise=0, turns=0)
    up = [state.value for state in plant.run(Density(0.05), floor, 100)]
    assert plant.true(up[most]) >= floor
    assert all(after <= RISE * before for before, after in zip(up, up[1:], strict=False))
    down = [state.value for state in plant.run(Density(1.0), floor, 400)]
    assert down[PATIENCE - 1] == 1.0
    assert down[PATIENCE] < 1.0
    assert all(after >= 0.79 * before for before, after in zip(down, down[1:], strict=False))
    assert all(plant.true(value) >= floor for value in down), "it stops in time"
    assert plant.true(down[-1]) <= floor + 0.31 * (1 - floor)


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_a_low_floor_needs_no_more_than_the_least(floor):
    states = Plant().run(Density(0.4), floor, 150)
    assert states[-1].value == DENSITY_MIN
    assert all(DENSITY_MIN <= state.value <= 1 for state in states)


def test_a_start_below_the_least_may_stay_there_or_rise():
    assert {state.value for state in Plant(scale=0).run(Density(0.01), 0.5, 3 * PATIENCE)} == {0.01}
    assert Plant().run(Density(0.01), 0.95, 60)[-1].value > DENSITY_MIN


@pytest.mark.parametrize("floor", [0.9999, 1.0])
def test_a_floor_that_only_dense_attention_reaches(floor):
    values = [state.value for state in Plant().run(Density(0.1), floor, 600)]
    assert 1.0 in values[:8]
    later = values[200:]
    assert sum(value < 1 for value in later) <= 0.06 * len(later), "tried again, but not again and again"
    assert min(later) > 0.9, "and not far below"


def test_a_floor_that_no_density_reaches():
    """Below 1 everything is lost: so dense it is."""
    values = [state.value for state in Plant(scale=100).run(Density(0.1), 0.9, 600)]
    assert sum(value < 1 for value in values[100:]) <= 0.06 * 500


def test_one_chunk_a_little_too_low_is_no_reason_but_a_few_are():
    state = Density(0.2)
    for _ in range(SURE - 1):
        state = state.after(0.89, 0.9)
        assert state.value == 0.2
    assert state.after(0.89, 0.9).value > 0.2
    assert Density(0.2).after(0.7, 0.9).value > 0.2


def test_waiting_ends_when_the_scene_becomes_easy():
    plant = Plant(scale=100)
    hard = plant.run(Density(0.1), 0.9, 400)[-1]
    assert hard.patience > 4 * PATIENCE
    plant.scale = 0.03
    values = [state.value for state in plant.run(hard, 0.9, 400)]
    assert values[-1] < 0.2
    assert sum(value > 0.5 for value in values) < 250


def test_the_scene_changes():
    """To one that needs more, and back."""
    plant = Plant()

    def change(chunk: int) -> None:
        plant.scale = 0.1 if 200 <= chunk < 400 else 0.03

    states = plant.run(Density(0.2), 0.95, 900, change)
    before, during, after = (states[end].value for end in (199, 399, 899))
    assert Plant(0.1).true(before) < 0.9
    assert during > 1.5 * before
    assert 0.6 * before < after < 1.6 * before
    assert Plant(0.1).true(states[212].value) >= 0.94, "a dozen chunks"
    assert Plant(0.1).true(during) >= 0.945


def test_what_a_snapshot_may_say():
    state = Plant().run(Density(0.2), 0.95, 9)[-1]
    assert Density.load(dataclasses.asdict(state)) == state
    for wrong in ({"value": 0.0}, {"value": 1.1}, {"recall": 2.0}, {"seen": -1}, {"patience": 0}):
        with pytest.raises(ValueError, match="density is"):
            Density.load(dataclasses.asdict(state) | wrong)
    with pytest.raises(TypeError):
        Density.load({"value": "x"})


# In the engine


@pytest.fixture
def engine(world) -> StreamEngine:
    return StreamEngine(world, HOLD, max_streams=8, deterministic=True)


def stats_of(engine: StreamEngine, stream: int, chunks: int) -> list[ChunkStats]:
    return [engine.step([ChunkRequest(stream, ("forward",))])[0].stats for _ in range(chunks)]


def test_what_is_off_says_nothing(engine):
    engine.open(1, "a dark maze", StreamOptions(attention=HOLD.model_copy(update={"guard": "off"})))
    engine.open(2, "a dark maze", StreamOptions(attention=AttentionConfig(kind="window", budget_frames=4)))
    for stream in (1, 2):
        for stats in stats_of(engine, stream, 3):
            assert (stats.guard_recall, stats.guard_error, stats.sparse_density) == (None, None, None)


def test_observing_moves_nothing(engine):
    engine.open(1, "a dark maze", StreamOptions(attention=HOLD.model_copy(update={"guard": "observe"})))
    found = stats_of(engine, 1, 12)
    assert {stats.sparse_density for stats in found} == {0.5}
    assert all(0 < stats.guard_recall < 1 for stats in found)
    assert all(stats.guard_error > 0 for stats in found)


def test_holding_moves_the_density_of_the_next_chunk(engine):
    low = HOLD.model_copy(update={"sparse_density": 0.2, "recall_floor": 0.999})
    engine.open(1, "a dark maze", StreamOptions(attention=low))
    found = stats_of(engine, 1, 8)
    assert found[0].sparse_density == 0.2
    assert found[1].sparse_density > 0.2
    assert found[-1].sparse_density == 1.0
    assert (found[-1].guard_recall, found[-1].guard_error) == (1.0, 0.0)
    assert found[-1].density > found[0].density * 0.5


def test_a_clients_density_is_where_holding_goes_on_from(engine):
    engine.open(1, "a dark maze", StreamOptions(attention=HOLD.model_copy(update={"recall_floor": 0.0})))
    stats_of(engine, 1, 3)
    engine.control(1, "density", 0.3)
    found = stats_of(engine, 1, PATIENCE + 1)
    assert {stats.sparse_density for stats in found[:-1]} == {0.3}
    assert found[-1].sparse_density < 0.3


def test_snapshots_and_forks_hold_on(engine):
    engine.open(1, "a dark maze", StreamOptions(seed=3, attention=HOLD.model_copy(update={"recall_floor": 0.3})))
    stats_of(engine, 1, PATIENCE - 2)
    snapshot = Snapshot.from_bytes(engine.snapshot(1).to_bytes())
    engine.restore(2, snapshot)
    engine.fork(1, 3)
    found = [
        [(s.sparse_density, s.guard_recall, s.guard_error) for s in stats_of(engine, stream, 6)] for stream in (1, 2, 3)
    ]
    assert found[0] == found[1] == found[2]
    assert len({density for density, *_ in found[0]}) == 2, "the waiting began before"
    broken = dict(snapshot.header["stream"], density={"value": 7.0})
    with pytest.raises(SnapshotError, match="does not fit"):
        engine.restore(4, dataclasses.replace(snapshot, header=snapshot.header | {"stream": broken}))


# On the embedded world

FLOOR = 0.9
CHUNKS = 12


@pytest.fixture(scope="module")
def held(doom_world):
    """Two streams: stats of each, and the arguments of the last writing pass's sparse attention, layer by
    layer."""
    calls: list[list] = []
    attend = ann_sa.attend

    def recorded(*parts):
        calls.append([part.clone() if isinstance(part, torch.Tensor) else part for part in parts])
        return attend(*parts)

    small = AttentionConfig(budget_frames=9, guard="hold", recall_floor=FLOOR, sparse_density=0.1)
    engine = StreamEngine(doom_world, small, deterministic=True)
    prompt = next(iter(doom_world.config.scenarios.values())).prompt
    engine.open(1, prompt, StreamOptions(seed=7))
    low = small.model_copy(update={"recall_floor": 0.3, "sparse_density": 0.06})
    engine.open(2, prompt, StreamOptions(seed=7, attention=low))
    stats: dict[int, list[ChunkStats]] = {1: [], 2: []}
    with pytest.MonkeyPatch.context() as patch:
        for chunk in range(CHUNKS):
            if chunk == CHUNKS - 1:
                patch.setattr(ann_sa, "attend", recorded)
            for stream in (2, 1):
                calls.clear()
                if stream == 1 or chunk <= PATIENCE:
                    stats[stream] += stats_of(engine, stream, 1)
    return stats, calls[-doom_world.config.model.layers :]


def test_the_floor_is_reached_and_held(held):
    (stats, _), recall = held, [s.guard_recall for s in held[0][1]]
    densities = [s.sparse_density for s in stats[1]]
    assert densities[0] == 0.1
    assert recall[0] < FLOOR
    assert max(densities) > 0.1
    assert sum(recall[-8:]) / 8 >= FLOOR
    assert densities[-1] < 0.5, "and not by dense attention"


def test_a_low_floor_lets_the_density_fall(held):
    assert held[0][2][-1].sparse_density == DENSITY_MIN


def test_a_sample_is_the_whole_within_its_error(held):
    """Every query of every head of every layer of the last chunk, in float64."""
    stats, calls = held
    recalls, errors = [], []
    for query, keys, values, bias, selection in calls:
        query, keys, values = query.double(), keys.double(), values.double()
        own, per_block = query.shape[1], query.shape[1] // selection.blocks
        logits = query @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
        mass = (logits if bias is None else logits + bias[:, None].double()).softmax(-1)
        kept = torch.zeros_like(mass)
        for head in range(len(query)):
            for block in range(selection.blocks):
                rows = selection.order[head, block * per_block : (block + 1) * per_block, None]
                seen = torch.cat([selection.keys[head, block], torch.arange(keys.shape[1] - own, keys.shape[1])])
                kept[head, rows, seen] = mass[head, rows, seen]
        recalls.append(kept.sum(-1))
        dense, sparse = mass @ values, kept @ values / kept.sum(-1, keepdim=True)
        errors.append((sparse - dense).norm() / dense.norm())
    recall = torch.stack(recalls)  # [layers, heads, queries]
    of_layer = recall.mean((1, 2))
    layers = len(recall) // 2  # that are sampled in a chunk, at least
    within = recall.var(2).mean() / (layers * recall.shape[1] * guard.QUERIES)
    uncertain = float((of_layer.var() / layers + within).sqrt())
    last = stats[1][-1]
    assert 3 * uncertain < 0.09
    assert last.guard_recall == pytest.approx(float(recall.mean()), abs=3 * uncertain)
    assert last.guard_error == pytest.approx(float(torch.stack(errors).mean()), rel=0.6)
