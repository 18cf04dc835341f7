"""Pods that close or leave behind the shipped gateway: a real Envoy that asks a small DNS server, as the cluster's."""

from __future__ import annotations

import queue
import socket
import struct
import threading

import grpc
import pytest
from fake_api import eventually
from running_envoy import free_ports, gateway
from small_server import STREAM, SmallServer, ask, pins

PODS = ("127.0.0.2", "127.0.0.3")


class Dns:
    """A records of names; `addresses` may change at any time."""

    def __init__(self) -> None:
        self.addresses = {"triton": list(PODS)}
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            try:
                asked, source = self.socket.recvfrom(512)
            except OSError:
                return
            labels, at = [], 12
            while length := asked[at]:
                labels.append(asked[at + 1 : at + 1 + length].decode())
                at += 1 + length
            (kind,) = struct.unpack("!H", asked[at + 1 : at + 3])
            found = self.addresses.get(".".join(labels), []) if kind == 1 else []
            head = asked[:2] + struct.pack("!5H", 0x8180, 1, len(found), 0, 0)
            records = [struct.pack("!3HIH", 0xC00C, 1, 1, 1, 4) + socket.inet_aton(address) for address in found]
            self.socket.sendto(head + asked[12 : at + 5] + b"".join(records), source)


@pytest.fixture
def running(tmp_path):
    dns, ports = Dns(), free_ports(2)
    servers = [SmallServer(address, address, *ports) for address in PODS]
    assert {server.ports for server in servers} == {tuple(ports)}
    with gateway(tmp_path, [tuple(ports)], dns.port) as envoy, grpc.insecure_channel(envoy.url) as channel:
        envoy.wait_for(2)
        yield dns, envoy, channel, servers
    dns.socket.close()
    for server in servers:
        server.stop()


class Live:
    """A stream that goes on."""

    def __init__(self, channel: grpc.Channel, pin: str) -> None:
        self.messages: queue.SimpleQueue = queue.SimpleQueue()
        self.call = channel.stream_stream(STREAM)(
            iter(self.messages.get, None), metadata=[("x-fastar-pod", pin)], timeout=60
        )

    def ask(self) -> str:
        self.messages.put(b"1")
        return next(self.call).decode()

    def end(self) -> None:
        self.messages.put(None)
        assert list(self.call) == []
        assert self.call.code() == grpc.StatusCode.OK


def live_at(channel, pod) -> tuple[dict[str, str], Live]:
    """The pins of both pods, and a stream at one of them."""
    known = pins(channel, 2)
    live = Live(channel, known[pod])
    assert live.ask() == pod
    return known, live


def test_a_closed_pod_gets_no_new_streams_and_keeps_its_own(running):
    _, envoy, channel, servers = running
    closed, left = PODS
    known, live = live_at(channel, closed)
    servers[0].state = "closed"
    envoy.wait_for_open(1)
    assert {ask(channel)[0] for _ in range(30)} == {left}
    assert ask(channel, pod=known[closed])[0] == closed
    assert {live.ask() for _ in range(20)} == {closed}, "its own stream goes on"
    live.end()
    servers[0].state = "open"
    envoy.wait_for_open(2)
    eventually(lambda: ask(channel)[0] == closed)


def test_a_pod_that_leaves_the_service_gets_no_calls_and_keeps_its_streams(running):
    dns, envoy, channel, _ = running
    gone, left = PODS
    known, live = live_at(channel, gone)
    dns.addresses["triton"] = [left]
    envoy.wait_for(1)
    envoy.wait_for_open(1)
    assert {ask(channel)[0] for _ in range(30)} == {left}
    assert ask(channel, pod=known[gone])[0] == left, "a pin to it falls back"
    assert {live.ask() for _ in range(20)} == {gone}
    live.end()
