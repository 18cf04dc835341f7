"""The simulated autoscaler against a log of the real one; the simulated fleet against what must hold for any."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from rendered import rendered

from k8s.simulate import __main__ as command
from k8s.simulate import capacity
from k8s.simulate.fleet import (
    CONTROLLED,
    FAULT,
    LEAST,
    MOVE_EVERY,
    PACKED,
    RANDOM,
    ROOM,
    SEEN,
    TICK,
    Demand,
    Fleet,
    Signal,
    simulate,
    slope,
)
from k8s.simulate.hpa import Behavior, Hpa, Policy, Rules
from k8s.simulate.manifest import ManifestError, Shipped, behavior_of, constant, limits, one
from k8s.simulate.plot import draw

LOG = json.loads(Path(__file__).with_name("hpa_log.json").read_text())
SHORT = Demand(streams=60.0, seconds=4 * 3600.0, crowd_at=2 * 3600.0)


@pytest.fixture(scope="module")
def shipped() -> Shipped:
    return Shipped.of(rendered("prod-h100"))


def replay(behavior: Behavior, first: float, period: float) -> list[tuple[float, int, int]]:
    """(seconds, replicas before, after) of every change in the log's time."""
    hpa, replicas, steps = Hpa(behavior, LOG["target"], LOG["smallest"], LOG["largest"]), LOG["smallest"], []
    for now in np.arange(first, LOG["seconds"], period):
        value = [value for since, value in LOG["metric"] if since <= now][-1]
        wanted = hpa.decide(float(now), value, replicas)
        if wanted != replicas:
            steps.append((float(now), replicas, wanted))
        replicas = wanted
    return steps


def test_the_real_controllers_steps_are_reproduced():
    """All 14, each between the two samples where the log has it."""
    steps = replay(behavior_of(LOG["behavior"]), *LOG["sync"])
    assert len(steps) == 14
    assert [step[1:] for step in steps] == [tuple(step[2:]) for step in LOG["steps"]]
    for (at, _, _), (before, after, _, _) in zip(steps, LOG["steps"], strict=True):
        assert before < at <= after


@pytest.mark.parametrize("first", [0.0, 0.25, 0.5, 0.75, 0.99])
def test_the_steps_do_not_hang_on_the_phase(first):
    assert [step[1:] for step in replay(behavior_of(LOG["behavior"]), first, 1.0)] == [
        tuple(step[2:]) for step in LOG["steps"]
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"down": {"window": 5.0}},
        {"down": {"policies": (Policy("Pods", 2, 8),)}},
        {"up": {"select": "Min"}},
        {"up": {"policies": (Policy("Pods", 2, 6),)}},
    ],
)
def test_another_policy_does_not_fit_the_log(change):
    """So the log tests the window, both kinds of policy and their choice; not the tolerance."""
    behavior = behavior_of(LOG["behavior"])
    for direction, values in change.items():
        rules = dataclasses.replace(getattr(behavior, direction), **values)
        behavior = dataclasses.replace(behavior, **{direction: rules})
    steps = replay(behavior, *LOG["sync"])
    fits = len(steps) == 14 and all(
        before < at <= after and [*step] == step_of
        for (at, *step), (before, after, *step_of) in zip(steps, LOG["steps"], strict=True)
    )
    assert not fits


@pytest.mark.parametrize(("metric", "wanted"), [(95.0, 10), (110.0, 10), (111.0, 12), (90.0, 10), (89.0, 9), (0.0, 1)])
def test_near_the_target_nothing_changes(metric, wanted):
    """Ten pods, target 10, tolerance .1."""
    free = Rules(0.0, (Policy("Pods", 99, 60),), tolerance=0.1)
    assert Hpa(Behavior(free, free), 10.0, 1, 99).decide(0.0, metric, 10) == wanted


def test_windows_hold_back_what_was_not_wanted_throughout():
    """Up 60 s, down 120 s; target 1, so the metric is the number of pods."""
    free = (Policy("Pods", 99, 1),)
    hpa, replicas, seen = Hpa(Behavior(Rules(60.0, free), Rules(120.0, free)), 1.0, 1, 99), 10, {}
    for now in range(0, 600, 10):
        metric = 50.0 if 100 <= now < 130 or 300 <= now < 500 else 5.0  # a blink, then for long
        replicas = seen[now] = hpa.decide(float(now), metric, replicas)
    assert {seen[now] for now in range(0, 240, 10)} == {10}, "neither the blink nor the low before it is followed"
    assert [seen[now] for now in (240, 340, 350, 590)] == [5, 5, 50, 50]


def test_a_direction_can_be_off():
    rules = Rules(0.0, (Policy("Pods", 4, 60),))
    off = dataclasses.replace(rules, select="Disabled")
    assert Hpa(Behavior(rules, off), 1, 1, 9).decide(0.0, 1.0, 5) == 5
    assert Hpa(Behavior(off, rules), 1, 1, 9).decide(0.0, 9.0, 5) == 5
    assert Hpa(Behavior(rules, rules), 1, 3, 9).decide(0.0, 0.0, 5) == 3


def test_the_policy_is_read_from_the_manifest(shipped):
    assert shipped.slots == limits(rendered("prod-h100")).max_streams
    assert shipped.target == pytest.approx(0.95 * shipped.slots)
    assert shipped.behavior.up.window == 0
    assert shipped.behavior.down.window == 900
    assert {p.type for p in shipped.behavior.down.policies} == {"Pods", "Percent"}
    assert constant("vector(60.5)") == 60.5
    with pytest.raises(ManifestError, match="no constant"):
        constant("sum(x)")
    assert Shipped.of(rendered("dev-cpu")).slots == 8
    with pytest.raises(ManifestError, match="no ScaledObject triton"):
        Shipped.of(rendered("staging+hpa-native"))


@pytest.mark.parametrize("placement", [PACKED, CONTROLLED, LEAST, RANDOM])
def test_a_fleet_keeps_count(placement):
    generator = np.random.default_rng(3)
    fleet, live, number = Fleet(slots=3, pods=5, placement=placement, seed=1), set(), 0
    for now in range(400):
        fleet.arrive(now)
        for _ in range(generator.integers(0, 4)):
            number += 1
            if fleet.place(number):
                live.add(number)
        for stream in list(live):
            if generator.random() < 0.1:
                fleet.end(stream)
                live.discard(stream)
        live -= set(fleet.scale(int(generator.integers(3, 9)), now, start_seconds=7))
        assert fleet.where.keys() == live
        assert sum(len(pod.streams) for pod in fleet.ready) == len(live)
        assert all(len(pod.streams) <= 3 for pod in fleet.ready)
        assert set(fleet.known) <= set(fleet.ready)
        assert [len(pods) for pods in fleet.by_load] == [
            sum(len(pod.streams) == load for pod in fleet.ready) for load in range(4)
        ]


def test_packed_streams_fill_pods_and_empty_ones_go_first():
    fleet = Fleet(slots=3, pods=4, placement=PACKED, seed=0)
    assert all(fleet.place(stream) for stream in range(4))
    assert sorted(len(pod.streams) for pod in fleet.ready) == [0, 0, 1, 3]
    assert fleet.scale(3, now=0.0, start_seconds=1) == []
    assert fleet.scale(1, now=0.0, start_seconds=1) == [3]
    assert not fleet.place(9)
    fleet.scale(2, now=0.0, start_seconds=10)
    fleet.arrive(9.0)
    assert not fleet.place(9)
    fleet.arrive(10.0)
    assert fleet.place(9)


def test_the_gateways_follow_the_controller_a_while_later():
    fleet = Fleet(slots=4, pods=6, placement=CONTROLLED, seed=0)
    fleet.arrive(0.0)
    assert sum(pod.open for pod in fleet.ready) == 4, "until twice as many slots are free as are kept, those stay open"
    assert len(fleet.known) == 6
    fleet.arrive(SEEN)
    assert set(fleet.known) == {pod for pod in fleet.ready if pod.open}
    deployment = one(rendered("prod-h100"), "Deployment", "stream-controller")["spec"]["template"]["spec"]
    assert deployment["containers"][0]["args"][-2:] == ["--room", str(ROOM)]


def test_full_pods_are_passed_over_a_while_later():
    """By gateways that do not know each other's streams; if all are full, they ask one of them."""
    fleet = Fleet(slots=1, pods=40, placement=LEAST, seed=0, gateways=2)
    fleet.arrive(0.0)
    assert sum(fleet.place(stream) for stream in range(0, 40, 2)) == 20, "its own it knows at once"
    assert not all(fleet.place(stream) for stream in range(1, 21, 2)), "those of the other one not yet"
    for now in (1.0, 1.0 + SEEN):
        fleet.arrive(now)
    full = {pod for pod in fleet.ready if pod.streams}
    assert set(fleet.known) == set(fleet.ready) - full
    assert fleet.place(101)
    for stream in range(200, 400):
        fleet.place(stream)
    for now in (20.0, 20.0 + SEEN):
        fleet.arrive(now)
    assert fleet.known == []
    assert not fleet.place(999)
    blind = Fleet(slots=1, pods=2, placement=RANDOM, seed=0)
    assert blind.place(1)
    for now in (0.0, SEEN):
        blind.arrive(now)
    assert set(blind.known) == set(blind.ready)


def test_slow_pods_close_and_send_streams_on():
    fleet = Fleet(slots=4, pods=6, placement=CONTROLLED, seed=0, slow=1.0)
    for pod in fleet.ready[1:]:
        pod.slow_from = math.inf
    slow = fleet.ready[0]
    for stream in range(3):
        fleet._load(slow, slow.streams | {stream})
        fleet.where[stream] = slow
    assert fleet.arrive(slow.slow_from - 1) == []
    assert 0 < slow.slow_from < FAULT
    now = max(slow.slow_from, MOVE_EVERY)
    assert fleet.arrive(now) == [2], "the newest"
    assert not slow.open
    assert fleet.arrive(now + MOVE_EVERY - 1) == []
    assert fleet.arrive(now + MOVE_EVERY) == [1]
    assert fleet.arrive(now + 2 * MOVE_EVERY) == [], "its only stream stays"
    assert fleet.where == {0: slow}
    assert slow not in fleet.known


def test_slow_pods_make_few_wait(shipped):
    """One in twenty: their streams are moved, the autoscaler's numbers stand."""
    well, ill = (simulate(shipped, SHORT, CONTROLLED, seed=1, slow=slow) for slow in (0.0, 0.05))
    assert ill.moved.sum() > well.moved.sum()
    assert (ill.waits > TICK).mean() < (well.waits > TICK).mean() + 0.05
    assert ill.pod_hours < 1.05 * well.pod_hours


def test_the_signal_is_the_rules():
    """Steady: D + max(N, 2 sqrt(lambda T)); growing: and the trend."""
    signal = Signal(slots=2, start_seconds=240, buffer=True)
    for _ in range(100):
        signal.see(opened=1, active=50, waiting=3)
    assert signal.value == pytest.approx(53 + 2 * math.sqrt(240 / TICK))
    for tick in range(100):
        signal.see(opened=0, active=50 + tick, waiting=0)
    seen = 50 + 99 - (len(signal.values) - 1)
    assert signal.value == pytest.approx(seen + 240 / TICK)
    assert slope([3.0]) == 0.0
    quiet = Signal(slots=8, start_seconds=240, buffer=True)
    quiet.see(0, 0, 0)
    assert quiet.value == 8


def test_a_day_under_what_ships(shipped):
    placements = (PACKED, CONTROLLED, LEAST, RANDOM)
    packed, kept, loose, blind = (simulate(shipped, SHORT, placement, seed=1) for placement in placements)
    for run in (packed, kept, loose, blind):
        assert run.asked.min() >= shipped.smallest
        assert run.asked.max() <= shipped.largest
        assert (run.active <= run.ready * run.slots).all()
        crowd = run.asked[(run.at >= SHORT.crowd_at) & (run.at < SHORT.crowd_at + SHORT.crowd_seconds)]
        assert crowd.max() > 1.5 * run.asked[run.at < SHORT.crowd_at].max()
    assert len(packed.waits) == pytest.approx(len(loose.waits), rel=0.01), "the same viewers"
    assert (loose.waits > TICK).mean() < 0.5 * (blind.waits > TICK).mean(), "why pods say that they are full"
    assert (loose.waits > TICK).mean() < 0.1
    assert (kept.waits > TICK).mean() < 0.1
    assert kept.moved.sum() <= 0.1 * max(loose.moved.sum(), 10), "why there is a controller"
    assert packed.moved.sum() <= 0.1 * max(loose.moved.sum(), 10)
    assert (packed.waits > TICK).mean() < 0.1
    assert packed.waits.max() < 2 * shipped.start_seconds
    again = simulate(shipped, SHORT, PACKED, seed=1)
    assert np.array_equal(again.asked, packed.asked)


def test_without_the_buffer_more_viewers_wait(shipped):
    with_, without = (simulate(shipped, SHORT, PACKED, seed=2, buffer=buffer) for buffer in (True, False))
    assert (without.waits > TICK).mean() > (with_.waits > TICK).mean()
    assert without.pod_hours < with_.pod_hours


def test_the_picture_is_drawn(shipped, tmp_path):
    demand = dataclasses.replace(SHORT, streams=10.0)
    runs = {placement.name: simulate(shipped, demand, placement) for placement in (LEAST, PACKED)}
    draw(runs, demand, "a title", tmp_path / "new" / "day.png")
    assert (tmp_path / "new" / "day.png").stat().st_size > 20_000


def test_the_command(monkeypatch, tmp_path, capsys):
    picture = tmp_path / "day.png"
    options = {"overlay": "dev-cpu", "hours": "1", "streams": "5", "largest": "9", "out": str(picture)}
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["simulate", *arguments, "--compare"])
    command.main()
    said = capsys.readouterr().out
    assert picture.exists()
    assert said.count("| **as shipped** |") == 4
    assert "without the buffer B | gateway" in said


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--overlay", "prod", "overlays/prod"),
        ("--streams", "-1", "invalid positive value: '-1'"),
        ("--life", "nan", "'nan'"),
        ("--slow", "1.5", "invalid share value: '1.5'"),
    ],
)
def test_the_command_says_what_is_wrong(monkeypatch, capsys, option, value, said):
    monkeypatch.setattr(sys, "argv", ["simulate", option, value])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert said in capsys.readouterr().err


def test_capacity_comes_from_what_was_measured(shipped):
    assert [capacity.streams_per_gpu(fps) for fps in (10, 16, 20.6, 24, 41.2, 50)] == [4, 2, 2, 1, 1, 0]
    assert shipped.slots == capacity.streams_per_gpu(16)
    plan = capacity.Plan.of(shipped, streams=2000, life=600, fps=16, snapshot_chunks=120)
    buffer = 2 * math.sqrt(2000 / 600 * shipped.start_seconds)
    assert plan.pods == math.ceil((2000 + buffer) / shipped.target)
    assert plan.snapshot_rate == pytest.approx(2000 * 3.5e9 / 90)
    assert capacity.Plan.of(shipped, 20, 600, 16, 0).snapshot_rate == 0
    assert capacity.table(shipped, 600, 16, 120).count("\n") == 6


def test_the_readme_has_todays_numbers(shipped):
    readme = (Path(capacity.__file__).parents[1] / "README.md").read_text()
    assert capacity.table(shipped, Demand.life, 16.0, limits(rendered("prod-h100")).snapshot_chunks) in readme
