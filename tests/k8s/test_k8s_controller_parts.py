"""The controller's decisions, without processes: placement, frame rates, what it reads of a server."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
import types

import pytest
from fake_api import CODE, Server
from fastar_controller.admin import AdminError, close, move
from fastar_controller.health import Health, Limits, slowest_tenth
from fastar_controller.placement import Pod, open_pods, room_wanted, to_move
from fastar_controller.scrape import Reading, ScrapeError, parse, scrape
from fastar_controller.status import Status

from fastar_backend.serve.admin import Admin

api = pytest.importorskip("fastar_controller.api")  # needs the package `kubernetes`
loop = pytest.importorskip("fastar_controller.controller")
LIMITS = Limits(target=16.0, window=60.0, hold=30.0, misses=3)


def some_pods(source: random.Random) -> list[Pod]:
    pods = []
    for index in range(source.randrange(0, 12)):
        slots = source.choice((1, 2, 8))
        leaving = source.random() < 0.1
        pods.append(
            Pod(
                f"triton-{index}", source.randint(0, slots), slots, open=source.random() < 0.5,
                fit=not leaving and source.random() < 0.8, leaving=leaving,
            )
        )  # fmt: skip
    return pods


@pytest.mark.parametrize("seed", range(300))
def test_laws_of_placement(seed):
    source = random.Random(seed)
    pods, room = some_pods(source), source.randint(1, 12)
    by_name = {pod.name: pod for pod in pods}
    chosen = [by_name[name] for name in open_pods(pods, room)]
    able = [pod for pod in pods if pod.fit and pod.free]
    assert not [pod for pod in chosen if pod.leaving]
    assert chosen or all(pod.leaving for pod in pods), "somebody takes, or refuses with a reason"
    if able:
        assert all(pod in able for pod in chosen), "none that is full or unfit"
        free = sum(pod.free for pod in chosen)
        assert free >= min(room, sum(pod.free for pod in able))
        most = max(pod.streams for pod in able)
        assert most in [pod.streams for pod in chosen], "the fullest is among them"
        assert free < 2 * room + max(pod.free for pod in able)
    again = [Pod(p.name, p.streams, p.slots, p in chosen, p.fit, p.leaving) for p in pods]
    assert open_pods(again, room) == {pod.name for pod in chosen}, "it stays as it is while nothing changes"


def test_fullest_first_and_hysteresis():
    pods = [Pod("a", 1, 2, False), Pod("b", 0, 2, False), Pod("c", 0, 2, False), Pod("d", 2, 2)]
    assert open_pods(pods, 1) == {"a"}
    assert open_pods(pods, 2) == {"a", "b"}
    opened = [Pod("a", 1, 2), Pod("b", 0, 2), Pod("c", 0, 2), Pod("d", 2, 2)]
    assert open_pods(opened, 1) == {"a", "b"}, "b was open, and stays until there is twice the room without it"
    assert open_pods(opened, 2) == {"a", "b", "c"}
    assert room_wanted(pods, 1) == 1
    assert open_pods([Pod("a", 2, 2), Pod("b", 0, 2, fit=False)], 1) == {"a"}, "rather full than unfit"
    assert room_wanted([Pod("x", 0, 200)], 8) == 20


@pytest.mark.parametrize("seed", range(100))
def test_laws_of_moving(seed):
    source = random.Random(seed)
    pods = [dataclasses.replace(pod, slow=not pod.fit and source.random() < 0.7) for pod in some_pods(source)]
    opened = open_pods(pods, source.randint(1, 12))
    names, by_name = to_move(pods, opened), {pod.name: pod for pod in pods}
    chosen = [by_name[name] for name in names]
    assert all(pod.slow and not pod.leaving and pod.streams > 1 for pod in chosen)
    places = sum(pod.free for pod in pods if pod.name in opened and pod.fit)
    able = [pod for pod in pods if pod.slow and not pod.leaving and pod.streams > 1]
    assert len(names) == len(set(names)) == min(len(able), places), "each finds a place"
    assert not chosen or min(p.streams for p in chosen) >= max((p.streams for p in able if p not in chosen), default=0)
    assert to_move([dataclasses.replace(pod, slow=True, fit=False) for pod in pods], opened) == [], "all are slow"


def readings(health: Health, rate_of, seconds: int, start: int = 0) -> list[bool]:
    """One every five seconds; rate_of: time -> the rate that ten streams have. Slow or not, each time."""
    said, counts = [], dict(health.last.rates) if health.last else dict.fromkeys((12.0, 16.0, 24.0, float("inf")), 0.0)
    for now in range(start, start + seconds, 5):
        for bound in counts:
            counts[bound] += 10 * (rate_of(now) <= bound)
        health.see(Reading(10, 10, False, dict(counts)), float(now), LIMITS)
        said.append(health.slow)
    return said


def test_slow_takes_a_while_and_so_does_well():
    health = Health()
    assert not any(readings(health, lambda now: 16.0, 300)), "at the target is not below it"
    slow = readings(health, lambda now: 12.0, 60, start=300)
    assert slow[-1]
    assert not any(slow[:6]), "30 s"
    well = readings(health, lambda now: 17.0, 150, start=360)
    assert all(well[:6])
    assert not well[-1]
    assert not any(readings(health, lambda now: 12.0 if now % 100 < 5 else 20.0, 600, start=510)), "5 % are slow"


def test_a_server_that_starts_anew_and_one_without_viewers():
    health = Health()
    readings(health, lambda now: 12.0, 100)
    assert health.slow
    for now in range(100, 300, 5):
        health.see(Reading(0, 10, False, {}), float(now), LIMITS)
    assert not health.slow
    assert health.fit(LIMITS)
    health.see(Reading(0, 10, True, {}), 300.0, LIMITS)
    assert not health.fit(LIMITS), "draining"
    assert not Health().fit(LIMITS), "never seen"
    anew = Health()
    for now, (slow, all_) in enumerate([(0.0, 1000.0), *((10.0 * n, 10.0 * n) for n in range(1, 11))]):
        anew.see(Reading(1, 10, False, {12.0: slow, float("inf"): all_}), 5.0 * now, LIMITS)
    assert anew.slow, "what the server counted before it started anew is forgotten"


def test_misses():
    health = Health()
    health.see(Reading(1, 2, False, {}), 0.0, LIMITS)
    for fit in (True, True, False):
        health.miss()
        assert health.fit(LIMITS) is fit
    assert health.last.streams == 1
    health.see(Reading(2, 2, False, {}), 1.0, LIMITS)
    assert health.fit(LIMITS)


def test_the_slowest_tenth():
    inf = float("inf")
    assert slowest_tenth({}, {12.0: 1.0, 16.0: 5.0, inf: 10.0}) == 12.0
    assert slowest_tenth({}, {12.0: 0.9, 16.0: 5.0, inf: 10.0}) == 16.0
    assert slowest_tenth({12.0: 9.0, inf: 9.0}, {12.0: 9.0, 24.0: 1.0, inf: 19.0}) == 24.0 or inf
    assert slowest_tenth({12.0: 9.0, inf: 9.0}, {12.0: 9.0, inf: 9.0}) is None


def test_what_is_read_and_what_is_not():
    server = Server(3, 4)
    try:
        server.watch(11.0, 2)
        url = f"http://127.0.0.1:{server.port}/metrics"
        reading = scrape(url, 2.0)
        assert (reading.streams, reading.slots, reading.draining) == (3, 4, False)
        assert reading.rates == {12.0: 2.0, 16.0: 2.0, 24.0: 2.0, float("inf"): 2.0}
        server.silent = True
        with pytest.raises(ScrapeError, match="500"):
            scrape(url, 2.0)
    finally:
        server.stop()
    with pytest.raises(ScrapeError, match=url):
        scrape(url, 2.0)
    for text in ("fastar_streams_active 1\n", "", "<html>", "fastar_streams_active one\n"):
        with pytest.raises(ValueError, match=r"."):
            parse(text)


def test_a_server_understands_what_it_is_asked():
    moved, closed = [], []
    admin = Admin("127.0.0.1", 0, types.SimpleNamespace(move=moved.append, close=closed.append))
    url = f"http://127.0.0.1:{admin.port}"
    move(url, 1, 2.0)
    close(url, loop.CLOSED_SECONDS, 2.0)
    close(url, 0, 2.0)
    assert (moved, closed) == ([1], [loop.CLOSED_SECONDS, 0])
    with pytest.raises(AdminError, match="400"):
        move(url, 201, 2.0)
    admin.stop()
    with pytest.raises(AdminError, match=url):
        move(url, 1, 2.0)


def test_who_lost_the_lease_writes_and_tells_nothing_more(monkeypatch):
    """Even in the middle of a round."""
    pod = api.Found("triton-0", "http://127.0.0.1:1/metrics", None, True, False, "http://127.0.0.1:1")
    written: list[str] = []
    told: list[str] = []
    monkeypatch.setattr(loop, "close", lambda url, *_: told.append(url))
    for leads in (False, True):
        pods = types.SimpleNamespace(patch=lambda name, *_: written.append(name))
        one = loop.Controller(pods, types.SimpleNamespace(leads=leads), Status(), loop.Settings())
        one.known = {"triton-0": Health()}
        one.known["triton-0"].see(Reading(1, 2, False, {}), 0.0, LIMITS)
        one._write(pod, True)
        one._tell(pod, False)
        assert written == ["triton-0"] * leads
        assert told == [pod.admin] * leads


def test_outside_of_a_cluster_it_says_what_it_needs():
    command = [sys.executable, "-m", "fastar_controller", "--port", "0"]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(CODE), "COLUMNS": "300"}, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert "give --api and --namespace" in done.stderr
