"""Streams of live video: `async with connect(url) as c: async for chunk in c.stream(prompt=..., actions=...)`."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self

from fastar_client.actions import Actions, Script
from fastar_client.errors import FastarError, ServerError, StreamLost, TimedOut, invalid
from fastar_client.protocol import (
    END_ACTION,
    IN_FLIGHT,
    Chunk,
    ChunkRequest,
    Reply,
    StreamOptions,
    World,
    check_prompt,
    parse_reply,
)
from fastar_client.transport import GrpcTransport, Transport

DRAIN_SECONDS = 10.0  # how long closing a stream waits for the server to take note of its end,
HUNG_DRAIN_SECONDS = 0.5  # and how long where it has stopped answering anyway


def connect(
    url: str = "localhost:8001",
    *,
    timeout: float = 60.0,
    connect_timeout: float = 5.0,
    transport: Transport | None = None,
) -> Connection:
    """A connection to a Triton server's gRPC port, to be entered with `async with`.

    timeout: seconds without any answer after which a stream raises TimedOut.
    connect_timeout: seconds for connecting and for health checks.

    Raises InvalidArgument here, and ServerUnavailable on entering, when no Triton server answers at `url`.
    """
    for name, value in (("timeout", timeout), ("connect_timeout", connect_timeout)):
        if not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise invalid(name, value, "a finite number of seconds > 0")
    return Connection(transport or GrpcTransport(url), timeout, connect_timeout)


class Connection:
    """Any number of concurrent streams to one server. Leaving `async with` ends those that still run."""

    def __init__(self, transport: Transport, timeout: float, connect_timeout: float) -> None:
        self._transport = transport
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._streams: set[Stream] = set()
        self._world: World | None = None

    async def __aenter__(self) -> Self:
        await self._transport.connect(self._connect_timeout)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def ready(self) -> bool:
        """Whether server and model are ready for streams. Raises ServerUnavailable, TimedOut."""
        return await self._transport.ready(self._connect_timeout)

    async def world(self) -> World:
        """What the server generates: known from any stream's first chunk, else asked by a stream that starts and ends
        in one request and generates nothing. Raises as a stream does."""
        if self._world is None:
            self._world = await ask_world(self._transport, self._timeout)
        return self._world

    def stream(
        self,
        prompt: str,
        *,
        actions: Actions = None,
        frames: int | None = None,
        seed: int | None = None,
        start: str | None = None,
        attention: Mapping[str, Any] | None = None,
        measure_recall: bool = False,
        fps: float | None = None,
    ) -> Stream:
        """A new stream, opened when it is first read; parameters as in `StreamOptions`.

        actions: a string is held; an iterable or async iterable gives one action per latent frame and its last is
        held; None is no button. Raises InvalidArgument before anything is sent.
        """
        return self.open(StreamOptions(prompt, frames, seed, start, attention, measure_recall, fps), actions)

    def open(self, options: StreamOptions, actions: Actions = None) -> Stream:
        """`stream` with its parameters already checked."""
        return Stream(self, options, actions)

    async def close(self) -> None:
        """Ends all streams, then the connection."""
        try:
            await asyncio.gather(*(stream.close() for stream in list(self._streams)))
        finally:
            await self._transport.close()


class Stream:
    """One live video: an async iterator of `Chunk`, to be read by one task.

    At most two requests are in flight; the next goes out when a chunk is taken, so a slow reader slows the server
    down instead of filling memory. Leaving an `async for` over the stream, for whatever reason, ends it.

    Iterating raises, after the chunks received before: InvalidArgument, NotFound, ResourceExhausted,
    ServerUnavailable, StreamLost, ServerError, TimedOut, and whatever an iterable of actions raises.
    """

    def __init__(self, connection: Connection, options: StreamOptions, actions: Actions) -> None:
        self.options = options
        self.sequence_id = secrets.randbelow(2**63 - 1) + 1
        self.opened_at: float | None = None  # seconds, time.monotonic
        self.frames_received = 0
        self.world: World | None = None  # from the first chunk on
        self._connection = connection
        self._script = Script(actions)
        self._prompt = options.prompt
        self._call: Any = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sent = 0
        self._taken = 0
        self._unanswered: deque[tuple[tuple[str, ...], float]] = deque()  # actions and time of requests, oldest first
        self._play_at: deque[float] = deque()  # when a viewer at `fps` starts the chunks not yet used for pacing
        self._play_end = 0.0
        self._inbox: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()  # None: finished
        self._over = False  # nothing more will be put into the inbox
        self._hung = False  # the server fell silent: do not wait for it when closing
        self._wake = asyncio.Event()  # the sender looks again whether it may send
        self._watchdog: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[None] | None = None

    # What the caller does

    @property
    def actions(self) -> Actions:
        """The action held, or last played. Assigning replaces action or script from the next request on."""
        return self._script.held

    @actions.setter
    def actions(self, actions: Actions) -> None:
        self._script = Script(actions)

    async def act(self, action: str) -> int:
        """Holds `action` from the next request on; returns the number of the first chunk that obeys it.
        Raises InvalidArgument."""
        self.actions = action
        return self._sent

    async def prompt(self, prompt: str) -> int:
        """Changes the prompt with the next request; returns the number of the first chunk that follows it.
        Raises InvalidArgument."""
        self._prompt = check_prompt(prompt)
        return self._sent

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Chunk]:
        # A generator, as Python finalises one that a `break` or an exception abandons.
        try:
            while True:
                try:
                    chunk = await self.__anext__()
                except StopAsyncIteration:
                    return
                yield chunk
        finally:
            await self.close()

    async def __anext__(self) -> Chunk:
        """The next chunk. May be cancelled (e.g. by a time-out) and called again without loss."""
        if self._closing is not None:
            raise StopAsyncIteration
        if self._call is None:
            self._open()
        item = await self._inbox.get()
        if isinstance(item, Chunk):
            self._taken += 1
            self._wake.set()
            return item
        await self.close()
        if item is not None:
            raise item
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the stream: tells the server, and waits (at most 10 s) until it has taken note. A reader waiting in
        another task gets the end of the iteration. May be called again."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)  # also a cancelled caller must leave the server informed

    # The life of the stream

    def _open(self) -> None:
        self._call = self._connection._transport.open()
        self._connection._streams.add(self)
        self.opened_at = time.monotonic()
        self._tasks = {
            "send": asyncio.create_task(self._send()),
            "receive": asyncio.create_task(self._receive()),
        }

    async def _close(self) -> None:
        self._finish(None)
        if self._call is None:
            return
        sender, receiver = self._tasks["send"], self._tasks["receive"]
        try:
            sender.cancel()
            await asyncio.wait({sender})
            if self._sent and not receiver.done():
                self._call.send(ChunkRequest(self.sequence_id, (END_ACTION,), end=True))
            self._call.half_close()
            drain = HUNG_DRAIN_SECONDS if self._hung else min(DRAIN_SECONDS, self._connection._timeout)
            await asyncio.wait({receiver}, timeout=drain)
        finally:
            if not receiver.done():
                self._call.cancel()
                receiver.cancel()
                await asyncio.wait({receiver})
            self._connection._streams.discard(self)

    def _finish(self, item: BaseException | None) -> None:
        """The reader gets `item` (an error, or None for the end) after the chunks before it. The first call counts."""
        if not self._over:
            self._over = True
            self._hung = isinstance(item, TimedOut)
            self._inbox.put_nowait(item)
        self._watch()

    # Sending

    async def _send(self) -> None:
        try:
            while not self._over:
                if not self._may_send():
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                if self.options.fps is not None and self._sent >= IN_FLIGHT:
                    await asyncio.sleep(self._play_at.popleft() - time.monotonic())
                actions = await self._next_actions()
                if self._over:  # while it waited
                    return
                start = self._sent == 0
                request = ChunkRequest(
                    self.sequence_id,
                    actions,
                    self._prompt,
                    self.options.as_json() if start else "",
                    start=start,
                    # A little before our own time-out, so that a full server is told from a hung one.
                    queue_seconds=0.9 * self._connection._timeout if start else None,
                )
                self._prompt = ""
                self._sent += 1
                self._unanswered.append((actions, time.monotonic()))
                self._call.send(request)
                if len(self._unanswered) == 1:
                    self._watch()
        except Exception as error:  # also what the caller's iterable of actions raises
            self._finish(error)

    def _may_send(self) -> bool:
        if self._sent - self._taken >= IN_FLIGHT:
            return False
        if self.options.frames is None:
            return True
        chunk_frames = self.world.chunk_frames if self.world else 0
        return self.frames_received + len(self._unanswered) * chunk_frames < self.options.frames

    async def _next_actions(self) -> tuple[str, ...]:
        while True:
            script = self._script
            latent_frames = 1
            if script.varies:
                latent_frames = (self.world or await self._connection.world()).latent_frames_per_chunk
            actions = await script.take(latent_frames)
            if script is self._script:  # else it was replaced while it made us wait
                return actions

    # Receiving

    async def _receive(self) -> None:
        try:
            while (reply := await self._call.receive()) is not None:
                try:
                    self._take_in(reply)
                except Exception as error:
                    self._finish(error)
            self._finish(StreamLost(f"{self._connection._transport.url}: the server closed the stream; open a new one"))
        except Exception as error:  # the call itself is lost
            self._finish(error)

    def _take_in(self, reply: Reply | FastarError) -> None:
        now = time.monotonic()
        if self._over:  # the answers to what was in flight
            return
        if isinstance(reply, FastarError):
            raise reply
        if not self._unanswered:
            raise ServerError("stream: a reply came that no request asked for")
        frames, stats = parse_reply(reply)
        actions, sent_at = self._unanswered.popleft()
        expected = self._answered - 1
        if stats.chunk != expected:
            raise ServerError(f"stream: chunk {stats.chunk} came where chunk {expected} was due")
        if expected == 0:
            if stats.world is None:
                raise ServerError("STATS: the first chunk does not name its world")
            self.world = self._connection._world = stats.world
        if self.options.frames is not None:
            frames = frames[: self.options.frames - self.frames_received]
        self.frames_received += len(frames)
        if self.options.fps is not None:  # a viewer who has run dry starts anew with this chunk
            self._play_at.append(max(self._play_end, now))
            self._play_end = self._play_at[-1] + len(frames) / self.options.fps
        self._inbox.put_nowait(Chunk(frames, stats, actions, sent_at, now))
        self._wake.set()
        self._watch()
        if self.options.frames is not None and self.frames_received >= self.options.frames:
            self._finish(None)

    @property
    def _answered(self) -> int:
        return self._sent - len(self._unanswered)

    def _watch(self) -> None:
        """(Re)starts the clock of the response time-out, or stops it where no response is due."""
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        if self._unanswered and not self._over:
            timeout = self._connection._timeout
            where = f"{self._connection._transport.url}: no answer for {timeout:g} s, at chunk {self._answered}"
            error = TimedOut(f"{where}; is the server overloaded or hung?")
            self._watchdog = asyncio.get_running_loop().call_later(timeout, self._finish, error)


async def ask_world(transport: Transport, timeout: float) -> World:
    """The world, from a stream that starts and ends in one request and generates nothing."""
    call: Any = transport.open()
    try:
        sequence_id = secrets.randbelow(2**63 - 1) + 1
        call.send(ChunkRequest(sequence_id, (END_ACTION,), "world", start=True, end=True, queue_seconds=0.9 * timeout))
        call.half_close()
        async with asyncio.timeout(timeout):
            reply = await call.receive()
            if isinstance(reply, FastarError):
                raise reply
            world = parse_reply(reply)[1].world if reply is not None else None
            while reply is not None:
                reply = await call.receive()
    except TimeoutError:
        raise TimedOut(f"{transport.url}: no answer for {timeout:g} s; is the server overloaded or hung?") from None
    finally:
        call.cancel()
    if world is None:
        raise ServerError(f"{transport.url}: the server does not say what world it runs")
    return world
