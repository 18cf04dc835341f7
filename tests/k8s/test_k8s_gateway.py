"""The gateway that ships, as a real Envoy in front of three small gRPC servers: who gets which stream."""

from __future__ import annotations

import collections
import contextlib
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import grpc
import policy
import pytest
from running_envoy import WORKERS, gateway
from small_server import STREAM, SmallServer, ask, pins


@pytest.fixture(scope="module")
def servers():
    servers = [SmallServer(f"triton-{index}") for index in range(3)]
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def running(servers, tmp_path_factory):
    with gateway(tmp_path_factory.mktemp("envoy"), [server.ports for server in servers]) as running:
        running.wait_for(3)
        yield running


@pytest.fixture(scope="module")
def channel(running):
    with grpc.insecure_channel(running.url) as channel:
        yield channel


def test_a_stream_comes_back_to_its_server(channel):
    streams = [secrets.token_hex(8) for _ in range(60)]
    first = {stream: ask(channel, stream=stream)[0] for stream in streams}
    assert all(ask(channel, stream=stream)[0] == first[stream] for stream in streams)
    assert min(collections.Counter(first.values()).values()) >= 8, "and the servers share the work"
    assert len(set(first.values())) == 3


@contextlib.contextmanager
def live_calls(channel: grpc.Channel, count: int, **headers: str) -> Iterator[list[str]]:
    """Opens so many streams one after the other; the names of their servers."""
    metadata = [(f"x-fastar-{name}", value) for name, value in headers.items()]
    stop, calls, names = threading.Event(), [], []

    def messages():
        yield b"1"
        stop.wait(20)

    try:
        for _ in range(count):
            calls.append(channel.stream_stream(STREAM)(messages(), metadata=metadata, timeout=30))
            names.append(next(calls[-1]).decode())  # it is there before the next one comes
        yield names
    finally:
        stop.set()
        for call in calls:
            with contextlib.suppress(grpc.RpcError):  # its server may be gone
                list(call)


def test_calls_without_an_id_go_where_there_is_room(channel):
    """Twelve live streams at a time, on three servers: four each."""
    with live_calls(channel, 12) as names:
        assert collections.Counter(names) == {f"triton-{index}": 4 for index in range(3)}


def test_a_call_that_went_back_to_its_server_counts_there(channel):
    """Six went by pins to one server, as resumes do: the next twelve find the two others."""
    known = pins(channel, 3)
    with live_calls(channel, 6, pod=known["triton-1"], stream="an-id") as back, live_calls(channel, 12) as names:
        assert set(back) == {"triton-1"}
        assert collections.Counter(names) == {"triton-0": 6, "triton-2": 6}


def test_full_and_closed_servers_get_no_new_streams_while_another_is_open(running, channel, servers):
    """Their own come back to them; and if none is open, the least busy is asked: it knows why it refuses."""
    known = pins(channel, 3)
    servers[0].state, servers[2].state = "full", "closed"
    try:
        running.wait_for_open(1)
        with live_calls(channel, 5) as names:
            assert set(names) == {"triton-1"}
            assert ask(channel)[0] == "triton-1"
            for name, pin in known.items():
                assert ask(channel, pod=pin)[0] == name
            servers[1].state = "full"
            running.wait_for_open(0)
            assert {ask(channel)[0] for _ in range(20)} == {"triton-0", "triton-2"}
    finally:
        for server in servers:
            server.state = "open"
    running.wait_for_open(3)


def test_a_pin_comes_before_the_hash(channel):
    stream = secrets.token_hex(8)
    hashed, _ = ask(channel, stream=stream)
    for name, pin in pins(channel, 3).items():
        assert ask(channel, pod=pin) == (name, "")
        assert ask(channel, stream=stream, pod=pin) == (name, "")
    assert ask(channel, stream=stream)[0] == hashed


@pytest.mark.parametrize("pin", ["MTAuMC4wLjE6ODAwMQ==", "not base64 at all", "MTI3LjAuMC4xOjIy"])
def test_a_pin_to_no_server_falls_back(channel, pin):
    """Also: nobody reaches an address of his choice through the gateway (the last one is 127.0.0.1:22)."""
    assert ask(channel, pod=pin)[0] in pins(channel, 3)
    assert ask(channel, stream=secrets.token_hex(8), pod=pin)[0] in pins(channel, 3)


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "SystemSharedMemoryRegister", "ModelInfer", "TraceSetting"])
def test_viewers_reach_no_more_than_they_need(channel, method):
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"", timeout=10)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_the_status_port_shows_metrics_and_no_more(running):
    text = running.get("/stats/prometheus")
    assert not [name for name in policy.ENVOY if f"\n{name}{{" not in text]
    running.get("/ready")
    for path in ("/quitquitquit", "/config_dump"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(urllib.request.Request(f"{running.status}{path}", method="POST"), timeout=5)


def test_calls_pass_over_a_server_that_has_just_gone(servers, tmp_path):
    """As nothing is known of it yet, and it has the fewest calls; also a pin to it."""
    gone = SmallServer("gone")
    with gateway(tmp_path, [gone.ports, *(server.ports for server in servers)]) as running:
        running.wait_for(4)
        with grpc.insecure_channel(running.url) as channel:
            pin = pins(channel, 4)[gone.name]
            with live_calls(channel, 8):
                gone.stop()
                names = [ask(channel)[0] for _ in range(12)]
                names += [ask(channel, stream=secrets.token_hex(8), pod=pin)[0] for _ in range(12)]
                assert gone.name not in names


def test_the_last_server_gets_all_calls(servers, tmp_path):
    """Though it has the most, and nearly all others are gone."""
    gone = [SmallServer(f"gone-{index}") for index in range(3)]
    with gateway(tmp_path, [server.ports for server in (servers[1], *gone)]) as running:
        running.wait_for(4)
        for server in gone:
            server.stop()
        running.wait_for(1)
        time.sleep(WORKERS)
        with grpc.insecure_channel(running.url) as channel, live_calls(channel, 4):
            assert {ask(channel)[0] for _ in range(8)} == {servers[1].name}
            assert {ask(channel, stream=secrets.token_hex(8))[0] for _ in range(8)} == {servers[1].name}


def test_a_lost_server_moves_its_streams_and_no_others(running, channel, servers):
    """Last: it takes a server away."""
    streams = [secrets.token_hex(8) for _ in range(90)]
    before = {stream: ask(channel, stream=stream) for stream in streams}
    lost = servers[0]
    lost.stop()
    running.wait_for(2)
    with contextlib.suppress(grpc.RpcError):
        ask(channel)  # a connection that was still in the pool
    after = {stream: ask(channel, stream=stream)[0] for stream in streams}
    others = [stream for stream in streams if before[stream][0] != lost.name]
    assert others
    assert sum(after[stream] != before[stream][0] for stream in others) <= 1  # MAGLEV: very few, RING_HASH: more
    assert lost.name not in after.values()
    stream = next(stream for stream in streams if before[stream][0] == lost.name)
    assert ask(channel, stream=stream, pod=before[stream][1])[0] in after.values(), "a pin to it falls back"
