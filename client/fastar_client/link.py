"""The wire side of one stream: requests out, replies in, and back again after the connection was lost.

What was asked is kept until it is answered, and what was made until the server has it in a snapshot. So a lost stream
is taken up again from the server's newest state: the chunks since then are made again, one by one and unseen, and then
everything goes on with the requests and controls that were under way.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from fastar_client.controls import NOT_KEPT, Control, Controls, described, is_busy
from fastar_client.decode import Decoder, is_small
from fastar_client.errors import (
    FastarError,
    NotFound,
    ServerError,
    ServerUnavailable,
    StreamLost,
    TakenOver,
    TimedOut,
)
from fastar_client.history import History, Made
from fastar_client.protocol import (
    CONTROL_ACTION,
    END_ACTION,
    Chunk,
    ChunkRequest,
    ChunkStats,
    ControlReply,
    Origin,
    Reply,
    StreamOptions,
    World,
    parse_reply,
)
from fastar_client.recovery import Diverged, Elsewhere, Pin, may_pass
from fastar_client.transport import Call, Transport

KEEPALIVE_SECONDS = 15.0  # of a paused stream
BACK_OFF = (0.1, 2.0)  # seconds between attempts to reconnect: the first, and the most
MISSES = 4  # attempts that may find the server at another chunk than was expected


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a connection. Times in seconds."""

    timeout: float
    connect_timeout: float
    reconnect_seconds: float
    headers: dict[str, str]  # gRPC metadata


@dataclasses.dataclass
class Asked:
    """A chunk that was asked for and has not come."""

    actions: tuple[str, ...]
    sent_at: float
    again: tuple[str, ...]  # what to ask for should it have to be asked again


class Link:
    """deliver: called with each chunk; finish: once, with the error that ended the stream."""

    def __init__(
        self,
        transport: Transport,
        settings: Settings,
        options: StreamOptions,
        deliver: Callable[[Chunk], None],
        finish: Callable[[BaseException], None],
    ) -> None:
        self.options = options  # until the start they may change; later `fps` and `encoding` are the current ones
        self.sequence_id = secrets.randbelow(2**63 - 1) + 1
        self.token: str | None = None
        self.world: World | None = None
        self.reconnects = 0
        self.started = self.over = False
        self.paused = False
        self.broken = False  # no call that works, for now or for good
        self.asked: deque[Asked] = deque()  # oldest first
        self.history: History | None = None  # from the first chunk on
        self.controls = Controls()
        self._transport, self._settings = transport, settings
        self._deliver, self._finish = deliver, finish
        self._decoder = Decoder()
        self._controls_flow = False  # else they wait: for the start, the first reply of a resumed stream, or a new call
        self._lost_at: float | None = None  # time of the first loss since the last chunk
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._news = asyncio.Event()  # something was asked, the pause or the stream is over
        self._call: Call | None = None
        self._pin = Pin()

    def open(self, headers: dict[str, str]) -> None:
        """Opens the call. headers: further gRPC metadata. Raises ServerUnavailable where nothing is connected."""
        self._headers = self._settings.headers | headers
        self._call = self._transport.open(self._headers)

    # Sending. All of it only notes what is wanted while the connection is lost.

    async def share_memory(self, world: World) -> None:
        """Raises InvalidArgument where it cannot be shared."""
        assert self._call is not None
        await self._call.share(world.chunk_frames * world.height * world.width * 3)

    def ask(self, actions: tuple[str, ...]) -> None:
        """Asks for the next chunk."""
        self.asked.append(Asked(actions, time.monotonic(), actions))
        self.nudge()
        if self.broken:
            return
        if self.started:
            self._call.send(ChunkRequest(self.sequence_id, actions))
        else:
            self.started = True
            # A little before our own time-out, so that a full server is told from a hung one.
            self._send_start(actions, self.options, 0.9 * self._settings.timeout)
            if self.options.origin is None:
                self._open_controls(0)
        if len(self.asked) == 1:
            self.watch()

    def control(self, kind: str, value: Any, blend_chunks: int | None = None) -> Control:
        control = self.controls.add(kind, value, blend_chunks)
        if self._controls_flow and not self.over:
            self._send_control(control.id, self.controls.message(control.id))
        return control

    def pause(self, paused: bool) -> None:
        self.paused = paused
        self.nudge()
        self.watch()
        self._keep_alive(send=False)

    def nudge(self) -> None:
        self._news.set()

    def send_end(self) -> None:
        """The last request: nothing is to be generated any more."""
        if self.started and not self.broken:
            self._call.send(ChunkRequest(self.sequence_id, (END_ACTION,), end=True))
        self._call.half_close()

    async def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        await self._call.close()

    def _send_start(self, actions: tuple[str, ...], options: StreamOptions, queue_seconds: float) -> None:
        prompt = "" if options.origin else options.prompt
        start = ChunkRequest(self.sequence_id, actions, prompt, options.as_json(), True, queue_seconds=queue_seconds)
        self._call.send(start)

    def _send_control(self, id: int | None, text: str) -> None:
        self.controls.sent(id)
        self._call.send(ChunkRequest(self.sequence_id, (CONTROL_ACTION,), control=text))
        self.watch()

    def _open_controls(self, received: int) -> None:
        """Sends those that have waited; the server has `received`."""
        for id in range(received + 1, self.controls.last + 1):
            self._send_control(id, self.controls.message(id))
        self._controls_flow = True
        self._keep_alive(send=False)

    def _keep_alive(self, send: bool = True) -> None:
        self._set_timer("keepalive", None)
        if self.paused and not self.over and not self.broken and self._controls_flow:
            if send:
                self._send_control(None, "{}")
            self._set_timer("keepalive", KEEPALIVE_SECONDS, self._keep_alive)

    def watch(self) -> None:
        """(Re)starts the clock of the response time-out, or stops it where no response is due."""
        self._set_timer("watchdog", None)
        due = (self.asked and not self.paused) or not self.controls.answered
        if due and not self.over and not self.broken:
            timeout = self._settings.timeout
            where = f"{self._transport.url}: no answer for {timeout:g} s, at chunk {self.next}"
            error = TimedOut(f"{where}; is the server overloaded or hung?")
            self._set_timer("watchdog", timeout, self._fail, error)

    def _set_timer(self, name: str, seconds: float | None, *call: Any) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()
        if seconds is not None:
            self._timers[name] = asyncio.get_running_loop().call_later(seconds, *call)

    # Receiving

    @property
    def next(self) -> int:
        """The number of the chunk that is due."""
        if self.history is not None:
            return self.history.next
        return (self.options.origin.chunk or 0) if self.options.origin else 0

    async def receive(self) -> None:
        """Takes in what comes until the call is over: also what answers the last requests of a stream that is over."""
        while True:
            failure: Exception | None = None
            gone = False
            try:
                reply = await self._reply()
            except Exception as error:
                failure, gone = error, True
            else:
                if reply is None:
                    failure = StreamLost(f"{self._transport.url}: the server closed the stream; open a new one")
                    gone = True
                elif not self.over:
                    try:
                        await self._take_in(reply)
                    except Exception as error:
                        failure = error
            if failure is not None and not self.over:
                if isinstance(failure, ServerUnavailable):
                    self._leave(keep_pin=failure.broke_off)
                if self._may_recover(failure):
                    await self._recover(failure)
                    gone = self.broken
                else:
                    self._fail(failure)
            if gone:
                return

    async def _reply(self) -> Reply | FastarError | None:
        """The call's next."""
        assert self._call is not None
        reply = await self._call.receive()
        self._pin.note(self._call.pod)
        return reply

    def _leave(self, keep_pin: bool = False) -> None:
        """The call's server drains, is gone or refuses: on to another one, where a gateway or we know of one. keep_pin:
        it may have been the gateway alone."""
        self._transport.leave(self._call)
        if not keep_pin:
            self._pin.leave()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, FastarError):
            error.token, error.chunk = self.token, self.next
        self._finish(error)

    async def _take_in(self, reply: Reply | FastarError) -> None:
        if isinstance(reply, FastarError):
            raise reply
        said = parse_reply(reply)
        if isinstance(said, ControlReply):
            self.controls.take_receipt(said)
            self.watch()
        else:
            await self._take_chunk(reply, said)

    async def _take_chunk(self, reply: Reply, stats: ChunkStats) -> None:
        now = time.monotonic()
        if not self.asked:
            raise ServerError("stream: a reply came that no request asked for")
        first = self.history is None
        if first:
            if stats.world is None:
                raise ServerError("STATS: the first chunk does not name its world")
            self.world, self.token = stats.world, stats.token
            if self.options.origin is not None:
                self.history = History(stats.chunk)
                self.controls.begin_at(stats.received)
            else:
                self.history = History(0)
        assert self.world is not None
        controls = self.controls.apply(stats.applied, stats.chunk)
        rewinds = [control.value for control in controls if control.kind == "rewind"]
        due = rewinds[-1] if rewinds else self.history.next
        if stats.chunk != due:
            raise ServerError(f"stream: chunk {stats.chunk} came where chunk {due} was due")
        decode = (self._decoder.decode, reply, stats, self.world)
        frames, packets = decode[0](*decode[1:]) if is_small(self.world, stats) else await asyncio.to_thread(*decode)
        if self.over:
            return
        asked = self.asked.popleft()
        actions = stats.actions or asked.actions
        self.history.add(stats.chunk, Made(actions, stats.applied, bool(rewinds)))
        self.controls.forget(self.history.trim(stats.snapshot_chunk))
        self._lost_at = None
        self._deliver(Chunk(frames, stats, actions, asked.sent_at, now, described(controls), packets))
        if first and self.options.origin is not None and not self.over:
            self._open_controls(stats.received)
        self.watch()

    # After the connection was lost

    def _may_recover(self, error: Exception) -> bool:
        lost = isinstance(error, StreamLost | ServerUnavailable | NotFound) and not isinstance(error, TakenOver)
        return lost and self.token is not None and self._settings.reconnect_seconds > 0

    async def _recover(self, failure: Exception) -> None:
        """Takes the stream up again, or fails it; the call is then closed, and the link stays broken."""
        self.broken, self._controls_flow = True, False
        self.watch()
        wait, misses, drained = BACK_OFF[0], 0, isinstance(failure, ServerUnavailable)
        found: Elsewhere | None = None
        while not self.over:
            await self._call.close()
            while not self.over and (self.paused or not self.asked):  # it holds no slot until it is wanted
                self._news.clear()
                await self._news.wait()
            self._lost_at = self._lost_at or time.monotonic()
            left = self._lost_at + self._settings.reconnect_seconds - time.monotonic()
            try:
                if left <= 0:
                    raise StreamLost(f"stream: not resumed within {self._settings.reconnect_seconds:g} s ({failure})")
                await self._take_up(found, left, drained)
                self.reconnects += 1
                return
            except Elsewhere as elsewhere:
                found, misses = elsewhere, misses + 1
                if misses < MISSES:
                    continue
                error: Exception = StreamLost("stream: it cannot be resumed (the server has no state of it that fits)")
            except FastarError as caught:
                if left > 0 and may_pass(caught):
                    failure = caught
                    self._leave(keep_pin=caught.broke_off)
                    await asyncio.sleep(min(wait * random.uniform(0.5, 1.5), left))
                    wait = min(2 * wait, BACK_OFF[1])
                    continue
                error = caught if left <= 0 else StreamLost(f"stream: it cannot be resumed ({caught})")
            except Exception as caught:
                error = caught
            await self._call.close()
            self._fail(error)

    async def _take_up(self, found: Elsewhere | None, left: float, drained: bool) -> None:
        """One attempt. found: what an earlier one has learned of the server's state."""
        history, asked = self.history, self.asked[0]
        assert history is not None
        assert self.world is not None
        assert self.token is not None
        rewind = self.controls.rewind()
        to_rewound = found is None and rewind is not None  # then straight to where the rewind leads
        if to_rewound:
            chunk, actions = rewind.value, asked.again
        else:
            chunk = history.ask(asked.again, drained) if found is None else found.chunk
            actions = asked.again if chunk == history.next else history[chunk].actions
        self.sequence_id = secrets.randbelow(2**63 - 1) + 1
        self.controls.new_call()
        self._call = self._transport.open(self._headers | self._pin.headers, fresh=True)
        await self.share_memory(self.world)
        timeout = min(self._settings.timeout, max(left, 1.0))
        known = found.received if found is not None else None
        own: dict[str, Any] = {"seed": None, "start": None, "attention": None, "measure_recall": False}
        options = dataclasses.replace(self.options, **own, origin=Origin(self.token, chunk))
        self._send_start(actions, options, 0.9 * timeout)
        sent = known or 0
        if known is not None and chunk < history.next:  # what must take effect with the very first chunk
            sent = self._send_replayed(history[chunk], known)
        reply, stats = await self._following(timeout)
        received = stats.received if known is None else known
        fresh = to_rewound or stats.chunk == history.next
        if to_rewound and stats.chunk != rewind.value:  # refused it would have been
            raise Elsewhere(history.next, None)
        if not to_rewound and rewind is not None and rewind.id <= received:
            raise Diverged("stream: it cannot be resumed (it was lost with a rewind under way)")
        if not to_rewound and not history.holds(stats.chunk, received):
            raise Elsewhere(history.first, None)
        if fresh:
            # Taken in as if it had never been lost. What the server had taken before the state is in it: applied or,
            # for some kinds, forgotten; these follow below with what it has not taken.
            inside = {c.id for c in self.controls.open(received) if c.kind not in NOT_KEPT}
            inside |= {rewind.id} if to_rewound else set()
            await self._take_chunk(reply, dataclasses.replace(stats, applied=tuple(sorted({*stats.applied, *inside}))))
        else:
            made = history[stats.chunk]
            needed = self.controls.to_replay(made.applied, received)
            if (stats.actions or actions) != made.actions or not set(needed) <= set(stats.applied):
                raise Elsewhere(stats.chunk, received)
            for number in range(stats.chunk + 1, history.next):
                sent = self._send_replayed(history[number], max(sent, received))
                await self._replay(number, history[number], received)
        if again := self.controls.open(received):  # and all after them, so that a pause does not follow its end
            unsent = [c for c in self.controls.open(self.controls.last) if c.id > max(sent, received)]
            self.controls.requeue([*again, *unsent])
        if not fresh and self.options.encoding == "h264":
            self.controls.add("encoding", "h264")  # the replayed packets are dropped: begin anew with the next ones
        self.broken = False
        self._open_controls(max(sent, received))
        for waiting in self.asked:
            self._call.send(ChunkRequest(self.sequence_id, waiting.again))
        self.watch()

    def _send_replayed(self, made: Made, received: int) -> int:
        """Sends the controls that took effect with a chunk, and fills the gaps; returns the last id sent."""
        again = self.controls.to_replay(made.applied, received)
        last = max([received, *made.applied])
        for id in range(received + 1, last + 1):
            self._send_control(id, self.controls.message(id, again=id in again))
        return last

    async def _replay(self, number: int, made: Made, received: int) -> None:
        """Has one chunk made again, after its controls. Raises StreamLost where it becomes another one."""
        timeout = self._settings.timeout
        if not self.controls.answered:
            await self._following(timeout, chunk=False)
        self._call.send(ChunkRequest(self.sequence_id, made.actions))
        _, stats = await self._following(timeout)
        again = self.controls.to_replay(made.applied, received)
        if stats.chunk != number or not set(again) <= set(stats.applied):
            raise Diverged(f"stream: chunk {number} could not be made again as it was")

    async def _following(self, seconds: float, chunk: bool = True) -> Any:
        """The next chunk's reply and stats; or None, once all controls sent are answered."""
        try:
            async with asyncio.timeout(seconds):
                while chunk or not self.controls.answered:
                    reply = await self._reply()
                    if reply is None:
                        raise StreamLost(f"{self._transport.url}: the server closed the stream")
                    if isinstance(reply, FastarError):
                        raise reply
                    said = parse_reply(reply)
                    if not isinstance(said, ControlReply):
                        return reply, said
                    if is_busy(refused := self.controls.take_receipt(said)):
                        raise refused
        except TimeoutError:
            raise TimedOut(f"{self._transport.url}: no answer for {seconds:g} s") from None
        return None
