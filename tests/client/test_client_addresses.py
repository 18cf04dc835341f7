"""Several addresses: the first that answers is used, and a stream whose server drains goes on at the next."""

from __future__ import annotations

import socket

import pytest
from fastar_client import InvalidArgument, ServerUnavailable, connect
from live import LiveServer
from scripted import grpc_server
from test_client_session import run


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_streams_move_on_when_their_server_drains_and_new_ones_follow():
    async def test():
        old, new = LiveServer(cuts={5: "migrate"}), LiveServer()
        new.stored = old.stored  # one store
        async with grpc_server(old) as first, grpc_server(new) as second, connect(f"{first},{second}") as c:
            stream = c.stream("a hall", actions="forward", seed=3)
            numbers = [(await anext(stream)).stats.chunk for _ in range(9)]
            assert numbers == list(range(9))
            assert stream.reconnects == 1
            assert (max(old.made), min(new.made)) == (4, 5), "none was made twice"
            assert c.url == second
            await stream.close()
            asked = len(old.requests)
            async with c.stream("a hall") as later:
                await anext(later)
            assert len(old.requests) == asked
            assert new.resumed == [{"token": stream.token, "chunk": 5}]

    run(test)


def test_the_first_address_that_answers_is_used():
    async def test():
        dead = closed_port()
        async with grpc_server(LiveServer()) as url:
            async with connect(f"{dead}, {url}") as c, c.stream("a hall") as stream:
                assert (await anext(stream)).stats.chunk == 0
                assert c.url == url
            with pytest.raises(ServerUnavailable):
                async with connect(f"{dead},{closed_port()}"):
                    pass

    run(test)


@pytest.mark.parametrize("url", ["", "localhost:8001,", ",localhost:8001", "localhost:8001 localhost:8002"])
def test_wrong_addresses(url):
    with pytest.raises(InvalidArgument, match="several joined by commas"):
        connect(url)
