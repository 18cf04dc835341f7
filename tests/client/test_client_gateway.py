"""Behind a gateway: a new stream names no pod, a lost one its own, and one whose pod is gone or drains none again."""

from __future__ import annotations

import asyncio
import gc

import grpc
import psutil
import pytest
from fastar_client import connect
from fastar_client.recovery import Pin
from live import LiveServer
from scripted import ScriptedServer, grpc_server
from test_client_session import run


async def play(stream, chunks: int) -> None:
    """`chunks` more."""
    for _ in range(chunks):
        await anext(stream)


def gateway_headers(server: ScriptedServer) -> list[dict[str, str]]:
    names = ("x-fastar-stream", "x-fastar-pod")
    return [{name: headers[name] for name in names if name in headers} for headers in server.headers]


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
def test_a_lost_stream_goes_back_to_its_pod(status):
    async def test():
        server = LiveServer(cuts={3: "before", 6: "after"}, pod="cG9kLTE=")
        async with grpc_server(server, status) as url, connect(url) as c:
            other = c.stream("a hall", actions="forward")
            stream = c.stream("a hall", actions="forward")
            await play(stream, 9)
            await play(other, 1)
            await asyncio.gather(stream.close(), other.close())
            assert stream.reconnects == 2
        first, *back, second = gateway_headers(server)
        assert first == second == {}, "new: where there is room"
        assert len(back) == 2
        assert back[0] == back[1], "also where the gateway did not say it again"
        assert back[0]["x-fastar-pod"] == "cG9kLTE="
        assert stream.token not in back[0]["x-fastar-stream"]

    run(test)


@pytest.mark.parametrize("cut", ["migrate", "drain"])
def test_a_stream_of_a_pod_that_drains_goes_anywhere(cut):
    async def test():
        server = LiveServer(cuts={3: cut}, pod="cG9kLTE=")
        async with grpc_server(server) as url, connect(url) as c, c.stream("a hall", actions="forward") as stream:
            await play(stream, 5)
        assert gateway_headers(server) == [{}, {}]

    run(test)


def test_a_pod_that_is_gone_is_named_once():
    async def test():
        server = LiveServer(cuts={3: "before", 6: "before"}, down=1, pod="cG9kLTE=")
        async with grpc_server(server) as url, connect(url) as c, c.stream("a hall", actions="forward") as stream:
            await play(stream, 5)
            server.pod = "cG9kLTI="
            await play(stream, 4)
        found = [headers.get("x-fastar-pod") for headers in gateway_headers(server)]
        assert found == [None, "cG9kLTE=", None, "cG9kLTE="]

    run(test)


def test_full_servers_are_got_past_by_new_ids():
    """A gateway that counts its calls may lead to a full server again and again."""

    async def test():
        server = LiveServer(cuts={3: "migrate"}, pod="cG9kLTE=")
        server.refuse_resume = "RESOURCE_EXHAUSTED: streams: 8 are open; allowed: 8; retry in 1 s"
        async with grpc_server(server) as url, connect(url) as c, c.stream("a hall", actions="forward") as stream:
            await play(stream, 3)
            more = asyncio.create_task(play(stream, 2))
            while len(server.headers) < 6:
                await asyncio.sleep(0.01)
            server.refuse_resume = None
            await more
        found = gateway_headers(server)
        assert found[:2] == [{}, {}]
        assert all("x-fastar-pod" not in headers for headers in found)
        ids = [headers.get("x-fastar-stream") for headers in found[1:6]]
        assert [i is None for i in ids] == [True, False, True, False, True]
        assert ids[1] != ids[3]

    run(test)


def test_where_a_hash_has_led_is_gone_back_to():
    pin = Pin()
    pin.note("pod-1")
    pin.leave(full=True)
    assert set(pin.headers) == {"x-fastar-stream"}
    pin.note("pod-2")
    assert pin.headers["x-fastar-pod"] == "pod-2"
    pin.leave(full=False)
    assert pin.headers == {}


def test_a_gateway_that_leads_elsewhere_is_believed():
    async def test():
        server = LiveServer(cuts={3: "before", 6: "before"}, pod="cG9kLTE=")
        async with grpc_server(server) as url, connect(url) as c, c.stream("a hall", actions="forward") as stream:
            await play(stream, 2)
            server.pod = "cG9kLTI="  # the pin to pod 1 finds pod 2
            await play(stream, 6)
        assert [headers.get("x-fastar-pod") for headers in gateway_headers(server)] == [None, "cG9kLTE=", "cG9kLTI="]

    run(test)


def test_without_a_gateway_nothing_is_sent():
    async def test():
        server = LiveServer(cuts={3: "before"})
        async with grpc_server(server) as url, connect(url) as c, c.stream("a hall", actions="forward") as stream:
            await play(stream, 5)
        assert gateway_headers(server) == [{}, {}]

    run(test)


def test_a_closed_stream_and_connection_let_go_of_their_sockets():
    """At once, and not when Python collects its garbage: many short visits would use up the sockets."""

    async def test():
        server = LiveServer()
        async with grpc_server(server) as url:
            port = int(url.rpartition(":")[2])
            for _ in range(8):
                async with connect(url) as c, c.stream("a hall", actions="forward") as stream:
                    await play(stream, 2)
            await asyncio.sleep(0.1)
            ours = [link for link in psutil.Process().net_connections("tcp") if link.raddr and link.raddr[1] == port]
            assert [link for link in ours if link.status == "ESTABLISHED"] == []

    gc.disable()
    try:
        run(test)
    finally:
        gc.enable()
