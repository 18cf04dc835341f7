"""The blocking twin, against a gRPC server in another thread."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
from fastar_client import InvalidArgument, NotFound, ServerUnavailable, connect_blocking
from live import LiveServer
from scripted import ScriptedServer, threaded_server


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastar-client"]


@pytest.fixture
def server(request):
    return LiveServer() if request.function is test_steering else ScriptedServer()


@pytest.fixture
def url(server):
    with threaded_server(server) as at:
        yield at
    assert not client_threads()


def test_a_loop_over_frames(server, url):
    with connect_blocking(url) as c:
        assert c.ready()
        assert c.world().name == "test"
        stream = c.stream("a hall", actions="forward", frames=10)
        chunks = list(stream)
        assert stream.world.name == "test"
    frames = np.concatenate([chunk.frames for chunk in chunks])
    assert (frames[:, 0, 0, 0] == np.arange(10)).all()
    assert len(server.ends) == 1


def test_steering(server, url):
    with connect_blocking(url) as c, c.stream("a hall", actions=["a", "b", "c", "d"]) as stream:
        assert next(stream).actions == ("a", "b")
        receipts = [stream.act("turn_left"), stream.prompt("a swamp"), stream.set_density(0.5), stream.snapshot()]
        refused = stream.rewind(500)
        assert [receipt.id for receipt in (*receipts, refused)] == [1, 2, 3, 4, 5]
        for receipt in receipts:
            receipt.received()
        with pytest.raises(InvalidArgument, match="rewind"):
            refused.applied()
        stream.pause()
        stream.play()
        taken = [next(stream) for _ in range(6)]
        turned = receipts[0].applied()
        assert taken[turned - 1].actions == ("turn_left",)
        assert {"id": 2, "prompt": "a swamp"} in taken[turned - 1].controls
        assert stream.actions == "turn_left"
        token, snapshot = stream.token, receipts[3].applied()
        with c.fork(token, snapshot) as fork:
            assert next(fork).stats.chunk == snapshot


@pytest.mark.parametrize("way", ["break", "exception", "context", "connection"])
def test_every_way_out_ends_the_sequence(server, url, way):
    with contextlib.suppress(ZeroDivisionError), connect_blocking(url) as c:
        if way == "context":
            with c.stream("a hall") as stream:
                next(stream)
        elif way == "connection":
            next(c.stream("a hall"))
        else:
            for _ in c.stream("a hall"):
                if way == "break":
                    break
                raise ZeroDivisionError
            assert len(server.ends) == 1
    assert [end.actions for end in server.ends] == [("end",)]


def test_errors(server, url):
    server.faults[1] = "NOT_FOUND: stream: gone"
    with connect_blocking(url) as c:
        with pytest.raises(InvalidArgument, match="^frames"):
            c.stream("a hall", frames=0)
        taken = []
        with pytest.raises(NotFound, match="stream: gone"):
            taken.extend(c.stream("a hall"))
        taken = iter(c.stream("a hall"))
        next(taken)
        taken.close()
        with pytest.raises(StopIteration):
            next(taken)
    with pytest.raises(RuntimeError, match="connect_blocking"):
        c.ready()


def test_nothing_listens():
    with pytest.raises(ServerUnavailable, match="fastar serve"), connect_blocking("127.0.0.1:9"):
        pass
    assert not client_threads()
