"""`Service`: many streams on one engine. Requests come in from any thread; one thread of its own makes the chunks.

The engine thread loops: open streams that start, sweep those that are gone, choose the streams that are due, step them
all one chunk, hand the results to the sender thread, which encodes and answers. Controls are taken and receipted where
they arrive, also while a step runs, and take effect when their stream's next chunk begins. Snapshots are taken by the
engine thread, and written and read by the disk thread.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from fastar_backend.engine.checks import free_bytes
from fastar_backend.engine.engine import StreamEngine, check_prompt
from fastar_backend.engine.stream import Chunk, ChunkRequest, StreamOptions
from fastar_backend.engine.warm_up import costs
from fastar_backend.errors import (
    AtCapacity,
    FastarError,
    InvalidInput,
    Stopping,
    Superseded,
    UnknownStream,
)
from fastar_backend.service.admission import Admission, Booking, Cost
from fastar_backend.service.config import ServiceConfig
from fastar_backend.service.controls import Controls
from fastar_backend.service.drain import Drain, stop
from fastar_backend.service.encode import make_encoder
from fastar_backend.service.outbox import Outbox
from fastar_backend.service.report import as_fastar_error
from fastar_backend.service.schedule import choose
from fastar_backend.service.session import Request, Session, StartOptions, check_tenant, read_options
from fastar_backend.service.store import Store
from fastar_backend.service.telemetry import Metrics, Tracing
from fastar_backend.service.vault import Vault

LOOK_SECONDS = 0.25  # between looks at who is gone
FPS_WINDOW = 2.0  # seconds over which a stream's frame rate is measured


class Service:
    """Thread-safe. Raises what the engine raises while warming up."""

    def __init__(self, load: Callable[[], StreamEngine], config: ServiceConfig, metrics: Metrics,
                 store: Store, tracing: Tracing | None = None) -> None:  # fmt: skip
        """load: makes the engine; called in the engine's thread. Returns when it is loaded and measured."""
        self.config, self.metrics, self.store, self.tracing = config, metrics, store, tracing
        self.most = config.max_batch or config.max_streams
        self.sessions: dict[int, Session] = {}
        self.superseded: deque[int] = deque(maxlen=256)  # sequences whose streams were taken over
        self.starting: dict[int, deque[Request]] = {}  # what came after a start that is not settled yet
        self.inbox: deque[Request | tuple[Request, StartOptions, Any]] = deque()
        self.wake = threading.Condition(threading.RLock())
        self.streams = itertools.count(1)  # the engine's ids: a stream that is resumed keeps its own
        self.life = 10.0  # seconds that streams live, a running mean
        self.looked = self.swept = 0.0
        self.stopping = False
        self.controls = Controls(self)
        self.drain = Drain(self)
        self.outbox = Outbox(metrics)
        loaded: Future[None] = Future()
        self.thread = threading.Thread(target=self._run, args=(load, loaded), name="fastar-engine", daemon=True)
        self.thread.start()
        loaded.result()

    def _load(self, load: Callable[[], StreamEngine]) -> None:
        """All heavy work is this thread's, the loading and measuring too: OpenMP gives each thread that computes a team
        of its own, and with more threads than cores none of them spins at barriers, which costs a third of the
        speed on CPUs (docs/decisions.md)."""
        config = self.config
        self.engine = load()
        _ = self.engine.fingerprint  # seconds for large weights: now, and not at the first snapshot of a live stream
        # The service admits; a stream that is rewound is there twice for a moment.
        self.engine.max_streams = 2 * config.max_streams + 1
        self.world = self.engine.world_info()
        each = self.engine.bytes_of(StreamOptions())
        total = config.cache_bytes or max(free_bytes(self.engine.device) // 2, each)  # the other half: steps, snapshots
        self.cost = Cost(costs(self.engine, sorted({1, min(4, self.most, total // each or 1)})), config.deterministic)
        self.admission = Admission(config, self.cost, self.world["chunk_frames"], total)
        self.vault = Vault(self.store, self.engine, config.snapshots_kept, self.metrics, self.wake)
        self.metrics.capacity(config.max_streams, total)

    # From any thread

    def submit(self, request: Request) -> None:
        """Takes one request, which will be answered once. Returns at once."""
        with self.wake:
            if self.stopping:
                self.outbox.refuse(request, Stopping("server: it is stopping; allowed: resume by the stream's token"))
            elif request.stream_id in self.drain.leaving:
                self.drain.take(request)
            elif request.starts and self.drain.began is not None:
                self.outbox.refuse(request, Stopping("server: it drains; allowed: another server, or later"))
            elif request.starts and request.stream_id in self.starting:
                self.outbox.refuse(request, InvalidInput("sequence_id", "is being started", "an id that is not in use"))
            elif request.stream_id in self.starting:
                self._hold(request)
            elif request.starts or not (request.generates or request.control or request.stream_id in self.sessions):
                if request.starts:
                    self.starting[request.stream_id] = deque()
                self.inbox.append(request)  # the health check's, too: it is to notice a hung engine
            else:
                self._accept(request)
            self.wake.notify()

    def fail(self, request: Request, error: FastarError) -> None:
        """A request that cannot even be read: its stream, if it has one, is over. The caller answers it."""
        with self.wake:
            session = self.sessions.get(request.stream_id)
            if session and session.tenant == request.tenant and not request.starts and request.control is None:
                self._end(session, "error", error)

    def close(self, seconds: float = 10.0) -> None:
        """Stores every live stream, answers what waits, and stops."""
        with self.wake:
            self.stopping = True
            self.wake.notify()
        self.thread.join(seconds)
        self.vault.close()
        self.outbox.close()
        if self.tracing:
            self.tracing.close(2.0)

    # Requests (under the lock)

    def _hold(self, request: Request) -> None:
        held = self.starting[request.stream_id]
        if len(held) >= 4 * self.config.pending_requests:
            self.outbox.refuse(request, self._too_many(len(held)))
        else:
            held.append(request)

    def _accept(self, request: Request) -> None:
        """A request of a stream that has started."""
        session = self.sessions.get(request.stream_id)
        if session is None and request.stream_id in self.superseded:  # else its client would steal it back
            self.outbox.refuse(request, Superseded("stream: resumed by another sequence; allowed: that one"))
        elif session is None or session.tenant != request.tenant:
            what = "stream: never started, ended, failed or idle for too long"
            self.outbox.refuse(request, UnknownStream(f"{what}; allowed: an open stream's sequence id"))
        elif request.control is not None:
            session.seen = time.monotonic()
            self.outbox.reply(request, self.controls.take(session, request.control))
        elif len(session.pending) >= self.config.pending_requests:
            self.outbox.refuse(request, self._too_many(len(session.pending)))
            self._end(session, "error", self._too_many(len(session.pending)))
        else:
            session.seen = time.monotonic()
            session.pending.append(request)
            if request.ends:
                session.paused_at = None

    def _too_many(self, count: int) -> AtCapacity:
        most = self.config.pending_requests
        return AtCapacity(f"requests: {count} of this stream wait; allowed: {most}; retry in 1 s", "requests")

    # The engine thread

    def _run(self, load: Callable[[], StreamEngine], loaded: Future[None]) -> None:
        try:
            self._load(load)
            loaded.set_result(None)
        except BaseException as error:
            loaded.set_exception(error)
            return
        while True:
            try:
                with self.wake:
                    if self.stopping:
                        stop(self)
                        return
                    while self.inbox:
                        self._take(self.inbox.popleft())
                    self.drain.move()
                    now = time.monotonic()
                    self._look(now)
                    waiting = [session for session in self.sessions.values() if session.waits]
                    work = [self._begin(session) for session in choose(waiting, now, self.cost, self.most)]
                    work = [session for session in work if session is not None]
                    if not waiting:
                        self.wake.wait(LOOK_SECONDS)
                if work:
                    self._step(work)
            except Exception as error:  # a bug: those who wait hear of it, and the others go on
                with self.wake:
                    for session in [s for s in self.sessions.values() if s.running or s.pending]:
                        self._end(session, "error", as_fastar_error(error))

    def _take(self, item: Request | tuple[Request, StartOptions, Any]) -> None:
        request = item if isinstance(item, Request) else item[0]
        try:
            if not isinstance(item, Request):
                self._restore(*item)
            elif request.starts:
                if not self._start(request):
                    return  # a snapshot is being read: `starting` holds the stream's other requests
            else:  # an END that generates nothing, of no stream
                self.outbox.reply(request, self._stats())
                return
        except Exception as error:
            if isinstance(error, AtCapacity):
                self.metrics.rejected(error.reason)
            self.outbox.refuse(request, as_fastar_error(error))
        for later in self.starting.pop(request.stream_id, ()):
            self._accept(later)

    def _start(self, request: Request) -> bool:
        """False: the rest follows in `_restore`."""
        check_tenant(request.tenant)
        old = self.sessions.get(request.stream_id)
        if old and old.tenant != request.tenant:
            raise InvalidInput("sequence_id", "is in use", "a random one")
        if old:
            self._end(old, "restarted", Superseded("stream: its sequence id was started anew; allowed: one start"))
        if request.actions == ("end",):
            self.outbox.reply(request, self._stats() | {"world": self.world, "token": None})
            return True
        options = read_options(request.options)
        if options.fps and options.fps > self.config.max_fps:
            raise InvalidInput(
                "OPTIONS.fps", f"got {options.fps:g}", f"null, or more than 0, at most {self.config.max_fps:g}"
            )
        source = options.source
        if source is None:
            self._open(request, options)
            return True
        if request.prompt:
            check_prompt(request.prompt)
        live = next((s for s in self.sessions.values() if s.token == source.token and s.tenant == request.tenant), None)
        if live and (source.chunk is None or self._next_chunk(live) <= source.chunk):
            self._adopt(request, options, live)
            return True
        read = lambda done: self.inbox.append((request, options, done))  # noqa: E731
        self.vault.load(source.token, source.chunk, False, read)
        return False

    def _open(self, request: Request, options: StartOptions) -> None:
        engine_options = StreamOptions(**{name: getattr(options, name) for name in StreamOptions.model_fields})
        booking = Booking(request.tenant, self.engine.bytes_of(engine_options), options.fps)
        self._admit(booking)
        stream = next(self.streams)
        self.engine.open(stream, request.prompt, engine_options)
        self._welcome(request, Session(request, stream, None, options, booking))

    def _adopt(self, request: Request, options: StartOptions, live: Session) -> None:
        """Resumes or forks a live stream. Its buffers are not copied (a fork's when one side first writes)."""
        booking = Booking(request.tenant, live.booking.cache_bytes, options.fps)
        self._admit(booking, leaving=live if options.resume else None)
        session = Session(request, live.stream, live.token if options.resume else None, options, booking)
        if options.resume:
            session.next_control, session.controls = live.next_control, live.controls
            session.stored, session.snapshots_allowed = live.stored, live.snapshots_allowed
            self.vault.take_over(session, self._next_chunk(session))
            self._end(live, "resumed", Superseded("stream: resumed by another sequence; allowed: that one"), free=False)
        else:
            session.stream = next(self.streams)
            self.engine.fork(live.stream, session.stream, options.seed if "seed" in options.model_fields_set else None)
        self._welcome(request, session)

    def _restore(self, request: Request, options: StartOptions, future: Any) -> None:
        if self.stopping:
            raise Stopping("server: it is stopping; allowed: resume later")
        chunk, snapshot = future.result()
        if snapshot.extra.get("tenant") != request.tenant:
            raise UnknownStream(
                "OPTIONS.token: unknown or expired; allowed: a token that a stream's first chunk brought"
            )
        live = next((s for s in self.sessions.values() if s.token == options.source.token), None)
        booking = Booking(request.tenant, snapshot.cache_bytes, options.fps)
        self._admit(booking, leaving=live if options.resume else None)
        stream = next(self.streams)
        self.engine.restore(stream, snapshot)
        token = options.source.token if options.resume else None
        session = Session(request, stream, token, options, booking)
        if options.resume:
            session.adopt(snapshot.extra)
            session.stored = {chunk}
            self.vault.take_over(session, chunk)
            if live:
                self._end(live, "resumed", Superseded("stream: resumed by another sequence; allowed: that one"))
        elif "seed" in options.model_fields_set:
            self.engine.control(stream, "seed", options.seed)
        self._welcome(request, session)

    def _admit(self, booking: Booking, leaving: Session | None = None) -> None:
        held = [session.booking for session in self.sessions.values() if session is not leaving]
        self.admission.check(booking, held, self.retry_seconds)
        self.metrics.admitted()

    @property
    def retry_seconds(self) -> float:
        return min(60.0, self.life / max(1, len(self.sessions)))

    def _welcome(self, request: Request, session: Session) -> None:
        self.sessions[session.id] = session
        self._publish()
        if self.tracing:
            session.trace = self.tracing.stream(request.traceparent, {"fastar.encoding": session.encoding})
        session.pending.append(request)
        if request.prompt and session.resumed:
            self.engine.control(session.stream, "prompt", request.prompt)

    def _next_chunk(self, session: Session) -> int:
        return self.engine.streams[session.stream].chunk

    def _look(self, now: float) -> None:
        """Ends the streams whose client is gone or whose time is over; publishes the load."""
        if now - self.looked < LOOK_SECONDS:
            return
        self.looked = now
        config = self.config
        for session in list(self.sessions.values()):
            if any(request.cancelled() for request in session.pending):
                self._end(session, "cancelled", Superseded("stream: its client went away; allowed: a resume"))
            elif session.fenced:
                self._end(session, "resumed", Superseded("stream: resumed on another server; allowed: that one"))
            elif now - session.opened > config.wall_seconds:
                self._end(session, "wall", expired(f"it lived {config.wall_seconds:g} s"))
            elif session.paused_at is not None and now - session.paused_at > config.paused_seconds:
                self._end(session, "paused", expired(f"it was paused for {config.paused_seconds:g} s"))
            elif not session.pending and now - session.seen > config.idle_seconds:
                self._end(session, "idle", expired(f"it was idle for {config.idle_seconds:g} s"))
        if now - self.swept > 60.0:
            self.swept = now
            self.vault.sweep()
        self._publish()

    def _publish(self) -> None:
        held = [session.booking for session in self.sessions.values()]
        queued = sum(len(session.pending) for session in self.sessions.values())
        paused = sum(session.paused_at is not None for session in self.sessions.values())
        self.metrics.streams(len(held), self.admission.capacity(held), paused)
        self.metrics.load(self.admission.utilisation(held), queued, sum(booking.cache_bytes for booking in held))

    def _begin(self, session: Session) -> Session | None:
        """Puts the controls that wait into effect; None if the stream ended instead."""
        request = session.running = session.pending.popleft()
        session.began, session.due = time.monotonic(), session.playout.deadline(request.arrived)
        try:
            self.controls.apply(session)
            if not request.generates:
                session.running = None
                self._end(session, "end")
                self.outbox.reply(request, self._stats(session))
                return None
            every, chunk = self.config.snapshot_chunks, self._next_chunk(session)
            if every and (chunk == 1 or chunk and chunk % every == 0) and chunk not in session.stored:
                self.vault.save(session)
        except Exception as error:
            self._end(session, "error", as_fastar_error(error))
            return None
        return session

    def _step(self, work: list[Session]) -> None:
        asked = []
        for session in work:
            request = session.running
            prompt = None if request.starts else request.prompt or None
            asked.append(ChunkRequest(session.stream, request.actions, prompt))
        began = time.perf_counter()
        results = self.engine.step(asked)
        with self.wake:
            self.cost.observe(len(work), time.perf_counter() - began)
            self.metrics.step(len(work))
            for session, result in zip(work, results, strict=True):
                if isinstance(result, FastarError):
                    self._end(session, "error", result)
                elif self.sessions.get(session.id) is session:
                    self._finish(session, result)

    def _finish(self, session: Session, chunk: Chunk) -> None:
        request, session.running = session.running, None
        now = session.seen = time.monotonic()
        seconds = session.playout.ready(now, chunk.stats.frames)
        late = {"seconds": seconds, "reason": self._why_late(session, request)} if seconds > 0 else None
        session.resumed = False
        stats = self._stats(session) | chunk.stats.as_json() | {
            "applied": session.applied, "actions": list(request.actions), "late": late,
            "queue_seconds": session.began - request.arrived,
        }  # fmt: skip
        session.applied = []
        if request.starts:
            stats |= {"world": self.world, "token": session.token}
        if session.encoding != "raw" and session.encoder is None:
            height, width = chunk.frames.shape[1:3]
            session.encoder = make_encoder(session.encoding, session.fps or self.world["native_fps"], width, height)
        encoder = session.encoder
        if request.ends:  # before its reply, so that who has seen that finds the slot free
            session.encoder = None
            self._end(session, "end")
        self.outbox.chunk(request, chunk, stats, encoder, session.trace, session.began)
        start, frames = session.window
        frames += chunk.stats.frames
        if now - start >= FPS_WINDOW:
            self.metrics.fps(frames / (now - start))
            start, frames = now, 0
        session.window = (start, frames)

    def _why_late(self, session: Session, request: Request) -> str:
        if session.resumed:
            return "resumed"
        step = self.cost(1)
        if request.arrived > session.due - step:
            return "slow_reader"
        return "queued" if session.began > session.due - step else "step"

    def _end(self, session: Session, reason: str, error: FastarError | None = None, free: bool = True) -> None:
        """The stream is over: what it holds is free, what waits is answered by `error`."""
        if self.sessions.get(session.id) is session:
            del self.sessions[session.id]
        if reason == "resumed":
            self.superseded.append(session.id)
        if reason in ("cancelled", "idle", "paused", "wall", "stopping"):
            self.vault.save(session)
        for request in [*([session.running] if session.running and error else []), *session.pending]:
            self.outbox.refuse(request, error or UnknownStream("stream: it has ended; allowed: requests before END"))
        session.pending.clear()
        if free and self.engine.close(session.stream):
            self.outbox.trim()
        if session.encoder is not None:
            self.outbox.after(session.encoder.close)
        if session.trace:
            session.trace.end(reason)
        self.life += 0.2 * (time.monotonic() - session.opened - self.life)
        self.metrics.ended(reason)
        self._publish()

    # Replies

    def _stats(self, session: Session | None = None) -> dict[str, Any]:
        """What the service says with every reply."""
        return {
            "chunk": -1, "first_frame": 0, "frames": 0, "control": None, "applied": [], "actions": [], "packets": [],
            "received": session.next_control - 1 if session else 0, "encoding": session.encoding if session else "raw",
            "queue_seconds": 0.0, "encode_seconds": 0.0, "late": None,
            "snapshot_chunk": max(session.stored, default=None) if session else None,
        }  # fmt: skip

    stats = _stats


def expired(what: str) -> UnknownStream:
    return UnknownStream(f"stream: {what}; allowed: to resume it by its token")
