"""How a broken call is told does not depend on which side of it noticed the break first. Each order is forced."""

from __future__ import annotations

import asyncio
import re
import threading
import time

import grpc
import pytest
from fastar_client import FastarError, ResourceExhausted, ServerUnavailable, StreamLost, connect
from fastar_client import rpc as client_rpc
from fastar_client.errors import BROKEN, from_grpc
from fastar_client.load.relay import Relay
from fastar_client.protocol import ChunkRequest
from fastar_client.rpc import WRITE_FAILED, Ending
from fastar_client.transport import GrpcCall, GrpcTransport
from scripted import Died, ScriptedServer, grpc_server, threaded_server, until
from test_client_session import run

REQUEST = ChunkRequest(7, ("forward",), "a hall", "{}", start=True)
SERVERS = ("UNAVAILABLE", "going down")
KINDS = {"CANCELLED": StreamLost, "INTERNAL": StreamLost, "UNAVAILABLE": StreamLost}
KINDS["RESOURCE_EXHAUSTED"] = ResourceExhausted


class Breaking(ScriptedServer):
    """Ends its call in place of chunk 1: once told to, so that the client can be held while it does."""

    def __init__(self, end: object) -> None:
        super().__init__(faults={1: self.broken})
        self.end, self.asked, self.may = end, threading.Event(), threading.Event()

    def broken(self) -> object:
        self.asked.set()
        assert self.may.wait(10)
        return self.end


async def opened(url: str, server: Breaking) -> tuple[GrpcTransport, GrpcCall]:
    """A call that has had one chunk, while the server is about to break it."""
    transport = GrpcTransport(url)
    await transport.connect(5)
    call = transport.open()
    call.send(REQUEST)
    await call.receive()
    call.send(REQUEST)
    await until(server.asked.is_set)
    await asyncio.sleep(0.02)  # that request's write is over
    return transport, call


def said(call: GrpcCall) -> tuple[str, str]:
    """What gRPC itself says of its end."""
    return client_rpc.status_now(client_rpc.call_of(call._replies))


async def outcome(call: GrpcCall) -> object:
    try:
        return await call.receive()
    except FastarError as error:
        return error


def break_call(end: object, status: grpc.StatusCode, provoke) -> tuple[tuple[str, str], object]:
    """What gRPC and what we say of a call that the server ends. provoke: called with it, and a function that lets the
    server end it."""
    found = []
    server = Breaking(end)
    with threaded_server(server, status=status) as url:

        async def test():
            transport, call = await opened(url, server)
            try:
                await provoke(call, server.may.set)
                told = await outcome(call)
                found.append((said(call), told, url))
            finally:
                server.may.set()
                await call.close()
                await transport.close()

        run(test)
    ((grpcs, told, url),) = found
    if isinstance(told, Exception):
        assert url in str(told)
    return grpcs, told


def write_after_status(hold: float):
    """A request is written when the call is broken and our loop has not heard of it yet: the write's failure comes
    after the server's status, and hides it."""

    async def provoke(call: GrpcCall, end) -> None:
        end()
        time.sleep(hold)  # the loop is held
        call.send(REQUEST)
        await asyncio.sleep(0.1)

    return provoke


def forced(end: object, status: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> object:
    """What is told after `write_after_status`. On a busy machine the client may have to be held longer."""
    for hold in (0.05, 0.1, 0.2, 0.4, 0.8):
        grpcs, told = break_call(end, status, write_after_status(hold))
        if grpcs == WRITE_FAILED:
            return told
    raise AssertionError("no write failed after the status")


async def write_before_status(call: GrpcCall, end) -> None:
    """A write fails before the server's status is there: what grpc.aio does then, as Core does it on no command."""
    client_rpc.call_of(call._replies)._cython_call.set_internal_error("forced")
    asyncio.get_running_loop().call_later(0.05, end)


async def status_alone(call: GrpcCall, end) -> None:
    end()


async def status_and_half_close(call: GrpcCall, end) -> None:
    end()
    time.sleep(0.05)  # the loop is held
    call.half_close()


@pytest.mark.parametrize(("code", "kind"), KINDS.items())
def test_every_order_tells_what_the_server_said(code, kind):
    status = grpc.StatusCode[code]
    end = Died("going down")
    orders = (status_alone, status_and_half_close, write_before_status)
    told = [forced(end, status)] + [break_call(end, status, order)[1] for order in orders]
    assert [type(error) for error in told] == [kind] * 4
    texts = {re.sub(r"127[.]0[.]0[.]1:\d+", "URL", str(error)) for error in told}
    assert len(texts) == 1, texts
    (text,) = texts
    assert "going down" in text
    assert "CANCELLED" not in text
    assert kind is not StreamLost or text.startswith("stream from URL lost: the server or the connection broke it off")


def test_a_server_that_has_finished_was_not_lost():
    assert forced(ScriptedServer.finish) is None


def test_a_connection_that_breaks():
    """Before the first reply nothing was there to be lost; after it, the stream was. Whatever gRPC calls it."""

    async def test():
        for at, writes in ((0, False), (0, True), (2, False), (2, True)):
            server = ScriptedServer(faults={at: ScriptedServer.hang})
            async with grpc_server(server) as there, Relay(there) as relay, connect(relay.url) as c:
                stream = c.stream("a hall")
                for _ in range(at):
                    await anext(stream)
                waiting = asyncio.ensure_future(anext(stream))
                await until(lambda server=server, at=at: len(server.chunks) > at)
                if writes:
                    await stream.act("forward")
                await relay.drop()
                with pytest.raises(FastarError) as lost:
                    await waiting
                with pytest.raises(ServerUnavailable, match="fastar serve"):
                    await c.ready()
            advice = "open a new stream" if at else "fastar serve"
            assert type(lost.value) is (StreamLost if at else ServerUnavailable)
            assert relay.url in str(lost.value)
            assert advice in str(lost.value)

    run(test)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_class_depends_on_no_words(streaming):
    words = ("", "Socket closed", "Stream removed (sendmsg: Broken pipe (32))", "Internal error from Core")
    words += ("recvmsg:Connection reset by peer", "failed to connect to all addresses", "SSL handshake failed")
    for code in BROKEN:
        for details in words:
            error = from_grpc(code, details, "here:1", streaming)
            assert type(error) is (StreamLost if streaming else ServerUnavailable)
            assert "here:1" in str(error)
            assert "CANCELLED" not in str(error)


class Ended:
    """A call to which `set` gives statuses, as grpc.aio's do: the last one stays, the first is announced."""

    def __init__(self) -> None:
        self.status, self.watcher = ("", ""), None

    def add_done_callback(self, watcher) -> None:
        self.watcher = watcher

    def set(self, status: tuple[str, str]) -> None:
        self.status = status
        watcher, self.watcher = self.watcher, None
        if watcher is not None:
            watcher(self)

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode[self.status[0]]

    async def details(self) -> str:
        return self.status[1]


@pytest.mark.parametrize("seen", [1, 2])
@pytest.mark.parametrize(
    ("order", "told"),
    [
        ([SERVERS], SERVERS),
        ([SERVERS, WRITE_FAILED], SERVERS),
        ([WRITE_FAILED, SERVERS], SERVERS),
        ([WRITE_FAILED], WRITE_FAILED),
        ([("INTERNAL", "a fault")], ("INTERNAL", "a fault")),
        ([("OK", ""), WRITE_FAILED], ("OK", "")),
    ],
)
def test_endings(monkeypatch, order, told, seen):
    """seen: how many of the statuses have come when the replies end."""
    monkeypatch.setattr(client_rpc, "STATUS_SECONDS", 0.1)

    class Replies:
        _grpc_call = Ended()

    async def test():
        call = Replies._grpc_call
        ending = Ending(Replies)
        for status in order[:seen]:
            call.set(status)
        raised = grpc.aio.AioRpcError(await call.code(), None, None, details=await call.details())
        for status in order[seen:]:
            asyncio.get_running_loop().call_later(0.02, call.set, status)
        assert await ending.status(Replies, raised) == told

    run(test)


def test_without_the_call_grpcs_own_words_stand():
    async def test():
        raised = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, None, None, details=None)
        assert await Ending(object()).status(object(), raised) == ("UNAVAILABLE", "")

    run(test)
