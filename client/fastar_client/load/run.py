"""Plays planned streams against a server from one process, each over a connection of its own, and records them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable

from fastar_client.controls import Receipt
from fastar_client.errors import FastarError, InvalidArgument, ResourceExhausted
from fastar_client.load.plan import PlannedStream
from fastar_client.load.record import (
    COMPLETED,
    DISCONNECTED,
    FAILED,
    INTERRUPTED,
    REJECTED,
    RUNNING,
    STARVED,
    ChunkTime,
    ControlTime,
    StreamRecord,
)
from fastar_client.load.relay import Relay
from fastar_client.load.scenario import Scenario
from fastar_client.load.viewer import ViewerTransport
from fastar_client.protocol import Chunk, StreamOptions, World
from fastar_client.session import Connection, connect
from fastar_client.stream import Stream
from fastar_client.transport import TlsFiles

LAG_SECONDS = 0.05  # how often the process checks that it is not itself late


@dataclasses.dataclass(frozen=True)
class Target:
    """Where to, and how to connect. Parameters as `connect`."""

    url: str
    timeout: float = 60.0
    connect_timeout: float = 5.0
    reconnect_seconds: float = 30.0
    tenant: str | None = None
    tls: bool | TlsFiles = False

    def connection(self, relay: Relay | None = None, seconds: float = math.inf) -> Connection:
        """relay: through it, and then without taking up again what is lost; seconds: the most to connect in. Raises
        InvalidArgument."""
        return connect(
            timeout=self.timeout,
            connect_timeout=min(self.connect_timeout, seconds),
            reconnect_seconds=self.reconnect_seconds if relay is None else 0,
            tenant=self.tenant,
            transport=ViewerTransport(self.url, self.tls, relay),
        )


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the first stream to a server told, before the test."""

    world: World
    cold_ttfc_seconds: float


async def probe(target: Target, scenario: Scenario) -> Probe:
    """One stream of one chunk: whatever the server does at its first stream only is over when the test begins. Raises
    as a stream does."""
    async with target.connection() as connection:
        world = await connection.world()
        named = scenario.in_world(world)
        options = stream_options(named, named.prompts[0], 0)
        async with connection.open(options, named.actions[0]) as stream:
            chunk = await anext(stream)
            assert stream.opened_at is not None
            return Probe(world, chunk.received_at - stream.opened_at)


def stream_options(scenario: Scenario, prompt: str, seed: int) -> StreamOptions:
    fps = scenario.fps if scenario.paced else None
    return StreamOptions(prompt, seed=seed, attention=scenario.attention, fps=fps, encoding=scenario.encoding)


class Runner:
    """The streams of one process. began: time.monotonic of the test's begin (it may lie ahead); ended: called with the
    record of each stream as it ends."""

    def __init__(
        self, target: Target, scenario: Scenario, began: float, ended: Callable[[StreamRecord], None] = lambda _: None
    ) -> None:
        self.target, self.scenario, self.began = target, scenario, began
        self.running: dict[int, StreamRecord] = {}
        self.records: list[StreamRecord] = []
        self.lags: list[float] = []  # seconds that the process's event loop was late, sampled
        self.frames = 0  # delivered
        self._ended = ended
        self._stopped = asyncio.Event()
        self._sessions: set[asyncio.Timeout] = set()

    def now(self) -> float:
        """Seconds since the test began."""
        return time.monotonic() - self.began

    def stop(self) -> None:
        """Streams that run end, as interrupted; those that have not arrived never do."""
        self._stopped.set()
        for session in self._sessions:
            with contextlib.suppress(RuntimeError):  # its time has just come
                session.reschedule(time.monotonic())

    async def run(self, streams: list[PlannedStream]) -> None:
        """Returns when the last has ended."""
        watch = asyncio.create_task(self._watch_itself())
        try:
            async with asyncio.TaskGroup() as group:
                for planned in streams:  # in the order of arrival, on time whatever the others do: the loop is open
                    if await self._stops_before(planned.at):
                        break
                    group.create_task(self._play(planned))
        finally:
            watch.cancel()

    async def _stops_before(self, at: float) -> bool:
        """Waits until `at`; True as soon as the test is stopped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self.began + at):
                await self._stopped.wait()
        return self._stopped.is_set()

    async def _watch_itself(self) -> None:
        while True:
            due = time.monotonic() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self.lags.append(max(0.0, time.monotonic() - due))

    async def _play(self, planned: PlannedStream) -> None:
        record = self.running[planned.number] = StreamRecord(planned, self.now())
        try:
            async with contextlib.AsyncExitStack() as stack:
                relay = await stack.enter_async_context(Relay(self.target.url)) if planned.disconnects else None
                connection = self.target.connection(relay, max(0.1, planned.leaves - self.now()))
                await stack.enter_async_context(connection)
                await self._watch_stream(record, connection, relay)
        except Exception as error:  # whatever it is, the other streams go on, and the report tells it
            text = str(error) if isinstance(error, FastarError) else repr(error)
            self._end(record, FAILED if record.chunks else REJECTED, text)
        finally:
            for control in record.controls:
                if control.chunk is not None and control.chunk < len(record.chunks):
                    control.applied = record.chunks[control.chunk].received
            del self.running[planned.number]
            self.records.append(record)
            self._ended(record)

    async def _watch_stream(self, record: StreamRecord, connection: Connection, relay: Relay | None) -> None:
        planned = record.planned
        stream = connection.open(stream_options(self.scenario, planned.prompt, planned.seed), planned.action)
        began = asyncio.Event()
        steering = asyncio.create_task(self._steer(record, stream, began))
        session = asyncio.timeout_at(0.0 if self._stopped.is_set() else self.began + planned.leaves)
        try:
            async with session:
                self._sessions.add(session)
                while True:
                    chunk = await anext(stream)
                    self._add(record, chunk)
                    began.set()
                    if planned.slow_factor is not None:
                        await asyncio.sleep(planned.slow_factor * len(chunk.frames) / self.scenario.fps)
        except TimeoutError:
            early = self._stopped.is_set() and self.now() < planned.leaves
            self._end(record, INTERRUPTED if early else DISCONNECTED if planned.disconnects else COMPLETED)
        finally:
            self._sessions.discard(session)
            steering.cancel()
            record.reconnects = stream.reconnects
            if relay is not None:
                await relay.drop()  # before anything that would tell the server

    def _end(self, record: StreamRecord, outcome: str, error: str | None = None) -> None:
        """The first call counts: what comes of ending a stream is not the stream's."""
        if record.outcome != RUNNING:
            return
        if outcome in (COMPLETED, DISCONNECTED) and not record.chunks:
            outcome = STARVED
        record.ended, record.outcome, record.error = self.now(), outcome, error

    def _add(self, record: StreamRecord, chunk: Chunk) -> None:
        stats = chunk.stats
        self.frames += len(chunk.frames)
        record.chunks.append(
            ChunkTime(
                sent=chunk.sent_at - self.began,
                received=chunk.received_at - self.began,
                decoded=self.now(),
                frames=len(chunk.frames),
                cache_tokens=stats.cache_tokens,
                step_seconds=stats.step_seconds,
                batch=stats.batch,
                late=str(stats.late.get("reason")) if stats.late else None,
            )
        )

    async def _steer(self, record: StreamRecord, stream: Stream, began: asyncio.Event) -> None:
        """Sends the planned controls at their times, whatever has become of earlier ones: this loop is open, too."""
        await began.wait()
        waiting: set[asyncio.Task[None]] = set()
        try:
            for planned in record.planned.controls:
                due = record.chunks[0].received + planned.at
                await asyncio.sleep(due - self.now())
                control = ControlTime(planned.kind, due, self.now())
                record.controls.append(control)
                change = stream.act if planned.kind == "action" else stream.prompt
                waiting.add(asyncio.create_task(self._await_applied(control, await change(planned.value))))
            await asyncio.gather(*waiting)
        finally:
            for task in waiting:
                task.cancel()

    async def _await_applied(self, control: ControlTime, receipt: Receipt) -> None:
        try:
            control.chunk = await receipt.applied()
        except (InvalidArgument, ResourceExhausted) as error:
            control.error = str(error)
        except FastarError:  # the stream ended first
            pass
        else:
            control.applied = self.now()  # a moment late; the chunk's own time replaces it once its reader has it
