"""A drain without Triton: streams are stored at a boundary, told where they go on, and go on there bit for bit."""

from __future__ import annotations

import time

import numpy as np
import pytest
from harness import Client, make_service

from fastar_backend.errors import FastarError, Stopping, Superseded, UnknownStream
from fastar_backend.service.store import SnapshotStore, open_store

ACTIONS = ["", "forward", "turn_left", "", "attack", "forward", "", "turn_left"]


def until(condition, seconds=10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


@pytest.fixture
def pair(world, tmp_path):
    """Two servers with one store."""
    services = [make_service(world, tmp_path / "store", max_streams=6) for _ in range(2)]
    yield services
    for service in services:
        service.close()


def begin(service, chunks: int, seed: int = 1, migrate: bool = True, **options) -> Client:
    client = Client(service)
    client.migrates = migrate
    client.open(seed=seed, **options)
    for action in ACTIONS[1:chunks]:
        client.chunk((action,))
    return client


def go_on(service, token: str, first: int, last: int) -> list[np.ndarray]:
    back = Client(service)
    options = {"resume": {"token": token, "chunk": first}}
    replies = [back.chunk((ACTIONS[first],), options=options, start=True)]
    replies += [back.chunk((action,)) for action in ACTIONS[first + 1 : last]]
    assert [reply.stats["chunk"] for reply in replies] == list(range(first, last))
    return [reply.frames for reply in replies]


def undisturbed(service, seed: int = 1, prompt: tuple[int, str, int] | None = None) -> list[np.ndarray]:
    client = Client(service)
    frames = [client.open(seed=seed).frames]
    for chunk, action in enumerate(ACTIONS[1:], 1):
        if prompt and chunk == prompt[0]:
            client.control(prompt=prompt[1], blend_chunks=prompt[2])
        frames.append(client.chunk((action,)).frames)
    client.end()
    return frames


def test_streams_go_on_elsewhere_as_if_nothing_had_been(pair):
    old, new = pair
    expected = {seed: undisturbed(new, seed) for seed in (1, 2)}
    clients = {seed: begin(old, 3, seed) for seed in (1, 2)}
    for client in clients.values():
        client.send((ACTIONS[3],))
        client.send((ACTIONS[4],))
    old.drain.begin()
    for seed, client in clients.items():
        frames = []
        for _ in range(2):
            reply = client.take()
            migrate = reply.stats.get("migrate")
            if migrate is None:
                frames.append(reply.frames)
        first = 3 + len(frames)
        shape = expected[seed][0].shape
        assert migrate == {"chunk": first, "frame": first * shape[0], "token": client.token}
        assert reply.frames is None
        frames += go_on(new, client.token, first, 8)
        assert all((a == b).all() for a, b in zip(frames, expected[seed][3:], strict=True))
    assert until(old.drain.over.is_set)
    assert not old.engine.stream_ids


def test_an_idle_and_a_paused_stream_are_stored_at_once_and_told_when_they_ask(pair, monkeypatch):
    monkeypatch.setattr("fastar_backend.service.drain.LINGER_SECONDS", 60.0)
    old, new = pair
    expected = undisturbed(new)
    idle, paused, blending = begin(old, 2), begin(old, 2), begin(old, 2)
    paused.control(pause=True)
    blending.control(prompt="a green cavern", blend_chunks=4)
    blending.chunk((ACTIONS[2],))
    old.drain.begin()
    assert until(lambda: all(one.stored for one in old.drain.leaving.values()) and len(old.drain.leaving) == 3)
    assert not old.drain.over.is_set(), "it lingers"
    assert not old.sessions
    assert idle.chunk((ACTIONS[2],)).stats["migrate"]["chunk"] == 2
    receipt = paused.control()
    assert (receipt["control"], receipt["migrate"]["chunk"]) == (None, 2)
    refused = paused.control(density=0.5)
    assert (refused["received"], refused["control"]) == (1, None), "what comes too late is not taken"
    assert blending.chunk().stats["migrate"]["chunk"] == 3
    assert until(old.drain.over.is_set), "all are told"
    for client in (idle, paused):
        frames = go_on(new, client.token, 2, 8)
        assert all((a == b).all() for a, b in zip(frames, expected[2:], strict=True))
    blended = undisturbed(new, prompt=(2, "a green cavern", 4))
    frames = go_on(new, blending.token, 3, 8)
    assert all((a == b).all() for a, b in zip(frames, blended[3:], strict=True))
    assert not (frames[-1] == expected[-1]).all()


def test_who_asks_for_nothing_does_not_hold_the_server(pair, monkeypatch):
    monkeypatch.setattr("fastar_backend.service.drain.LINGER_SECONDS", 0.3)
    old, _ = pair
    begin(old, 2)
    old.drain.begin()
    assert until(old.drain.over.is_set, 3)


def test_new_streams_are_refused_and_old_clients_hear_an_error(pair):
    old, new = pair
    expected = undisturbed(new)
    client = begin(old, 2, migrate=False)
    old.drain.begin()
    with pytest.raises(Stopping, match="another server"):
        Client(old).open()
    with pytest.raises(Stopping, match="resume by the stream's token"):
        client.chunk()
    frames = go_on(new, client.token, 2, 8)
    assert all((a == b).all() for a, b in zip(frames, expected[2:], strict=True))


def test_another_tenant_is_not_told_the_token(pair):
    client = begin(pair[0], 2)
    pair[0].drain.begin()
    assert until(lambda: pair[0].drain.leaving)
    thief = Client(pair[0], "thief")
    thief.id = client.id
    with pytest.raises(UnknownStream):
        thief.chunk()
    assert client.chunk().stats["migrate"]["token"] == client.token


def test_a_stream_that_cannot_be_stored_goes_on_until_it_ends(pair):
    old, _ = pair
    client = begin(old, 2, measure_recall=True)
    old.drain.begin()
    time.sleep(0.3)
    assert client.chunk().stats["chunk"] == 2
    assert not old.drain.over.is_set()
    client.send(("",), end=True)
    assert client.take().stats["chunk"] == 3
    assert until(old.drain.over.is_set)


def test_a_store_that_fails_costs_only_that_stream(world, tmp_path, monkeypatch):
    old, new = (make_service(world, tmp_path / "store", snapshot_chunks=2) for _ in range(2))
    expected = undisturbed(new)
    unlucky, lucky = begin(old, 4), begin(old, 4)
    assert until(lambda: 2 in old.sessions[unlucky.id].stored)
    put = old.vault.store.put

    def failing(token, *rest):
        if token == unlucky.token:
            raise OSError(28, "No space left on device")
        put(token, *rest)

    monkeypatch.setattr(old.vault.store, "put", failing)
    old.drain.begin()
    with pytest.raises(Stopping):
        unlucky.chunk()
    assert lucky.chunk().stats["migrate"]["chunk"] == 4
    assert until(old.drain.over.is_set)
    for client, first in ((unlucky, 2), (lucky, 4)):
        back = Client(new)
        reply = back.chunk((ACTIONS[first],), options={"resume": {"token": client.token, "chunk": 4}}, start=True)
        assert reply.stats["chunk"] == first
        assert (reply.frames == expected[first]).all()
    for service in (old, new):
        service.close()


# Fencing


def test_the_old_owners_late_write_fails(pair):
    old, new = pair
    client = begin(old, 3)
    client.control(snapshot=True)
    client.chunk((ACTIONS[3],))
    assert until(lambda: 3 in old.sessions[client.id].stored)
    back = Client(new)
    assert back.chunk((ACTIONS[3],), options={"resume": {"token": client.token}}, start=True).stats["chunk"] == 3
    back.controls = client.controls  # ids go on
    back.control(snapshot=True)
    back.chunk((ACTIONS[4],))
    assert until(lambda: 4 in new.sessions[back.id].stored)
    client.chunk()  # the old server does not know yet,
    client.control(snapshot=True)
    client.chunk()  # and stores chunk 5, late
    assert until(lambda: not old.sessions, 5), "then it knows"
    with pytest.raises(Superseded):
        client.chunk()
    assert new.store.chunks(client.token) == [3, 4]
    assert back.chunk().stats["chunk"] == 5


def test_who_comes_back_to_the_old_server_owns_the_stream_again(pair):
    old, new = pair
    client = begin(old, 3)
    client.control(snapshot=True)
    client.chunk((ACTIONS[3],))
    assert until(lambda: 3 in old.sessions[client.id].stored)
    Client(new).chunk((ACTIONS[3],), options={"resume": {"token": client.token}}, start=True)
    back = Client(old)
    assert back.chunk((ACTIONS[4],), options={"resume": {"token": client.token}}, start=True).stats["chunk"] == 4
    back.controls = client.controls
    back.control(snapshot=True)
    back.chunk((ACTIONS[5],))
    assert until(lambda: 5 in old.sessions[back.id].stored), "its writes are welcome"


def test_some_streams_are_shed_and_the_server_goes_on(pair, monkeypatch):
    """The newest whose clients understand; the others, and new ones, stay as they were."""
    old, new = pair
    monkeypatch.setattr("fastar_backend.service.drain.FORGET_SECONDS", 0.3)
    first, second, third = (begin(old, 3, seed=seed) for seed in (1, 2, 3))
    blind = begin(old, 3, seed=4, migrate=False)
    expected = {client: undisturbed(new, seed) for client, seed in ((first, 1), (second, 2), (third, 3), (blind, 4))}
    old.drain.shed(2)
    for client in (second, third):
        assert until(lambda client=client: client.id not in old.sessions)
        reply = client.chunk((ACTIONS[3],))
        assert reply.stats["migrate"] == {"chunk": 3, "frame": reply.stats["migrate"]["frame"], "token": client.token}
        np.testing.assert_array_equal(go_on(new, client.token, 3, 8), expected[client][3:])
    for client in (first, blind):
        frames = [client.chunk((action,)).frames for action in ACTIONS[3:]]
        np.testing.assert_array_equal(frames, expected[client][3:])
    assert old.drain.began is None
    begin(old, 2).end()
    assert until(lambda: not old.drain.leaving), "what has moved is forgotten"
    with pytest.raises(UnknownStream):
        second.chunk((ACTIONS[4],))
    old.drain.shed(5)
    assert until(lambda: first.id not in old.sessions)
    assert blind.id in old.sessions
    late = begin(old, 2, seed=5)
    old.drain.wanted = 0
    late.chunk((ACTIONS[2],))


def test_a_stream_that_cannot_be_stored_is_shed_all_the_same(pair, monkeypatch):
    """Its client hears UNAVAILABLE, and goes on from an older snapshot."""
    old, _ = pair
    client = begin(old, 3)
    monkeypatch.setattr(old.store, "put", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    old.drain.shed(1)
    assert until(lambda: client.id not in old.sessions)
    with pytest.raises(Stopping):
        client.chunk((ACTIONS[3],))


@pytest.mark.parametrize("kind", ["folder", "memory", "redis"])
def test_epochs(kind, tmp_path, request):
    urls = {"folder": str(tmp_path / "store"), "memory": f"memory://{tmp_path.name}"}
    url = urls.get(kind) or request.getfixturevalue("redis").url
    old, new = open_store(url, 2, 3600), open_store(url, 2, 3600)
    old.put("token", 10, b"ten")
    old.put("token", 12, b"twelve")
    assert new.claim("token", 10) == 2
    assert new.chunks("token") == [10], "what came after is another's past"
    for late in (lambda: old.put("token", 14, b"late"), lambda: old.drop("token"), lambda: old.put("token", 10, b"x")):
        with pytest.raises(Superseded, match="taken over"):
            late()
    new.put("token", 12, b"new", 2)
    assert new.get("token") == (12, b"new")
    assert new.get("token", 10) == (10, b"ten")
    assert old.claim("token", 12) == 3
    with pytest.raises(FastarError):
        new.put("token", 14, b"late", 2)


def test_a_write_that_a_claim_overtakes_is_undone_and_void(tmp_path, monkeypatch):
    old, new = SnapshotStore(str(tmp_path), 4, 3600), SnapshotStore(str(tmp_path), 4, 3600)
    old.put("token", 10, b"ten")
    move, seen = old.files.mv, []

    def slow(*args):
        epoch = new.claim("token", 10)
        move(*args)
        seen.append((epoch, new.chunks("token")))

    monkeypatch.setattr(old.files, "mv", slow)
    with pytest.raises(Superseded):
        old.put("token", 12, b"late")
    assert seen == [(2, [10])], "there, but void"
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.rglob("*.*") if path.is_file()) == ["10.1", "owner.2"]


def test_two_who_claim_at_once_get_two_epochs(tmp_path, monkeypatch):
    first, second = SnapshotStore(str(tmp_path), 2, 3600), SnapshotStore(str(tmp_path), 2, 3600)
    create, got = first._create, []

    def overtaken(*args):
        monkeypatch.undo()
        got.append(second.claim("token", 1))
        create(*args)

    monkeypatch.setattr(first, "_create", overtaken)
    assert (first.claim("token", 1), *got) == (3, 2)
