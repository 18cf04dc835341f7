"""Closed pods behind the shipped gateway: a real Envoy that asks a small DNS server, as it asks the cluster's."""

from __future__ import annotations

import concurrent.futures
import queue
import secrets
import socket
import struct
import threading

import grpc
import pytest
from fake_api import eventually
from running_envoy import free_ports, gateway

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
PODS = ("127.0.0.2", "127.0.0.3")


class Dns:
    """A records of names; `addresses` may change at any time."""

    def __init__(self) -> None:
        self.addresses = {"triton": list(PODS), "triton-open": list(PODS)}
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
    dns, (port,) = Dns(), free_ports(1)
    servers = []
    for address in PODS:
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(8))
        streams = grpc.stream_stream_rpc_method_handler(
            lambda messages, _, name=address: (name.encode() for _ in messages)
        )
        health = grpc.unary_unary_rpc_method_handler(lambda *_: b"\x08\x01")
        for service, method, handler in (
            ("inference.GRPCInferenceService", "ModelStreamInfer", streams),
            ("grpc.health.v1.Health", "Check", health),
        ):
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        assert server.add_insecure_port(f"{address}:{port}") == port
        server.start()
        servers.append(server)
    with gateway(tmp_path, [port], dns.port) as envoy, grpc.insecure_channel(envoy.url) as channel:
        envoy.wait_for(2)
        yield dns, envoy, channel
    dns.socket.close()
    for server in servers:
        server.stop(None).wait()


def ask(channel: grpc.Channel, **headers: str) -> tuple[str, str]:
    """The server's address; the pin that came back."""
    metadata = [(f"x-fastar-{name}", value) for name, value in headers.items()]
    call = channel.stream_stream(STREAM)(iter([b"1"]), metadata=metadata, timeout=10)
    (answer,) = list(call)
    return answer.decode(), dict(call.initial_metadata()).get("x-fastar-pod", "")


def test_a_closed_pod_gets_no_new_streams_and_keeps_its_own(running):
    dns, envoy, channel = running
    closed, left = PODS
    pins = {}
    eventually(lambda: pins.update([ask(channel)]) or len(pins) == 2)

    messages: queue.SimpleQueue = queue.SimpleQueue()
    messages.put(b"1")
    metadata = [("x-fastar-pod", pins[closed])]
    call = channel.stream_stream(STREAM)(iter(messages.get, None), metadata=metadata, timeout=60)
    assert next(call).decode() == closed

    dns.addresses["triton-open"] = [left]
    members = 'envoy_cluster_membership_total{envoy_cluster_name="triton-any"} 1'
    eventually(lambda: members in envoy.get("/stats/prometheus"))
    assert {ask(channel)[0] for _ in range(30)} == {left}
    assert ask(channel, pod=pins[closed])[0] == left, "a pin alone finds open pods only"
    assert ask(channel, pod=pins[closed], stream=secrets.token_hex(8))[0] == closed
    for _ in range(20):
        messages.put(b"1")
        assert next(call).decode() == closed, "its own stream goes on"
    messages.put(None)
    assert list(call) == []
    assert call.code() == grpc.StatusCode.OK

    dns.addresses["triton-open"] = list(PODS)
    eventually(lambda: ask(channel)[0] == closed)
