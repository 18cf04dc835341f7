"""Two real servers with one store: one is drained under its streams, which go on at the other."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import FREE_PORTS, SMALL
from fastar_client import ServerUnavailable, connect
from serve_raw import Refused, Stream, metric, until

from fastar_backend.serve import Server, ServeSettings

pytestmark = pytest.mark.server

PROMPT = "walking through a maze"
EXIT = 30.0  # seconds; a drain takes far less
CHUNKS, PERIOD = 16, 0.1  # seconds that a viewer takes to show one


def start(world, store) -> Server:
    values = {"world": str(world), "device": "cpu", "attention": SMALL, "deterministic": True, "threads": 1}
    settings = ServeSettings(
        **FREE_PORTS, **values, max_streams=4, snapshots=str(store), exit_timeout=EXIT, admin_port=0
    )
    server = Server(settings)
    server.start()
    return server


@pytest.fixture(scope="module")
def stays(tiny_world, tmp_path_factory):
    """The server that streams go on at."""
    server = start(tiny_world, tmp_path_factory.mktemp("store"))
    yield server
    server.stop()


@pytest.fixture
def goes(tiny_world, stays):
    server = start(tiny_world, stays.settings.service.snapshots)
    yield server
    server.kill()


def run(test):
    async def limited():
        async with asyncio.timeout(60):
            return await test()

    return asyncio.run(limited())


def both(goes, stays) -> str:
    return f"{goes.grpc_url},{stays.grpc_url}"


async def play(stream, chunks: int, arrivals: list[float] | None = None, steer=None) -> list[np.ndarray]:
    frames = []
    async for chunk in stream:
        assert chunk.stats.chunk == len(frames), "none lost, none doubled"
        frames.append(chunk.frames)
        if arrivals is not None:
            arrivals.append(chunk.received_at)
        if steer is not None:
            await steer(stream, len(frames))
        if len(frames) == chunks:
            break
    return frames


def alone(server, chunks: int, seed: int, steer=None) -> list[np.ndarray]:
    async def test():
        async with connect(server.grpc_url) as c:
            return await play(c.open(c.stream(PROMPT, seed=seed).options, "forward", in_flight=1), chunks, steer=steer)

    return run(test)


def ready(server) -> bool:
    async def ask() -> bool:
        async with connect(server.grpc_url) as c:
            return await c.ready()

    with contextlib.suppress(ServerUnavailable):
        return asyncio.run(ask())
    return False


def has_moved(server) -> bool:
    with contextlib.suppress(TypeError):  # not on the page yet
        return metric(server, "fastar_migration_seconds_count") == 1
    return False


def drain(server) -> threading.Thread:
    thread = threading.Thread(target=server.stop)
    thread.start()
    return thread


def same(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert np.array_equal(a, b), number


def test_four_streams_go_on_at_the_other_server(goes, stays, record_property, caplog):
    caplog.set_level("INFO", logger="fastar.serve")
    arrivals = [[] for _ in range(4)]
    took = []

    async def watch(stream, taken: int) -> None:
        await asyncio.sleep(PERIOD)

    async def test():
        async with connect(both(goes, stays), reconnect_seconds=20) as c:
            streams = [c.stream(PROMPT, actions="forward", seed=seed) for seed in range(4)]
            playing = [asyncio.create_task(play(s, CHUNKS, a, watch)) for s, a in zip(streams, arrivals, strict=True)]
            while min(map(len, arrivals)) < 6:
                await asyncio.sleep(0.01)
                for task in playing:
                    if task.done():
                        task.result()
            began = time.monotonic()
            await asyncio.to_thread(goes.stop)
            took.append(time.monotonic() - began)
            frames = await asyncio.gather(*playing)
            assert [s.reconnects for s in streams] == [1] * 4
            return frames

    frames = run(test)
    for seed, ours in enumerate(frames):
        same(ours, alone(stays, CHUNKS, seed))
    assert "drained: 4 streams" in caplog.text
    gaps = [max(np.diff(times)) for times in arrivals]
    record_property("gaps", [float(gap) for gap in gaps])
    print(f"largest gaps between chunks: {[round(float(gap), 3) for gap in gaps]} s; drained in {took[0]:.2f} s")
    assert took[0] < EXIT / 3
    assert max(gaps) < 5


def test_idle_paused_and_blending_streams_go_on(goes, stays):
    async def blend(stream, taken: int) -> None:
        if taken == 3:
            await (await stream.prompt("a green cavern", 6)).received()

    async def test():
        async with connect(both(goes, stays), reconnect_seconds=20) as c:
            options = [c.stream(PROMPT, seed=seed).options for seed in (1, 2, 3)]
            idle, paused, blending = [c.open(one, "forward", in_flight=1) for one in options]
            got = {name: [] for name in ("idle", "paused", "blending")}
            for name, stream in (("idle", idle), ("paused", paused), ("blending", blending)):
                for _ in range(5):
                    chunk = await anext(stream)
                    got[name].append(chunk.frames)
                    if name == "blending":
                        await blend(stream, len(got[name]))
            await (await paused.pause()).received()
            await asyncio.to_thread(goes.stop)
            await paused.play()
            for name, stream in (("idle", idle), ("paused", paused), ("blending", blending)):
                while len(got[name]) < 10:
                    chunk = await anext(stream)
                    assert chunk.stats.chunk == len(got[name])
                    got[name].append(chunk.frames)
            return got

    got = run(test)
    same(got["idle"], alone(stays, 10, 1))
    same(got["paused"], alone(stays, 10, 2))
    same(got["blending"], alone(stays, 10, 3, blend))


def ask_to_move(server, path: str) -> int:
    request = urllib.request.Request(f"{server.admin_url}{path}", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_two_of_three_streams_are_sent_on_and_the_server_goes_on(goes, stays):
    async def test():
        async with connect(both(goes, stays), reconnect_seconds=20) as c:
            streams = [c.open(c.stream(PROMPT, seed=seed).options, "forward", in_flight=1) for seed in range(3)]
            frames = [[(await anext(stream)).frames for _ in range(3)] for stream in streams]
            assert [await asyncio.to_thread(ask_to_move, goes, f"/move?streams={n}") for n in ("0", "201", "x")] == [
                400, 400, 404
            ]  # fmt: skip
            assert await asyncio.to_thread(ask_to_move, goes, "/move?streams=2") == 202
            await asyncio.to_thread(until, lambda: metric(goes, "fastar_streams_active") == 1, 10)
            for stream, own in zip(streams, frames, strict=True):
                while len(own) < 8:
                    chunk = await anext(stream)
                    assert chunk.stats.chunk == len(own)
                    own.append(chunk.frames)
            assert [stream.reconnects for stream in streams] == [0, 1, 1], "the newest"
            assert await asyncio.to_thread(ready, goes)
            return frames

    for seed, ours in enumerate(run(test)):
        same(ours, alone(stays, 8, seed))
    address = goes.admin_url
    goes.kill()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=5)


def test_not_ready_no_new_streams_and_metrics(goes, stays):
    with Stream(goes.grpc_url) as idle:
        idle.chunk(prompt=PROMPT, start=True)
        thread = drain(goes)

        assert until(lambda: not ready(goes), 5)
        assert until(lambda: metric(goes, "fastar_draining") == 1, 2)
        assert until(lambda: has_moved(goes), 2)
        with Stream(goes.grpc_url) as late, pytest.raises(Refused, match="stopping|stopped accepting|drains"):
            late.chunk(prompt=PROMPT, start=True)
        with pytest.raises(Refused) as refused:  # no x-fastar-migrate: it would not know what is meant
            idle.chunk()
        assert refused.value.code == "UNAVAILABLE"
        thread.join(EXIT / 2)
        assert not thread.is_alive()
