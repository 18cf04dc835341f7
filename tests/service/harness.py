"""One client of a `Service`: sends requests, keeps the replies in order."""

from __future__ import annotations

import json
import queue
from typing import Any

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.errors import FastarError
from fastar_backend.service.config import ServiceConfig
from fastar_backend.service.service import Service
from fastar_backend.service.session import Reply, Request
from fastar_backend.service.store import SnapshotStore
from fastar_backend.service.telemetry import MemoryMetrics, Metrics

SMALL = AttentionConfig(budget_frames=6, recent_frames=3)


def make_service(world, folder, tracing=None, **config: Any) -> Service:
    limits = ServiceConfig(**{"deterministic": True, "snapshot_chunks": 0} | config)
    engine = StreamEngine(world, SMALL, deterministic=limits.deterministic)
    store = SnapshotStore(str(folder), limits.snapshots_kept, limits.snapshot_ttl)
    return Service(lambda: engine, limits, Metrics(MemoryMetrics()), store, tracing)


class Client:
    """One sequence."""

    names = iter(range(1, 1 << 60))

    def __init__(self, service: Service, tenant: str = "default") -> None:
        self.service, self.tenant, self.id = service, tenant, next(self.names)
        self.replies: queue.Queue[Reply] = queue.Queue()  # of chunk requests
        self.receipts: queue.Queue[Reply] = queue.Queue()  # of controls
        self.gone = False
        self.migrates = True
        self.controls = 0
        self.token: str | None = None

    def send(self, actions=("",), prompt="", options=None, start=False, end=False, traceparent=None) -> None:
        text = json.dumps(options) if options is not None else ""
        self.service.submit(
            Request(
                self.id,
                self.replies.put,
                tuple(actions),
                prompt,
                text,
                None,
                start,
                end,
                self.tenant,
                traceparent,
                lambda: self.gone,
                self.migrates,
            )  # fmt: skip
        )

    def take(self, timeout: float = 30) -> Reply:
        """Raises the error of an error."""
        reply = self.replies.get(timeout=timeout)
        if reply.error:
            raise reply.error
        self.token = reply.stats.get("token") or self.token
        return reply

    def chunk(self, *args: Any, **kwargs: Any) -> Reply:
        self.send(*args, **kwargs)
        return self.take()

    def open(self, prompt="a dark maze", **options: Any) -> Reply:
        return self.chunk(("",), prompt, options, start=True)

    def post(self, **values: Any) -> None:
        """A control with the next id, or as given; the receipt is not waited for."""
        if values and "id" not in values:
            self.controls += 1
            values = {"id": self.controls, **values}
        request = Request(self.id, self.receipts.put, ("control",), control=json.dumps(values), tenant=self.tenant)
        self.service.submit(request)

    def control(self, **values: Any) -> dict[str, Any]:
        """The receipt's STATS."""
        self.post(**values)
        reply = self.receipts.get(timeout=30)
        if reply.error:
            raise reply.error
        return reply.stats

    def end(self) -> None:
        self.send(("end",), end=True)

    def error(self) -> FastarError:
        """The next reply, which is one."""
        reply = self.replies.get(timeout=30)
        assert reply.error, reply.stats
        return reply.error
