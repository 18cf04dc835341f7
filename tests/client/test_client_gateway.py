"""Behind a gateway: a new stream names no pod, a lost one its own, and one whose pod is gone or drains none again."""

from __future__ import annotations

import asyncio
import gc

import grpc
import psutil
import pytest
from fastar_client import connect
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
