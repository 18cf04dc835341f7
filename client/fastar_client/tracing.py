"""Spans of streams and chunks, where the program has OpenTelemetry set up; else nothing, at no cost.

The package never imports OpenTelemetry: a program that has configured it has imported it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from fastar_client.protocol import Chunk


class StreamTrace:
    """The span `fastar.stream`, and under it one `fastar.chunk` per chunk that the reader takes: from the sending of
    its request to its taking."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        api = sys.modules.get("opentelemetry.trace")
        self._span: Any = None
        if api is not None:
            self._api, self._tracer = api, api.get_tracer("fastar_client")
            span = self._tracer.start_span("fastar.stream", attributes=attributes)
            self._span = span if span.get_span_context().is_valid else None

    @property
    def headers(self) -> dict[str, str]:
        """gRPC metadata that makes the server's spans children of ours."""
        if self._span is None:
            return {}
        context = self._span.get_span_context()
        return {"traceparent": f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"}

    def taken(self, chunk: Chunk) -> None:
        if self._span is None or not self._span.is_recording():
            return
        stats, epoch = chunk.stats, time.time() - time.monotonic()
        attributes = {
            "fastar.chunk": stats.chunk,
            "fastar.frames": len(chunk.frames),
            "fastar.received_seconds": chunk.received_at - chunk.sent_at,
            "fastar.step_seconds": stats.step_seconds,
            "fastar.late": str((stats.late or {}).get("reason", "")),
        }
        span = self._tracer.start_span(
            "fastar.chunk",
            context=self._api.set_span_in_context(self._span),
            start_time=int((epoch + chunk.sent_at) * 1e9),
            attributes=attributes,
        )
        span.end()

    def end(self, error: BaseException | None, attributes: dict[str, Any]) -> None:
        """May be called again."""
        span, self._span = self._span, None
        if span is None:
            return
        for name, value in attributes.items():
            span.set_attribute(name, value)
        if error is not None:
            span.set_status(self._api.Status(self._api.StatusCode.ERROR, type(error).__name__))
        span.end()
