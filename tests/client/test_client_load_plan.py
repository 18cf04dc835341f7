"""The load test's plan: what is drawn before anything runs, and the scenarios it is drawn from."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics

import pytest
from fastar_client.errors import InvalidArgument
from fastar_client.load.plan import plan, share
from fastar_client.load.scenario import PRESETS, PROMPTS, Phase, Scenario, preset, read_scenario
from fastar_client.protocol import World, parse_world

SEEDS = [random.SystemRandom().randrange(2**40) for _ in range(40)]
NAMED = {"actions": ("forward", "turn_left", ""), "prompts": ("a hall", "a maze")}


def scenario(*phases: Phase, sessions: tuple[float, float] = (3.0, 9.0), **changed) -> Scenario:
    return Scenario(phases or (Phase(60, 30),), sessions, **(NAMED | changed))


def test_arrivals_are_poisson():
    """In windows of two seconds: the mean is the rate's, the variance is the mean, and neighbours know nothing of each
    other. All within five standard errors."""
    windows = []
    for seed in SEEDS:
        counts = [0] * 50
        for stream in plan(scenario(Phase(100, 90)), seed):
            counts[int(stream.at / 2)] += 1
        windows += counts
    count = len(windows)
    assert abs(statistics.fmean(windows) - 3) < 5 * (3 / count) ** 0.5
    assert abs(statistics.variance(windows) / 3 - 1) < 5 * (2.4 / count) ** 0.5
    assert abs(statistics.correlation(windows[::2], windows[1::2])) < 5 / (count / 2) ** 0.5


def test_the_same_seed_makes_the_same_plan():
    tried = scenario(Phase(30, 60), disconnect_share=0.3, slow_share=0.2)
    assert plan(tried, 7) == plan(tried, 7)
    assert plan(tried, 7) != plan(tried, 8)


def test_a_choice_changes_nothing_but_itself():
    first = plan(scenario(), 3)
    for changed in ({"prompts": ("x",)}, {"actions": ("x",)}, {"action_seconds": None}, {"slow_share": 1.0}):
        other = plan(scenario(**changed), 3)
        assert [(s.at, s.seconds, s.seed) for s in other] == [(s.at, s.seconds, s.seed) for s in first]
        assert other != first


def test_waves():
    phases = (Phase(7, burst=5), Phase(5, 120), Phase(3), Phase(11, 60, burst=3, burst_seconds=1.5))
    for seed in SEEDS[:10]:
        times = [stream.at for stream in plan(scenario(*phases), seed)]
        assert times == sorted(times)
        assert times[:5] == [0] * 5
        assert all(7 <= at < 12 or at >= 15 for at in times[5:])
        assert {15.0, 15.75, 16.5} <= set(times)
        assert times[-1] < 26


def test_roles_keep_their_shares_exactly():
    for seed in SEEDS[:10]:
        streams = plan(scenario(Phase(10, burst=41), disconnect_share=0.1, slow_share=0.05, slow_factor=3.0), seed)
        assert [s.number for s in streams] == list(range(41))
        assert sum(s.disconnects for s in streams) == 4
        assert [s.slow_factor for s in streams if s.slow_factor is not None] == [3.0, 3.0]
        assert not any(s.disconnects and s.slow_factor for s in streams)
    assert all(s.disconnects for s in plan(scenario(Phase(10, burst=5), disconnect_share=1.0), 0))


def test_sessions_and_controls_lie_within_their_bounds():
    tried = scenario(Phase(60, 60), disconnect_share=0.5, action_seconds=(0.5, 1.0), prompt_seconds=(1.0, 3.0))
    for stream in plan(tried, SEEDS[0]):
        assert (1.5 if stream.disconnects else 3) <= stream.seconds <= 9
        assert stream.leaves == stream.at + stream.seconds
        assert [c.at for c in stream.controls] == sorted(c.at for c in stream.controls)
        for kind, low, high, values in (("action", 0.5, 1, NAMED["actions"]), ("prompt", 1, 3, NAMED["prompts"])):
            times = [0.0] + [c.at for c in stream.controls if c.kind == kind]
            assert all(low <= b - a <= high for a, b in zip(times, times[1:], strict=False))
            assert stream.seconds - high <= times[-1] < stream.seconds
            assert {c.value for c in stream.controls if c.kind == kind} <= set(values)


def test_processes_share_all_streams():
    streams = plan(scenario(), 1)
    for processes in (1, 2, 3, 7):
        parts = share(streams, processes)
        assert sorted((s for part in parts for s in part), key=lambda s: s.number) == streams
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_world_fills_in_what_a_scenario_leaves_open():
    prompts = {"cave": "a wet cave", "hall": "a round hall"}
    world = World("w", 8, 8, 4, 2, ("left", "right"), (), prompts, 20.0)
    filled = preset("steady").in_world(world)
    assert filled.actions == ("left", "right", "")
    assert filled.prompts == ("a wet cave", "a round hall")
    assert scenario().in_world(world) == scenario()
    assert preset("steady").in_world(dataclasses.replace(world, scenarios={})).prompts == PROMPTS


def test_an_older_server_names_its_scenarios_only():
    values = {field.name: 1 for field in dataclasses.fields(World)} | {"scenarios": ["cave", "hall"]}
    assert parse_world({"world": values}).scenarios == {"cave": "cave", "hall": "hall"}
    assert parse_world({}) is None


def at_once(streams, moment: float) -> int:
    return sum(s.at <= moment < s.leaves for s in streams)


def test_presets_have_as_many_streams_as_they_say():
    world = World("w", 8, 8, 4, 2, ("left",), (), {"cave": "a wet cave"}, 20.0)
    for name in PRESETS:
        plans = [plan(preset(name, 12, 80).in_world(world), seed) for seed in SEEDS]
        if name == "hold":
            assert all(at_once(p, moment) == 12 for p in plans for moment in (11.5, 40, 79.9))
        elif name == "steady":
            assert abs(statistics.fmean(at_once(p, 60) for p in plans) - 12) < 5 * (12 / 40) ** 0.5
        else:
            for moment, expected in ((19.9, 6), (39.9, 12), (40.1, 24), (79.9, 6)):
                assert abs(statistics.fmean(at_once(p, moment) for p in plans) - expected) < 5 * (expected / 40) ** 0.5
            broken = sum(s.disconnects for p in plans for s in p) / sum(map(len, plans))
            assert broken == pytest.approx(0.1 if name == "chaos" else 0, abs=0.01)


def test_files_say_all_that_presets_do(tmp_path):
    for name in PRESETS:
        for paced in (True, False):
            tried = preset(name, 5, 33.5, 24.0, paced)
            (tmp_path / "s.json").write_text(json.dumps(tried.as_json()))
            assert read_scenario(tmp_path / "s.json") == tried
    (tmp_path / "s.json").write_text('{"phases": [{"seconds": 5, "burst": 2}], "session_seconds": [1, 2]}')
    assert read_scenario(tmp_path / "s.json") == Scenario((Phase(5, burst=2),), (1, 2))


GOOD = {"phases": [{"seconds": 5, "burst": 2}], "session_seconds": [1, 2]}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"phases": []}, "phases: got (); allowed: at least one"),
        ({"phases": {}}, "phases: got {}; allowed: a JSON list"),
        ({"phases": [5]}, "phases.0: got 5; allowed: a JSON object"),
        ({"phases": [{}]}, "phases.0.seconds: got None; allowed: a value: it is required"),
        ({"phases": [{"seconds": 0}]}, "phases.0.seconds: got 0; allowed: a number 0.1..1e+06"),
        ({"phases": [{"seconds": 5, "burst": 1.5}]}, "phases.0.burst: got 1.5; allowed: an integer"),
        ({"phases": [{"seconds": 5, "burst_seconds": 6}]}, "phases.0.burst_seconds: got 6; allowed: a number 0..5"),
        ({"phases": [{"seconds": 5, "rate": 6}]}, "phases.0.rate: got 6; allowed: only seconds, per_minute"),
        ({"phases": [{"seconds": 1e5, "per_minute": 1e5}]}, "phases: got 'about 166666667 streams'; allowed: at most"),
        ({"session_seconds": [1]}, "session_seconds: got [1]; allowed: a JSON list of 2"),
        ({"session_seconds": [2, 1]}, "session_seconds: got [2, 1]; allowed: two numbers 0.1..1e6, the second"),
        ({"fps": True}, "fps: got True; allowed: a number"),
        ({"fps": float("nan")}, "fps: got nan; allowed"),
        ({"paced": 1}, "paced: got 1; allowed: true or false"),
        ({"disconnect_share": 1.5}, "disconnect_share: got 1.5; allowed: a number 0..1"),
        ({"disconnect_share": 0.6, "slow_share": 0.5}, "slow_share: got 0.5; allowed: at most 0.4"),
        ({"slow_factor": 0.5}, "slow_factor: got 0.5; allowed: a number 1..1000"),
        ({"action_seconds": 3}, "action_seconds: got 3; allowed: a JSON list of 2"),
        ({"prompt_seconds": [0, 1]}, "prompt_seconds: got [0, 1]; allowed: two numbers"),
        ({"actions": ["x" * 300]}, "actions: got"),
        ({"actions": "forward"}, "actions: got 'forward'; allowed: a JSON list"),
        ({"prompts": [""]}, "prompt: got ''"),
        ({"encoding": "gif"}, "encoding: got 'gif'; allowed: raw, jpeg, h264"),
        ({"attention": [1]}, "attention: got [1]; allowed: a JSON object"),
        ({"slo": {"lost": -1}}, "slo.lost: got -1; allowed: a number 0..1e+06"),
        ({"slo": {"p50": 1}}, "slo.p50: got 1; allowed: only p5_fps_share"),
        ({"color": "red"}, "color: got 'red'; allowed: only phases"),
    ],
)
def test_bad_scenarios_are_refused(changed, says, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(GOOD | changed))
    with pytest.raises(InvalidArgument) as refused:
        read_scenario(tmp_path / "s.json")
    assert str(refused.value).startswith(says)
    assert "; allowed: " in str(refused.value)


def test_what_is_no_scenario(tmp_path):
    for text in ("", "[]", "{", "[" * 100_000):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(InvalidArgument, match="scenario: got"):
            read_scenario(tmp_path / "s.json")
    with pytest.raises(InvalidArgument, match="hold, steady, wave, chaos, or a readable JSON file"):
        read_scenario(tmp_path / "absent.json")
    for arguments in (("tide",), ("steady", 0), ("steady", 4, 0.5), ("hold", 4, 60, 0)):
        with pytest.raises(InvalidArgument):
            preset(*arguments)
