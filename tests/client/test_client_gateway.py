"""Behind a gateway: a new stream names no pod, a lost one its own, and one whose pod is gone or drains none again."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import grpc
import psutil
import pytest
from fastar_client import connect
from fastar_client.errors import from_grpc
from live import LiveServer
from scripted import ScriptedServer, grpc_server
from test_client_session import run

ONE, TWO = "cG9kLTE=", "cG9kLTI="  # pods, as a gateway calls them


async def play(stream, chunks: int) -> None:
    """`chunks` more."""
    for _ in range(chunks):
        await anext(stream)


def pins(server: ScriptedServer) -> list[str | None]:
    """That its calls have brought, None for none; no other header for a gateway has come."""
    assert not [name for headers in server.headers for name in headers if name == "x-fastar-stream"]
    return [headers.get("x-fastar-pod") for headers in server.headers]


def pins_after(server: LiveServer, *steps: int | Callable[[], object]) -> list[str | None]:
    """Those of one stream that plays so many chunks, calls this, plays on, ..."""

    async def test():
        async with grpc_server(server) as url, connect(url) as c, c.stream("a hall", actions="forward") as stream:
            for step in steps:
                await play(stream, step) if isinstance(step, int) else step()

    run(test)
    return pins(server)


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
def test_a_lost_stream_goes_back_to_its_pod(status):
    async def test():
        server = LiveServer(cuts={3: "before", 6: "after"}, pod=ONE)
        async with grpc_server(server, status) as url, connect(url) as c:
            other = c.stream("a hall", actions="forward")
            stream = c.stream("a hall", actions="forward")
            await play(stream, 9)
            await play(other, 1)
            await asyncio.gather(stream.close(), other.close())
            assert stream.reconnects == 2
        assert pins(server) == [None, ONE, ONE, None], "a new one: where there is room; also where it is not said again"

    run(test)


@pytest.mark.parametrize("cut", ["migrate", "drain"])
def test_a_stream_of_a_pod_that_drains_goes_anywhere(cut):
    assert pins_after(LiveServer(cuts={3: cut}, pod=ONE), 5) == [None, None]


def test_a_pod_that_is_gone_is_named_once():
    server = LiveServer(cuts={3: "before", 6: "before"}, down=1, pod=ONE)
    found = pins_after(server, 5, lambda: setattr(server, "pod", TWO), 4)
    assert found == [None, ONE, None, ONE]


def test_a_pod_that_is_full_is_named_once():
    """Nor is another one that refuses: all attempts go where the gateway finds room."""

    async def test():
        server = LiveServer(cuts={3: "before"}, pod=ONE)
        server.refuse_resume = "RESOURCE_EXHAUSTED: streams: 8 are open; allowed: 8; retry in 1 s"
        async with grpc_server(server) as url, connect(url) as c, c.stream("a hall", actions="forward") as stream:
            await play(stream, 3)
            more = asyncio.create_task(play(stream, 2))
            while len(server.headers) < 4:
                await asyncio.sleep(0.01)
            server.refuse_resume = None
            await more
        assert pins(server)[:4] == [None, ONE, None, None]

    run(test)


def test_a_gateway_that_leads_elsewhere_is_believed():
    """The pin to one pod finds another."""
    server = LiveServer(cuts={3: "before", 6: "before"}, pod=ONE)
    assert pins_after(server, 2, lambda: setattr(server, "pod", TWO), 6) == [None, ONE, TWO]


@pytest.mark.parametrize(
    ("details", "keeps"),
    [("Stream removed (Broken pipe)", True), ("Socket closed", True), ("connection refused", False),
     ("no healthy upstream", False), ("upstream connect error or disconnect/reset before headers", False)],
)  # fmt: skip
def test_a_gateway_that_breaks_does_not_unpin(details, keeps):
    """It may be the gateway alone; a refusal is what one says, or does not say, of a pod that is gone."""
    assert from_grpc("UNAVAILABLE", details, "gateway:8001").broke_off is keeps


def test_without_a_gateway_nothing_is_sent():
    assert pins_after(LiveServer(cuts={3: "before"}), 5) == [None, None]


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
