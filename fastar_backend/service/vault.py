"""Snapshots of live streams, written and read by a thread of their own: a slow or broken store delays no chunk."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition

import torch

from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.snapshot import Snapshot
from fastar_backend.errors import Superseded, UnknownStream
from fastar_backend.service.report import quietly
from fastar_backend.service.session import Session
from fastar_backend.service.store import Store
from fastar_backend.service.telemetry import Metrics

SAVING = 2  # snapshots of one stream on their way to the store; more would only pile up


class Vault:
    """`wake`: the service's lock, notified when a snapshot was read."""

    def __init__(self, store: Store, engine: StreamEngine, kept: int, metrics: Metrics, wake: Condition) -> None:
        self.store, self.engine, self.kept, self.metrics, self.wake = store, engine, kept, metrics, wake
        self.disk = ThreadPoolExecutor(1, "fastar-snapshots", torch.set_num_threads, (1,))  # no OpenMP team of its own

    def save(self, session: Session, then: Callable[[bool], None] | None = None) -> None:
        """Takes a snapshot now (engine thread, under the lock), to be stored in the background. Not of a stream that
        has failed or measures recall, nor while earlier ones wait; with `then`, which is called under the lock with
        whether it was stored, earlier ones do not count."""
        many = then is None and session.saving >= SAVING
        if session.stream not in self.engine.streams or not session.snapshots_allowed or many:
            return
        snapshot, began = self.engine.snapshot(session.stream, extra=session.extra()), time.perf_counter()
        session.saving += 1
        self.disk.submit(self._store, session, snapshot, began, then)

    def _store(self, session: Session, snapshot: Snapshot, began: float, then: Callable[[bool], None] | None) -> None:
        stored = quietly(self._put, session, snapshot)
        with self.wake:
            session.saving -= 1
            if stored:
                session.stored = set(sorted({*session.stored, snapshot.chunk})[-self.kept :])
            if then is not None:
                then(stored)
                self.wake.notify()
        self.metrics.snapshot(time.perf_counter() - began, stored)

    def _put(self, session: Session, snapshot: Snapshot) -> None:
        self._own(session)
        try:
            self.store.put(session.token, snapshot.chunk, snapshot.to_bytes(), session.epoch)
        except Superseded:
            session.fenced = True
            raise

    def _own(self, session: Session) -> None:
        if session.epoch is None:
            session.epoch = self.store.claim(session.token, session.taken_at)

    def take_over(self, session: Session, chunk: int) -> None:
        """After a resume at `chunk`, here or of what another server made: the stream is ours, its old owner writes no
        more."""
        session.epoch, session.taken_at = None, chunk
        self.forget_later(session, chunk)

    def forget_later(self, session: Session, chunk: int) -> None:
        """After a rewind or a resume at `chunk`: snapshots of the future that did not come are nobody's past."""
        self.disk.submit(quietly, self._forget_later, session, chunk)

    def _forget_later(self, session: Session, chunk: int) -> None:
        with self.wake:
            session.stored = {number for number in session.stored if number <= chunk}
        self._own(session)
        self.store.drop(session.token, chunk, session.epoch)

    def load(self, token: str, chunk: int | None, exact: bool, then: Callable[[Future], None]) -> Future:
        """(chunk, Snapshot) of the newest that is not later than `chunk` (exactly it, if `exact`); None: the newest.
        `then` is called under the lock."""

        def done(future: Future) -> None:
            with self.wake:
                then(future)
                self.wake.notify()

        future = self.disk.submit(self._load, token, chunk, exact)
        future.add_done_callback(done)
        return future

    def _load(self, token: str, chunk: int | None, exact: bool) -> tuple[int, Snapshot]:
        there = [number for number in self.store.chunks(token) if chunk is None or number <= chunk]
        if not there or (exact and chunk not in there):
            what = "unknown or expired token, or no snapshot that early"
            raise UnknownStream(f"OPTIONS.token: {what}; allowed: a token that a stream's first chunk brought")
        number, data = self.store.get(token, max(there))
        return number, Snapshot.from_bytes(data)

    def sweep(self) -> None:
        self.disk.submit(quietly, self.store.sweep)

    def close(self) -> None:
        """Returns when all is stored."""
        self.disk.shutdown()
