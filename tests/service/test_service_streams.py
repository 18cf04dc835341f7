"""The service over the real engine: joining, steering, storing, leaving. Frames are compared to the bit."""

from __future__ import annotations

import json
import re
import threading
import time

import numpy as np
import pytest
from harness import SMALL, Client, make_service

from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import ChunkRequest, StreamOptions
from fastar_backend.errors import AtCapacity, InvalidInput, SnapshotError, Stopping, Superseded, UnknownStream


@pytest.fixture
def service(world, tmp_path):
    service = make_service(world, tmp_path)
    yield service
    service.close()


def solo(world, events, seed=1, prompt="a dark maze") -> list[np.ndarray]:
    """frames of a stream alone: events are actions, or (kind, value[, blend]) controls before the next chunk."""
    engine, frames = StreamEngine(world, SMALL), []
    engine.open(0, prompt, StreamOptions(seed=seed))
    for event in events:
        if isinstance(event, tuple):
            engine.control(0, *event)
        else:
            frames.append(engine.step([ChunkRequest(0, (event,))])[0].frames)
    return frames


def until(condition, seconds=10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(reached)


def same(replies, frames) -> bool:
    return len(replies) == len(frames) and all(
        np.array_equal(r.frames, f) for r, f in zip(replies, frames, strict=True)
    )


def test_a_stream_from_start_to_end(service, world):
    client = Client(service)
    replies = [client.open(seed=1), client.chunk(("forward",)), client.chunk(("turn_left",))]
    assert same(replies, solo(world, ["", "forward", "turn_left"]))
    assert [reply.stats["chunk"] for reply in replies] == [0, 1, 2]
    assert replies[0].stats["world"] == world.info()
    assert len(replies[0].stats["token"]) >= 32
    assert "token" not in replies[1].stats
    assert replies[1].stats["actions"] == ["forward"]
    json.dumps(replies[1].stats)
    client.end()
    assert client.take().frames is None
    assert until(lambda: not service.sessions)
    assert service.engine.stream_ids == ()
    client.send()
    assert isinstance(client.error(), UnknownStream)


def test_streams_join_and_leave_at_chunks_and_are_what_they_are_alone(service, world):
    results = {}

    def live(seed):
        client, rng = Client(service), np.random.default_rng(seed)
        actions = list(rng.choice(["forward", "turn_left", ""], 6))
        time.sleep(float(rng.uniform(0, 0.05)))
        client.send(("",), "a dark maze", {"seed": seed}, start=True)
        replies = []
        for action in actions:
            client.send((str(action),))
            replies.append(client.take())
        replies.append(client.take())
        client.end()
        client.take()
        results[seed] = (actions, replies)

    threads = [threading.Thread(target=live, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(reply.stats["batch"] for _, replies in results.values() for reply in replies) > 1
    for seed, (actions, replies) in results.items():
        assert same(replies, solo(world, ["", *map(str, actions)], seed))
    assert until(lambda: service.engine.stream_ids == ())


# Controls


def test_two_receipts(service, world):
    client = Client(service)
    client.open(seed=1)
    receipt = client.control(prompt="a round arena", blend_chunks=2)
    assert receipt["control"] == {"id": 1, "error": None}
    assert client.control(seed=5)["received"] == 2
    reply = client.chunk(("forward",))
    assert reply.stats["applied"] == [1, 2]
    later = client.chunk(("forward",))
    assert later.stats["applied"] == []
    expected = solo(world, ["", ("prompt", "a round arena", 2), ("seed", 5), "forward", "forward"])
    assert same([reply, later], expected[1:])


def test_controls_are_taken_once_and_in_order(service, world):
    client = Client(service)
    client.open(seed=1)
    assert client.control(id=2, seed=1)["control"]["error"].startswith(
        "INVALID_ARGUMENT: CONTROL.id: got 2; allowed: 1"
    )
    assert client.control(id=1, seed=7)["control"]["error"] is None
    assert client.control(id=1, seed=7)["control"]["error"] is None, "a duplicate is only acknowledged"
    assert client.control(id=2, density=9)["control"]["error"].startswith("INVALID_ARGUMENT: CONTROL.density")
    receipt = client.control(id=3, prompt="a round arena")
    assert (receipt["control"]["error"], receipt["received"]) == (None, 3)
    reply = client.chunk()
    assert reply.stats["applied"] == [1, 3]
    assert same([reply], solo(world, ["", ("seed", 7), ("prompt", "a round arena"), ""])[1:])


def test_an_action_overtakes_the_chunks_that_wait(service, world):
    client = Client(service)
    client.open(seed=1)
    client.control(pause=True)
    client.send(("forward",))
    client.send(("forward",))
    client.control(action="turn_left")
    client.control(pause=False)
    replies = [client.take(), client.take()]
    assert [reply.stats["actions"] for reply in replies] == [["turn_left"], ["turn_left"]]
    assert replies[0].stats["applied"] == [1, 2, 3]
    assert same(replies, solo(world, ["", "turn_left", "turn_left"])[1:])


@pytest.mark.parametrize(
    ("control", "said"),
    [
        ({"action": "fly"}, "CONTROL.action: unknown button 'fly'"),
        ({"action": 3}, "CONTROL.action: got 3"),
        ({"prompt": " "}, "CONTROL.prompt: it is empty"),
        ({"prompt": "x" * 5000}, "CONTROL.prompt: it has 5000 bytes"),
        ({"prompt": "x", "blend_chunks": 65}, "CONTROL.blend_chunks: got 65; allowed: 1..64"),
        ({"seed": 1, "blend_chunks": 2}, "CONTROL.blend_chunks: stands beside seed"),
        ({"fps": 0}, "CONTROL.fps: got 0"),
        ({"fps": 1e9}, "CONTROL.fps: got 1000000000.0; allowed: null, or more than 0, at most 240"),
        ({"fps": True}, "CONTROL.fps: got True"),
        ({"density": 1.5}, "CONTROL.density: got 1.5"),
        ({"encoding": "gif"}, "CONTROL.encoding: got 'gif'; allowed: raw, jpeg, h264"),
        ({"pause": 1}, "CONTROL.pause: got 1; allowed: true or false"),
        ({"snapshot": 1}, "CONTROL.snapshot: got 1; allowed: true"),
        ({"rewind": 5}, "CONTROL.rewind: got 5; allowed: a chunk with a stored snapshot: none yet"),
        ({"seed": 1, "fps": 2}, "CONTROL: has seed, fps; allowed: one of"),
        ({"speed": 1}, "CONTROL: has speed; allowed: one of"),
        ({}, None),
    ],
)
def test_wrong_controls_are_told_and_harm_nothing(service, world, control, said):
    client = Client(service)
    client.open(seed=1)
    receipt = client.control(**control)["control"]
    if said is None:
        assert receipt == {"id": None, "error": None}, "a keepalive"
    else:
        assert said in receipt["error"]
    assert same([client.chunk(("forward",))], solo(world, ["", "forward"])[1:])


def test_controls_too_fast_are_refused(world, tmp_path):
    service = make_service(world, tmp_path, controls_per_second=5)
    client = Client(service)
    client.open()
    errors = [client.control(seed=1)["control"]["error"] for _ in range(8)]
    assert errors[:5] == [None] * 5
    assert "more than 5 a second" in errors[-1]
    service.close()


# Snapshots


def stored(service, client, chunk) -> bool:
    return until(lambda: chunk in service.sessions[client.id].stored)


def test_rewind_shows_the_same_again(service, world):
    client = Client(service)
    client.open(seed=1)
    client.control(snapshot=True)
    first = [client.chunk((action,)) for action in ("forward", "turn_left")]
    assert stored(service, client, 1)
    client.control(rewind=1)
    again = [client.chunk((action,)) for action in ("forward", "turn_left")]
    assert again[0].stats["applied"] == [2]
    assert [reply.stats["chunk"] for reply in again] == [1, 2]
    assert same(again, [reply.frames for reply in first])
    other = client.chunk(("",))
    assert same([other], solo(world, ["", "forward", "turn_left", ""])[3:])


def test_a_future_that_did_not_come_is_nobodys_past(service, world):
    client = Client(service)
    client.open(seed=1)
    for action in ("", "forward", "forward"):
        client.control(snapshot=True)
        client.chunk((action,))
    assert until(lambda: service.sessions[client.id].stored == {2, 3})
    client.control(rewind=2)
    client.chunk(("turn_left",))
    assert until(lambda: service.sessions[client.id].stored == {2})
    assert client.control(rewind=3)["control"]["error"]
    service.close()
    assert service.vault.store.chunks(client.token) == [2, 3], "3 is the newest now, of the stream as it became"


def test_what_a_snapshot_had_applied_is_told_after_a_resume(world, tmp_path):
    service = make_service(world, tmp_path, snapshot_chunks=2)
    client = Client(service)
    client.open(seed=1)
    client.chunk()
    client.control(seed=5)
    reply = client.chunk()
    assert (reply.stats["chunk"], reply.stats["applied"]) == (2, [1])
    client.chunk()
    assert until(lambda: 2 in service.sessions[client.id].stored)
    back = Client(service)
    again = back.chunk(options={"resume": {"token": client.token, "chunk": 2}}, start=True)
    assert (again.stats["chunk"], again.stats["applied"], again.stats["received"]) == (2, [1], 1)
    assert np.array_equal(again.frames, reply.frames)
    service.close()


@pytest.mark.parametrize("after", ["cancel", "drain", "live"])
def test_resume_goes_on_where_it_was(world, tmp_path, after):
    service = make_service(world, tmp_path)
    client = Client(service)
    client.open(seed=1, fps=10, encoding="raw")
    client.control(seed=9)
    client.chunk(("forward",))
    client.control(prompt="a round arena")  # received, not applied yet
    if after == "cancel":
        client.control(pause=True)
        client.send()
        client.gone = True
        assert isinstance(client.error(), Superseded)
    elif after == "drain":
        client.control(pause=True)
        client.send()
        service.close()
        assert isinstance(client.error(), Stopping)
        service = make_service(world, tmp_path)
    back = Client(service)
    reply = back.chunk(("turn_left",), options={"resume": {"token": client.token}}, start=True)
    assert reply.stats["chunk"] == 2
    assert reply.stats["token"] == client.token
    assert reply.stats["world"] == world.info()
    assert reply.stats["received"] == (2 if after == "live" else 3)
    assert 2 in reply.stats["applied"]
    expected = solo(world, ["", ("seed", 9), "forward", ("prompt", "a round arena"), "turn_left", "forward"])
    assert same([reply, back.chunk(("forward",))], expected[2:])
    assert len(service.sessions) == 1, "the old one is gone"
    if after == "live":
        client.send()
        assert isinstance(client.error(), Superseded), "and is told so, or it would steal the stream back"
    service.close()


def test_fork_leaves_the_original_alone(service, world):
    client = Client(service)
    client.open(seed=1)
    client.chunk(("forward",))
    twin, other = Client(service), Client(service)
    reply = twin.chunk(("turn_left",), options={"fork": {"token": client.token}}, start=True)
    assert reply.stats["chunk"] == 2
    assert reply.stats["token"] != client.token
    assert same([reply], solo(world, ["", "forward", "turn_left"])[2:])
    changed = other.chunk(("turn_left",), options={"fork": {"token": client.token}, "seed": 77}, start=True)
    assert not np.array_equal(changed.frames, reply.frames)
    assert same([client.chunk(("",))], solo(world, ["", "forward", ""])[2:])
    assert len(service.sessions) == 3


def test_a_state_not_later_than_asked(service):
    client = Client(service)
    client.open(seed=1)
    client.control(snapshot=True)
    for _ in range(3):
        client.chunk(("forward",))
    assert stored(service, client, 1)
    twin = Client(service)
    reply = twin.chunk(options={"fork": {"token": client.token, "chunk": 3}}, start=True)
    assert reply.stats["chunk"] == 1
    late = Client(service)
    late.send(options={"fork": {"token": client.token, "chunk": 0}}, start=True)
    assert "no snapshot that early" in str(late.error())


@pytest.mark.parametrize("kind", ["resume", "fork"])
def test_tokens_do_not_work_for_others(service, world, kind):
    client = Client(service, tenant="a")
    client.open(seed=1)
    client.control(snapshot=True)
    client.chunk()
    assert stored(service, client, 1)
    thief = Client(service, tenant="b")
    for chunk in (None, 1):
        thief.send(options={kind: {"token": client.token, "chunk": chunk}}, start=True)
        assert isinstance(thief.error(), UnknownStream)
    guess = Client(service, tenant="a")
    guess.send(options={kind: {"token": "x" * 43}}, start=True)
    assert isinstance(guess.error(), UnknownStream)
    assert same([client.chunk(("forward",))], solo(world, ["", "", "forward"])[2:])


def test_another_tenant_cannot_touch_a_sequence(service, world):
    client = Client(service, tenant="a")
    client.open(seed=1)
    thief = Client(service, tenant="b")
    thief.id = client.id
    thief.send(("forward",))
    assert isinstance(thief.error(), UnknownStream)
    thief.send(("",), "a dark maze", {}, start=True)
    assert isinstance(thief.error(), InvalidInput)
    thief.end()
    assert isinstance(thief.error(), UnknownStream)
    assert same([client.chunk(("forward",))], solo(world, ["", "forward"])[1:])


def test_periodic_snapshots_keep_the_newest(world, tmp_path):
    service = make_service(world, tmp_path, snapshot_chunks=2, snapshots_kept=2)
    client = Client(service)
    client.open()
    for _ in range(8):
        reply = client.chunk()
        time.sleep(0.02)
    assert until(lambda: service.sessions[client.id].stored == {6, 8})  # and one before chunk 1, long gone
    assert reply.stats["snapshot_chunk"] in (6, 8)
    service.close()


def test_torn_snapshots_are_refused_by_name(service, tmp_path):
    client = Client(service)
    client.open()
    client.control(snapshot=True)
    client.chunk()
    assert stored(service, client, 1)
    client.end()
    client.take()
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert client.token not in str(file)
    file.write_bytes(file.read_bytes()[:-5])
    back = Client(service)
    back.send(options={"resume": {"token": client.token}}, start=True)
    assert isinstance(error := back.error(), SnapshotError)
    assert "torn" in str(error)


# Limits


def test_what_is_full_says_what_would_fit(world, tmp_path):
    service = make_service(world, tmp_path, max_streams=2)
    first, second, third = (Client(service) for _ in range(3))
    first.open(seed=1)
    second.open()
    third.send(("",), "a dark maze", {}, start=True)
    error = third.error()
    assert isinstance(error, AtCapacity)
    assert re.fullmatch(r"streams: 2 are open; allowed: 2; retry in \d+ s", str(error))
    second.end()
    second.take()
    third.open()
    assert same([first.chunk(("forward",))], solo(world, ["", "forward"])[1:])
    service.close()


def test_rates_that_do_not_fit_are_refused_also_later(world, tmp_path):
    service = make_service(world, tmp_path, max_fps=100000.0)
    service.cost.base, service.cost.each = 0.0, 0.1  # 4 frames take .1 s: 36 frames a second at 90 %
    client = Client(service)
    client.open(fps=30.0)
    other = Client(service)
    other.send(("",), "a dark maze", {"fps": 30.0}, start=True)
    error = other.error()
    assert isinstance(error, AtCapacity)
    assert "allowed: at most" in str(error)
    other.open()
    assert "RESOURCE_EXHAUSTED" in other.control(fps=30.0)["control"]["error"]
    assert other.control(fps=0.5)["control"]["error"] is None
    assert client.control(fps=10.0)["control"]["error"] is None
    assert other.control(fps=10.0)["control"]["error"] is None
    service.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fps": -1}, "OPTIONS.fps"),
        ({"fps": 500}, "OPTIONS.fps: got 500; allowed: null, or more than 0, at most 240"),
        ({"encoding": "gif"}, "OPTIONS.encoding"),
        ({"resume": {"token": "short"}}, "OPTIONS.resume.token"),
        ({"resume": {"token": "x" * 40}, "fork": {"token": "x" * 40}}, "exclude each other"),
        ({"resume": {"token": "x" * 40}, "seed": 3}, "seed: the stream's own"),
        ({"fork": {"token": "x" * 40}, "start": "maze"}, "start: the stream's own"),
        ({"colour": 1}, "OPTIONS.colour"),
    ],
)
def test_wrong_options(service, options, said):
    client = Client(service)
    client.send(("",), "a dark maze", options, start=True)
    error = client.error()
    assert isinstance(error, InvalidInput)
    assert said in str(error)
    assert service.engine.stream_ids == ()


def test_too_many_requests_end_that_stream_alone(service, world):
    client, other = Client(service), Client(service)
    other.open(seed=1)
    client.open()
    client.control(pause=True)
    for _ in range(5):
        client.send()
    for _ in range(5):
        assert isinstance(client.error(), AtCapacity)
    assert until(lambda: len(service.engine.stream_ids) == 1)
    assert same([other.chunk(("forward",))], solo(world, ["", "forward"])[1:])


def test_idle_paused_and_old_streams_end_and_can_come_back(world, tmp_path):
    service = make_service(world, tmp_path, idle_seconds=1, paused_seconds=1, wall_seconds=3600)
    idle, paused = Client(service), Client(service)
    idle.open()
    paused.open()
    paused.control(pause=True)
    paused.send()
    assert "paused for 1 s" in str(paused.error())
    assert until(lambda: not service.sessions, 15)
    assert service.engine.stream_ids == ()
    for client in (idle, paused):
        back = Client(service)
        reply = back.chunk(options={"resume": {"token": client.token}}, start=True)
        assert reply.stats["chunk"] == 1
    service.close()


def test_a_step_that_breaks_ends_its_streams_and_no_other(service, world, monkeypatch):
    client, other = Client(service), Client(service)
    client.open()
    other.open(seed=1)
    step = service.engine.step

    def broken(requests):
        if any("attack" in request.actions for request in requests):
            raise ZeroDivisionError("a secret prompt")
        return step(requests)

    monkeypatch.setattr(service.engine, "step", broken)
    client.send(("attack",))
    assert str(client.error()) == "server: ZeroDivisionError, see the server's log; allowed: a new stream"
    assert same([other.chunk(("forward",))], solo(world, ["", "forward"])[1:])
    assert len(service.engine.stream_ids) == 1


def test_lateness_is_explained(service):
    client = Client(service)
    client.open(fps=8.0)
    time.sleep(1.0)
    late = client.chunk().stats["late"]
    assert late["reason"] == "slow_reader"
    assert 0.05 < late["seconds"] < 5
    best = Client(service)
    best.open()
    assert best.chunk().stats["late"] is None


@pytest.mark.parametrize("encoding", ["jpeg", "h264"])
def test_encodings_change_at_a_chunk(service, encoding):
    client = Client(service)
    client.open(encoding=encoding)
    reply = client.chunk()
    assert reply.frames is None
    assert sum(reply.stats["packets"]) == len(reply.video) > 0
    assert len(reply.stats["packets"]) == reply.stats["frames"]
    client.control(encoding="raw")
    reply = client.chunk()
    assert (reply.stats["encoding"], reply.video) == ("raw", b"")
    assert reply.frames.shape[0] == reply.stats["frames"]


def test_a_store_that_fails_takes_no_stream_with_it(service, world, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(service.vault.store, "put", full)
    client = Client(service)
    client.open(seed=1)
    client.control(snapshot=True)
    assert same([client.chunk(("forward",))], solo(world, ["", "forward"])[1:])
    assert until(lambda: service.sessions[client.id].saving == 0)
    assert service.sessions[client.id].stored == set()
