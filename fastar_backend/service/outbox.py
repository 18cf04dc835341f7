"""Replies, by a thread of their own: while it encodes and hands over one chunk, the engine makes the next."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import torch

from fastar_backend.engine.stream import Chunk
from fastar_backend.errors import FastarError
from fastar_backend.service.encode import Encoder
from fastar_backend.service.report import as_fastar_error, quietly
from fastar_backend.service.session import Reply, Request
from fastar_backend.service.telemetry import Metrics, StreamTrace


class Outbox:
    """One thread, so that the replies of a stream keep their order. Whoever has gone is not waited for."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.process = psutil.Process()
        self.thread = ThreadPoolExecutor(1, "fastar-send", torch.set_num_threads, (1,))  # no OpenMP team of its own

    def reply(self, request: Request, stats: dict[str, Any]) -> None:
        stats["process_bytes"] = self.process.memory_info().rss
        self.thread.submit(quietly, request.answer, Reply(stats))

    def refuse(self, request: Request, error: FastarError) -> None:
        self.thread.submit(quietly, request.answer, Reply(error=error))

    def chunk(self, request: Request, chunk: Chunk, stats: dict[str, Any], encoder: Encoder | None,
              trace: StreamTrace | None, began: float) -> None:  # fmt: skip
        """stats: all but what is known only here. began: of the step (seconds, monotonic)."""
        self.thread.submit(self._chunk, request, chunk, stats, encoder, trace, began)

    def after(self, act: Callable[..., Any], *args: Any) -> None:
        """Calls `act` once everything before it has been sent."""
        self.thread.submit(quietly, act, *args)

    def trim(self) -> None:
        """glibc would keep the memory of freed caches for itself."""
        self.after(ctypes.CDLL(None).malloc_trim, 0)

    def close(self) -> None:
        """Returns when all is sent."""
        self.thread.shutdown()

    def _chunk(self, request: Request, chunk: Chunk, stats: dict[str, Any], encoder: Encoder | None,
               trace: StreamTrace | None, began: float) -> None:  # fmt: skip
        started = time.monotonic()
        try:
            packets = encoder.encode(chunk.frames) if encoder else []
            stats["packets"] = [len(packet) for packet in packets]
            stats["encode_seconds"] = time.monotonic() - started
            stats["process_bytes"] = self.process.memory_info().rss
            request.answer(Reply(stats, None if encoder else chunk.frames, b"".join(packets)))
        except Exception as error:
            quietly(request.answer, Reply(error=as_fastar_error(error)))
            return
        late = stats["late"]["reason"] if stats["late"] else None
        self.metrics.chunk(chunk.stats, stats["queue_seconds"], stats["encode_seconds"], late)
        if trace:
            epoch = time.time() - time.monotonic()
            guard = {name: getattr(chunk.stats, name) for name in ("guard_recall", "guard_error", "sparse_density")}
            quietly(
                trace.chunk,
                chunk.stats.chunk, epoch + request.arrived, epoch + began, chunk.stats.phases,
                stats["encode_seconds"], epoch + time.monotonic(),
                {"fastar.density": chunk.stats.density, "fastar.merged_tokens": chunk.stats.merged_tokens,
                 "fastar.batch": chunk.stats.batch, "fastar.late": late or ""}
                | {f"fastar.{name}": value for name, value in guard.items() if value is not None},
            )  # fmt: skip
