"""Streams that go on elsewhere: each is stored at its next chunk's boundary, and its client told. All, where the server
is to end (a drain); some, where it is to carry fewer (`shed`)."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from fastar_backend.errors import Stopping, UnknownStream
from fastar_backend.service.report import as_fastar_error
from fastar_backend.service.session import Request, Session

if TYPE_CHECKING:
    from fastar_backend.service.service import Service

LINGER_SECONDS = 2.0  # a client that asks for nothing when its stream is stored has so long to ask, and be told
FORGET_SECONDS = 60.0  # and so long where the server goes on; after that it does not know the stream, which is stored
log = logging.getLogger("fastar")


@dataclasses.dataclass(eq=False)
class Leaving:
    """A stream that is no longer ours to step."""

    session: Session
    chunk: int  # the next one
    frame: int  # its first
    since: float  # monotonic seconds
    waiting: list[Request]  # what has come, and is answered once it is known whether the snapshot is stored
    stored: bool | None = None  # None: not known yet
    told: bool = False


class Drain:
    """Guarded by the service's lock. `over` is set when all is stored and told: the server may end."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.began: float | None = None  # monotonic seconds
        self.leaving: dict[int, Leaving] = {}  # by sequence id
        self.settled = 0.0  # when the last stream was stored, or could not be
        self.wanted = 0  # streams still to be shed
        self.over = threading.Event()

    def begin(self) -> None:
        """From any thread. New streams are refused from now on. May be called again."""
        with self.service.wake:
            if self.began is None:
                self.began = self.settled = time.monotonic()
                self.service.metrics.draining(True)
                log.info("draining: %d live streams", len(self.service.sessions))
                self.service.wake.notify()

    def shed(self, streams: int) -> None:
        """From any thread. So many live streams are to go on elsewhere; asked anew, the last number counts."""
        with self.service.wake:
            self.wanted = streams
            self.service.wake.notify()

    def move(self) -> None:
        """Engine thread, between two steps: stores the streams that are at a boundary, which all are but those that
        cannot be stored (they measure recall); these go on until they end."""
        if self.began is None:
            self._shed()
            return
        if self.over.is_set():
            return
        service = self.service
        for session in list(service.sessions.values()):
            if session.snapshots_allowed and session.stream in service.engine.streams:
                self._leave(session)
        unsettled = any(one.stored is None for one in self.leaving.values())
        if service.sessions or service.starting or service.inbox or unsettled:
            return
        told = all(one.told for one in self.leaving.values())
        if told or time.monotonic() - self.settled > LINGER_SECONDS:
            service.outbox.after(self._finish)

    def take(self, request: Request) -> None:
        """A request of a stream that is leaving, or has left."""
        one = self.leaving[request.stream_id]
        if request.tenant != one.session.tenant:
            what = "stream: never started, ended, failed or idle for too long"
            self.service.outbox.refuse(request, UnknownStream(f"{what}; allowed: an open stream's sequence id"))
        elif one.stored is None:
            one.waiting.append(request)
        else:
            self._tell(one, request)

    def _shed(self) -> None:
        """The newest first: they have the least to lose should they not find a place. Only those whose clients know
        what they are told."""
        past = time.monotonic() - FORGET_SECONDS
        for id in [id for id, one in self.leaving.items() if one.stored is not None and one.since < past]:
            del self.leaving[id]
        service = self.service
        fit = [
            session
            for session in service.sessions.values()
            if session.migrates and session.snapshots_allowed and session.stream in service.engine.streams
            and not (session.pending and session.pending[0].starts)
        ]  # fmt: skip
        fit.sort(key=lambda session: session.opened)
        while self.wanted and fit:
            self.wanted -= 1
            self._leave(fit.pop())
        self.wanted = 0

    def _leave(self, session: Session) -> None:
        try:
            self._store(session)
        except Exception as error:
            self.service._end(session, "error", as_fastar_error(error))

    def _store(self, session: Session) -> None:
        service = self.service
        if session.pending and session.pending[0].starts:  # its client has seen nothing of it here
            service._end(session, "drained", Stopping("server: it drains; allowed: another server, or later"))
            return
        stream = service.engine.streams[session.stream]
        one = Leaving(session, stream.chunk, stream.frame, time.monotonic(), list(session.pending))
        service.vault.save(session, lambda stored: self._settle(one, stored))
        session.pending.clear()
        self.leaving[session.id] = one
        service._end(session, "migrated")

    def _settle(self, one: Leaving, stored: bool) -> None:
        """The disk thread, under the lock."""
        now = time.monotonic()
        one.stored, self.settled = stored, now
        self.service.metrics.migrated(now - one.since, stored)
        left = sum(other.stored is None for other in self.leaving.values()) + len(self.service.sessions)
        if stored:
            log.info("moving: a stream is stored (%.2f s), %d are left", now - one.since, left)
        else:
            log.error("moving: a stream could not be stored, it goes on from an older snapshot; %d are left", left)
        for request in one.waiting:
            self._tell(one, request)
        one.waiting.clear()

    def _tell(self, one: Leaving, request: Request) -> None:
        session, outbox = one.session, self.service.outbox
        one.told = True
        if one.stored and session.migrates:
            outbox.reply(request, self.service.stats(session) | {"migrate": migration(one)})
        else:
            outbox.refuse(request, Stopping("server: it is stopping; allowed: resume by the stream's token"))

    def _finish(self) -> None:
        if not self.over.is_set():
            self.over.set()
            log.info("drained: %d streams in %.2f s", len(self.leaving), time.monotonic() - self.began)


def migration(one: Leaving) -> dict[str, Any]:
    """STATS.migrate: where the stream goes on."""
    return {"chunk": one.chunk, "frame": one.frame, "token": one.session.token}


def stop(service: Service) -> None:
    """The end of all that is still there, stored as far as it can be (engine thread, under the lock)."""
    error = Stopping("server: it is stopping; allowed: resume by the stream's token")
    for session in list(service.sessions.values()):
        service._end(session, "stopping", error)
    for held in service.starting.values():
        for request in held:
            service.outbox.refuse(request, error)
    for item in service.inbox:
        service.outbox.refuse(item if isinstance(item, Request) else item[0], error)
