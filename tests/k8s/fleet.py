"""Three real servers with one Redis behind the gateway that ships, and viewers who stay while servers come and go."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fastar_client import connect
from fastar_client.transport import Call, GrpcTransport
from running_envoy import Gateway, free_ports, gateway
from running_redis import running_redis

from fastar_backend.serve import Server, ServeSettings

PROMPT = "a dark maze"
SMALL = {"kind": "fastar", "budget_frames": 4, "recent_frames": 2}  # latent frames: little work


class Fleet:
    """Servers at fixed ports, so that one that starts anew is the same to the gateway: a pod's address."""

    def __init__(self, folder: Path, redis: str, world: str, count: int = 3, **settings: object) -> None:
        """settings: of each server, in place of what follows."""
        values: dict[str, object] = {
            "http_port": 0, "metrics_port": 0, "world": world, "device": "cpu", "threads": 1, "attention": SMALL,
            "deterministic": True, "snapshots": redis, "snapshot_chunks": 8, "exit_timeout": 30,
        }  # fmt: skip
        self.folder = folder
        ports = iter(free_ports(2 * count))
        self.ports = [(next(ports), next(ports)) for _ in range(count)]
        self.settings = [
            ServeSettings(**values | settings | {"grpc_port": port, "admin_port": admin}) for port, admin in self.ports
        ]
        self.servers: list[Server] = [Server(settings) for settings in self.settings]
        self.gateway: Gateway | None = None
        self._gateways = contextlib.ExitStack()

    def start(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(Server.start, self.servers))
        self.new_gateway()

    def stop(self) -> None:
        self._gateways.close()
        for server in self.servers:
            server.kill()

    def new_gateway(self) -> None:
        """Another Envoy at the same address; then the one before is ended, and so are all connections through it."""
        self.folder.joinpath(name := f"envoy-{time.monotonic_ns()}").mkdir()
        port = self.gateway and self.gateway.port
        stack = contextlib.ExitStack()
        self.gateway = stack.enter_context(gateway(self.folder / name, self.ports, port=port))
        self.gateway.wait_for(len(self.servers))
        self._gateways.close()
        self._gateways = stack

    def pod(self, index: int) -> str:
        """As the gateway calls it."""
        return base64.b64encode(self.servers[index].grpc_url.encode()).decode()

    def drain(self, index: int) -> None:
        """As by SIGTERM. Returns when the server has ended."""
        self.servers[index].stop()

    def kill(self, index: int) -> None:
        """SIGKILL to all its processes."""
        self.servers[index].kill()

    def restart(self, index: int) -> None:
        """Returns when the gateway sends calls there again."""
        self.servers[index] = Server(self.settings[index])
        self.servers[index].start()
        self.gateway.wait_for(len(self.servers))


@contextlib.contextmanager
def running_fleet(folder: Path, world: str, **settings: object) -> Iterator[Fleet]:
    with running_redis(folder) as redis:
        fleet = Fleet(folder, redis.url, world, **settings)
        try:
            fleet.start()
            yield fleet
        finally:
            fleet.stop()


class Watched(GrpcTransport):
    """Remembers its calls of streams: (pin that was sent, call)."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.calls: list[tuple[str | None, Call]] = []

    def open(self, metadata=None, fresh=False) -> Call:
        self.calls.append(((metadata or {}).get("x-fastar-pod"), super().open(metadata, fresh)))
        return self.calls[-1][1]

    @property
    def pod(self) -> str:
        """Where the newest call went: a gateway that sent it where it was pinned to says nothing."""
        pinned, call = self.calls[-1]
        return call.pod or pinned or ""


class Viewer:
    """Plays a stream at one chunk in `period` seconds, until it is told to stop, and checks that none is lost or
    doubled."""

    def __init__(self, url: str, seed: int, period: float) -> None:
        self.seed, self.period = seed, period
        self.digests: list[str] = []  # of the chunks' frames
        self.arrivals: list[float] = []  # time.monotonic
        self.transport = Watched(url)
        self.reconnects = 0
        self.over = False

    async def play(self) -> None:
        async with connect(transport=self.transport, reconnect_seconds=60) as c:
            stream = c.stream(PROMPT, actions="forward", seed=self.seed)
            async for chunk in stream:
                assert chunk.stats.chunk == len(self.digests), "none lost, none doubled"
                self.digests.append(digest(chunk.frames))
                self.arrivals.append(chunk.received_at)
                self.reconnects = stream.reconnects
                if self.over:
                    return
                await asyncio.sleep(self.period)

    @property
    def pod(self) -> str:
        return self.transport.pod

    def gap(self, since: float) -> float:
        """Most seconds between two chunks, of which the later one came after `since`."""
        times = np.array(self.arrivals)
        return float(np.diff(times)[times[1:] > since].max())


class Audience:
    """All viewers, in one event loop. `async with`; leaving ends their streams, and raises what any of them has met."""

    def __init__(self, fleet: Fleet, count: int, period: float) -> None:
        self.fleet, self.period = fleet, period
        self.viewers = [Viewer(fleet.gateway.url, seed, period) for seed in range(1, count + 1)]
        self.tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Audience:
        for viewer in self.viewers:  # one after the other, so that the gateway knows where there is room
            self.tasks.append(asyncio.create_task(viewer.play()))
            await self.see(1, [viewer])
        return self

    async def __aexit__(self, *exc: object) -> None:
        for viewer in self.viewers:
            viewer.over = True
        await asyncio.gather(*self.tasks)

    async def see(self, more: int, viewers: list[Viewer] | None = None) -> None:
        """Until each of these (None: all) has got so many more chunks."""
        viewers = self.viewers if viewers is None else viewers
        goals = [len(viewer.digests) + more for viewer in viewers]
        async with asyncio.timeout(60 + 2 * more * self.period):
            while any(len(viewer.digests) < goal for viewer, goal in zip(viewers, goals, strict=True)):
                await asyncio.sleep(0.02)
                for task in self.tasks:
                    if task.done():
                        task.result()

    def pods(self) -> list[str]:
        return [viewer.pod for viewer in self.viewers]

    async def during(self, act, *arguments) -> tuple[list[Viewer], list[float]]:
        """The viewers whose stream moved while `act` ran in a thread, and until all had got three chunks more; their
        longest gaps, in seconds."""
        since, before = time.monotonic(), [viewer.reconnects for viewer in self.viewers]
        await asyncio.to_thread(act, *arguments)
        await self.see(3)
        moved = [viewer for viewer, count in zip(self.viewers, before, strict=True) if viewer.reconnects > count]
        return moved, [viewer.gap(since) for viewer in moved]


def digest(frames: np.ndarray) -> str:
    return hashlib.blake2b(frames.tobytes(), digest_size=16).hexdigest()


async def alone(server: Server, seed: int, chunks: int) -> list[str]:
    """Digests of the stream as it is when nothing happens to it."""
    found = []
    async with connect(server.grpc_url) as c:
        async for chunk in c.stream(PROMPT, actions="forward", seed=seed):
            found.append(digest(chunk.frames))
            if len(found) == chunks:
                break
    return found
