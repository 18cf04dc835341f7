"""A live video as its reader has it: an iterator of chunks, steered while it plays."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fastar_client.actions import Actions, Script
from fastar_client.controls import Receipt
from fastar_client.errors import TimedOut, invalid
from fastar_client.link import Link
from fastar_client.protocol import (
    MAX_BLEND_CHUNKS,
    MAX_SEED,
    Chunk,
    StreamOptions,
    World,
    check_action,
    check_encoding,
    check_fps,
    check_prompt,
    is_int,
)
from fastar_client.tracing import StreamTrace

if TYPE_CHECKING:
    from fastar_client.session import Connection

DRAIN_SECONDS = 10.0  # how long closing a stream waits for the server to take note of its end,
HUNG_DRAIN_SECONDS = 0.5  # and how long where it has stopped answering anyway


class Stream:
    """One live video: an async iterator of `Chunk`, to be read by one task.

    At most two requests are in flight; the next goes out when a chunk is taken, so a slow reader slows the server
    down instead of filling memory. Leaving an `async for` over the stream, for whatever reason, ends it.

    Every method that steers returns a `Receipt` as soon as the change is on its way. Changes made before the stream is
    first read are part of its start. They raise InvalidArgument for what can be known here to be wrong; what the server
    refuses is told by the receipt, and the stream goes on.

    A lost connection is made anew and the stream taken up where it was (`connect(reconnect_seconds=...)`): the reader
    sees a pause, and neither a gap nor a repetition. Iterating raises, after the chunks received before:
    InvalidArgument, NotFound, ResourceExhausted, ServerUnavailable, StreamLost, ServerError, TimedOut, and whatever an
    iterable of actions raises. `error.token` and `error.chunk` tell where the stream may be resumed later.
    """

    def __init__(self, connection: Connection, options: StreamOptions, actions: Actions, in_flight: int) -> None:
        self.opened_at: float | None = None  # seconds, time.monotonic
        self.frames_received = 0
        self._connection = connection
        self._in_flight = in_flight
        self._script = Script(actions)
        self._link = Link(connection._transport, connection._settings, options, self._deliver, self._finish)
        self._trace: StreamTrace | None = None
        self._error: BaseException | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sent = 0
        self._taken = 0
        self._play_at: deque[float] = deque()  # when a viewer at `fps` starts the chunks not yet used for pacing
        self._play_end = 0.0
        self._inbox: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()  # None: finished
        self._wake = asyncio.Event()  # the sender looks again whether it may send
        self._closing: asyncio.Task[None] | None = None

    # What the caller sees

    @property
    def options(self) -> StreamOptions:
        """As the stream was opened; `fps` and `encoding` are the current ones."""
        return self._link.options

    @property
    def world(self) -> World | None:
        """From the first chunk on."""
        return self._link.world

    @property
    def token(self) -> str | None:
        """From the first chunk on: the stream's secret, for `Connection.resume` and `Connection.fork`."""
        return self._link.token

    @property
    def next_chunk(self) -> int:
        """The number of the chunk that is due from the server."""
        return self._link.next

    @property
    def reconnects(self) -> int:
        """How often the stream was lost and taken up again."""
        return self._link.reconnects

    @property
    def sequence_id(self) -> int:
        """Of the current connection."""
        return self._link.sequence_id

    @property
    def paused(self) -> bool:
        return self._link.paused

    @property
    def actions(self) -> Actions:
        """The action held, or last played. Assigning replaces action or script from the next request on; `act` is
        quicker."""
        return self._script.held

    @actions.setter
    def actions(self, actions: Actions) -> None:
        self._script = Script(actions)

    # What the caller changes

    async def act(self, action: str) -> Receipt:
        """Holds `action` from the next chunk on that is begun."""
        self._script = Script(check_action(action))
        if not self._link.started:
            return self._link.controls.early()
        for asked in self._link.asked:
            asked.again = (action,)
        return self._link.control("action", action).receipt

    async def prompt(self, prompt: str, blend_chunks: int | None = None) -> Receipt:
        """A new prompt, blended in over `blend_chunks` (1..64) chunks; None: at once."""
        check_prompt(prompt)
        if blend_chunks is not None and not (is_int(blend_chunks) and 1 <= blend_chunks <= MAX_BLEND_CHUNKS):
            raise invalid("blend_chunks", blend_chunks, f"1..{MAX_BLEND_CHUNKS}, or None for at once")
        if not self._link.started and self.options.origin is None:
            return self._at_start(prompt=prompt)
        return self._link.control("prompt", prompt, blend_chunks).receipt

    async def set_fps(self, fps: float | None) -> Receipt:
        """The rate at which the viewer plays, > 0 and <= 1000; None: chunks as fast as possible. May be refused with
        ResourceExhausted."""
        check_fps(fps)
        started = self._link.started
        receipt = self._at_start(fps=fps)
        if fps is None:
            self._play_at.clear()
        self._wake.set()
        return self._link.control("fps", fps).receipt if started else receipt

    async def set_density(self, density: float) -> Receipt:
        """The share of cached keys that are attended to, 0 < density <= 1."""
        if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
            raise invalid("density", density, "a number > 0 and <= 1")
        return self._link.control("density", density).receipt

    async def set_seed(self, seed: int) -> Receipt:
        """The noise starts anew from this seed, 0..2^63-1."""
        if not (is_int(seed) and 0 <= seed <= MAX_SEED):
            raise invalid("seed", seed, "an integer 0..2^63-1")
        resumes = self.options.origin is not None and not self.options.origin.fork
        if not self._link.started and not resumes:
            return self._at_start(seed=int(seed))
        return self._link.control("seed", int(seed)).receipt

    async def set_encoding(self, encoding: str) -> Receipt:
        """How frames travel: "raw", "jpeg" or "h264"."""
        check_encoding(encoding)
        started = self._link.started
        receipt = self._at_start(encoding=encoding)
        return self._link.control("encoding", encoding).receipt if started else receipt

    async def pause(self) -> Receipt:
        """No chunk is begun until `play`; those under way still come. The stream is kept alive."""
        return self._pause(True)

    async def play(self) -> Receipt:
        """Goes on after `pause`."""
        return self._pause(False)

    async def snapshot(self) -> Receipt:
        """Has the server store the state before the next chunk that is begun: `applied` tells its number. It can be
        rewound to, resumed and forked once `stats.snapshot_chunk` has reached that number."""
        return self._link.control("snapshot", True).receipt

    async def rewind(self, chunk: int) -> Receipt:
        """Back to the snapshot taken before `chunk`: the next chunk that is begun has that number. Chunks under way
        still come before it."""
        if not (is_int(chunk) and 0 <= chunk < 2**53):
            raise invalid("rewind", chunk, "an integer >= 0: a chunk before which a snapshot was taken")
        return self._link.control("rewind", int(chunk)).receipt

    def _pause(self, paused: bool) -> Receipt:
        link = self._link
        receipt = link.control("pause", paused).receipt if link.started else link.controls.early()
        link.pause(paused)
        self._wake.set()
        return receipt

    def _at_start(self, **changed: Any) -> Receipt:
        self._link.options = dataclasses.replace(self._link.options, **changed)
        return self._link.controls.early() if not self._link.started else Receipt()

    # Reading

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
        if not self._tasks:
            self._open()
        item = await self._inbox.get()
        if isinstance(item, Chunk):
            self._taken += 1
            self._wake.set()
            if self._trace is not None:
                self._trace.taken(item)
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
        trace = StreamTrace({"fastar.encoding": self.options.encoding, "server.address": self._connection.url})
        self._link.open(trace.headers)
        self._trace = trace
        self._connection._streams.add(self)
        self.opened_at = time.monotonic()
        self._tasks = {
            "send": asyncio.create_task(self._send()),
            "receive": asyncio.create_task(self._link.receive()),
        }

    async def _close(self) -> None:
        self._finish(None)
        if not self._tasks:
            return
        sender, receiver = self._tasks["send"], self._tasks["receive"]
        try:
            sender.cancel()
            await asyncio.wait({sender})
            if not receiver.done() and not self._link.broken:
                self._link.send_end()
                hung = isinstance(self._error, TimedOut)
                drain = HUNG_DRAIN_SECONDS if hung else min(DRAIN_SECONDS, self._connection._settings.timeout)
                await asyncio.wait({receiver}, timeout=drain)
        finally:
            if not receiver.done():
                receiver.cancel()
                await asyncio.wait({receiver})
            await self._link.close()
            self._connection._streams.discard(self)
            if self._trace is not None:
                self._trace.end(
                    self._error, {"fastar.frames": self.frames_received, "fastar.reconnects": self.reconnects}
                )

    def _finish(self, item: BaseException | None) -> None:
        """The reader gets `item` (an error, or None for the end) after the chunks before it. The first call counts."""
        if not self._link.over:
            self._link.over = True
            self._error = item
            self._link.controls.end(item)
            self._inbox.put_nowait(item)
        self._link.nudge()
        self._link.watch()

    # Sending

    async def _send(self) -> None:
        try:
            if self._connection._transport.shares_memory:
                await self._link.share_memory(await self._connection.world())
            while not self._link.over:
                if not self._may_send():
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                if self.options.fps is not None and self._play_at and self._sent >= self._in_flight:
                    await asyncio.sleep(self._play_at.popleft() - time.monotonic())
                actions = await self._next_actions()
                while self.paused and not self._link.over:  # since it began to wait
                    self._wake.clear()
                    await self._wake.wait()
                if self._link.over:
                    return
                self._sent += 1
                self._link.ask(actions)
        except Exception as error:  # also what the caller's iterable of actions raises
            self._finish(error)

    def _may_send(self) -> bool:
        if self.paused or self._sent - self._taken >= self._in_flight:
            return False
        if self.options.frames is None:
            return True
        chunk_frames = self.world.chunk_frames if self.world else 0
        return self.frames_received + len(self._link.asked) * chunk_frames < self.options.frames

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

    def _deliver(self, chunk: Chunk) -> None:
        self._connection._world = self.world
        if self.options.frames is not None:
            chunk = dataclasses.replace(chunk, frames=chunk.frames[: self.options.frames - self.frames_received])
        self.frames_received += len(chunk.frames)
        if self.options.fps is not None:  # a viewer who has run dry starts anew with this chunk
            self._play_at.append(max(self._play_end, chunk.received_at))
            self._play_end = self._play_at[-1] + len(chunk.frames) / self.options.fps
        self._inbox.put_nowait(chunk)
        self._wake.set()
        if self.options.frames is not None and self.frames_received >= self.options.frames:
            self._finish(None)
