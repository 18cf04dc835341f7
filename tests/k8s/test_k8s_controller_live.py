"""The controller beside real servers, and a fake API server: what it reads of them, and what they do for it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import signal
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator

import psutil
import pytest
from fake_api import Api, eventually
from fastar_client import Stream, connect
from fastar_controller.health import slowest_tenth
from fastar_controller.scrape import scrape
from fleet import PROMPT, SMALL, alone, digest
from running_controller import controller

from fastar_backend.serve import Server, ServeSettings

pytestmark = pytest.mark.server
pytest.importorskip("kubernetes")
FPS = 9.0  # that viewers were promised; they play at 24
STOPPED, RUNS = 0.5, 0.05  # seconds: a model process that gets a tenth of its time


@pytest.fixture(scope="module")
def servers(tiny_world, tmp_path_factory) -> Iterator[list[Server]]:
    """Two that share their snapshots."""
    settings = ServeSettings(
        http_port=0, grpc_port=0, metrics_port=0, admin_port=0, world=str(tiny_world), device="cpu", threads=1,
        max_streams=4, deterministic=True, snapshots=str(tmp_path_factory.mktemp("store")), attention=SMALL,
    )  # fmt: skip
    both = [Server(settings), Server(settings)]
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(Server.start, both))
        yield both
    finally:
        for server in both:
            server.kill()


@pytest.fixture
def api(servers):
    api = Api()
    for index, server in enumerate(servers):
        api.add(f"triton-{index}", server.ports["metrics"], admin=urllib.parse.urlsplit(server.admin_url).port)
    yield api
    api.stop()


def live(server: Server) -> int:
    return scrape(server.metrics_url, 5.0).streams


def placement(server: Server) -> str:
    """What gateways are told."""
    with urllib.request.urlopen(f"{server.admin_url}/placement", timeout=5) as reply:
        return reply.read().decode().strip()


@contextlib.contextmanager
def slowed(server: Server) -> Iterator[None]:
    """As by a GPU that throttles: its model process runs only a tenth of the time."""
    (process,), over = server.model_processes, threading.Event()

    def slow(process: psutil.Process) -> None:
        while not over.is_set():
            process.send_signal(signal.SIGSTOP)
            over.wait(STOPPED)
            process.send_signal(signal.SIGCONT)
            over.wait(RUNS)

    thread = threading.Thread(target=slow, args=(process,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Viewer:
    """Plays a stream at 24 FPS, as far as it gets that, until it is told to stop."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.digests: list[str] = []
        self.over = False

    async def play(self) -> None:
        async for chunk in self.stream:
            assert chunk.stats.chunk == len(self.digests), "none lost, none doubled"
            self.digests.append(digest(chunk.frames))
            if self.over:
                return
            await asyncio.sleep(chunk.stats.frames / 24)


async def until(what, seconds: float = 30.0) -> None:
    await asyncio.to_thread(eventually, what, seconds)


def test_streams_leave_a_slow_server_and_one_that_is_drained(servers, api):
    """Three begin at the first server, where one stays when it is slow; that one goes when it is drained."""
    slow, other = servers
    before = scrape(slow.metrics_url, 5.0)
    assert (before.streams, before.slots, before.draining) == (0, 4, False)

    async def test(process) -> None:
        async with connect(f"{slow.grpc_url},{other.grpc_url}", reconnect_seconds=30) as c:
            viewers = [Viewer(c.stream(PROMPT, actions="forward", seed=seed)) for seed in range(3)]
            playing = [asyncio.create_task(viewer.play()) for viewer in viewers]
            await until(lambda: api.costs() == {"triton-0": "300", "triton-1": "0"})
            await until(lambda: slowest_tenth(before.rates, scrape(slow.metrics_url, 5.0).rates) is not None)
            assert placement(slow) == "open"
            with slowed(slow):
                await until(lambda: api.opened() == {"triton-1"} and placement(slow) == "closed")
                await until(lambda: (live(slow), live(other)) == (1, 2))
            assert process.metric("moves_total") >= 2  # a busy server may be asked again before it has begun
            await until(lambda: sorted(viewer.stream.reconnects for viewer in viewers) == [0, 1, 1])
            await until(lambda: api.costs() == {"triton-0": "100", "triton-1": "200"})
            await asyncio.to_thread(slow.stop)
            await until(lambda: live(other) == 3 and api.costs()["triton-1"] == "300")
            assert api.opened() == {"triton-1"}
            await until(lambda: [viewer.stream.reconnects for viewer in viewers] == [1, 1, 1])
            seen = [len(viewer.digests) for viewer in viewers]
            await until(lambda: all(len(v.digests) > n for v, n in zip(viewers, seen, strict=True)))
            for viewer in viewers:
                viewer.over = True
            await asyncio.gather(*playing)
        for viewer in viewers:
            assert viewer.digests == await alone(other, viewers.index(viewer), len(viewer.digests))

    with controller(api, target=FPS, window=3, hold=0.5, move_every=3) as process:
        asyncio.run(asyncio.wait_for(test(process), 120))
        eventually(lambda: api.costs()["triton-1"] == "0")
