"""What operators see: Prometheus metrics through Triton's /metrics, and one OpenTelemetry trace per stream.

Neither holds a prompt, a token or a tenant. Every metric is in `TABLE`; `docs/grafana.json` shows them.
"""

from __future__ import annotations

import bisect
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fastar_backend.engine.stream import ChunkStats
from fastar_backend.service.report import report

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0)
STORING = (*SECONDS, 30.0, 60.0, 120.0, 300.0)  # gigabytes on their way to a slow store
FPS = (1.0, 4.0, 8.0, 12.0, 14.0, 15.0, 16.0, 20.0, 22.0, 23.0, 24.0, 28.0, 30.0, 48.0, 60.0, 120.0)
STREAMS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
RECALL = (0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 1.0)
ERROR = (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
COUNTERS_EVERY = 0.2  # seconds between writes of the counters
# name: (kind, description, labels, buckets). A histogram is made of three counters: Triton's Python API has none.
TABLE: dict[str, tuple[str, str, tuple[str, ...], tuple[float, ...]]] = {
    "fastar_streams_capacity": ("gauge", "Streams, open and more like them, that this process has a place for", (), ()),
    "fastar_streams_active": ("gauge", "Streams that hold state in this process", (), ()),
    "fastar_streams_paused": ("gauge", "Of these, streams that are paused", (), ()),
    "fastar_streams_admitted_total": ("counter", "Streams admitted", (), ()),
    "fastar_streams_rejected_total": ("counter", "Streams refused", ("reason",), ()),
    "fastar_streams_ended_total": ("counter", "Streams ended", ("reason",), ()),
    "fastar_frames_total": ("counter", "Video frames generated", (), ()),
    "fastar_late_chunks_total": ("counter", "Chunks ready after their viewer needed them", ("reason",), ()),
    "fastar_stream_fps": ("histogram", "Frames per second of a stream, over two seconds", (), FPS),
    "fastar_chunk_seconds": ("histogram", "Seconds of a chunk by phase", ("phase",), SECONDS),
    "fastar_step_streams": ("histogram", "Streams computed in one step", (), STREAMS),
    "fastar_cache_tokens": ("gauge", "Cached keys per head of the last chunk made, mean over layers", (), ()),
    "fastar_cache_bytes": ("gauge", "Bytes booked by the caches of all streams", (), ()),
    "fastar_cache_bytes_capacity": ("gauge", "Bytes that all caches may take", (), ()),
    "fastar_merged_tokens": ("gauge", "History tokens of the last chunk's stream folded into others", (), ()),
    "fastar_density": ("gauge", "Executed / dense query-key pairs of the last chunk made", (), ()),
    "fastar_guard_recall": ("histogram", "Sampled recall of sparse attention, chunk by chunk", (), RECALL),
    "fastar_guard_error": ("histogram", "Sampled relative output error of sparse attention", (), ERROR),
    "fastar_sparse_density": ("gauge", "Share of cached keys attended to in the last guarded chunk", (), ()),
    "fastar_queue_requests": ("gauge", "Chunk requests that wait", (), ()),
    "fastar_utilisation": ("gauge", "Share of the time booked by streams with a frame rate", (), ()),
    "fastar_snapshot_seconds": ("histogram", "Seconds from taking a snapshot until it is stored", (), STORING),
    "fastar_snapshots_total": ("counter", "Snapshots", ("result",), ()),
    "fastar_draining": ("gauge", "1 while the server moves its streams elsewhere to end", (), ()),
    "fastar_migrations_total": ("counter", "Streams sent on to other servers", ("result",), ()),
    "fastar_migration_seconds": (
        "histogram",
        "Seconds from a stream's stop here until it is stored",
        (),
        STORING,
    ),
    "fastar_controls_total": ("counter", "Controls taken", ("kind", "result"), ()),
}


class Metric(Protocol):
    def increment(self, value: float) -> None: ...

    def set(self, value: float) -> None: ...


class Family(Protocol):
    def metric(self, labels: Mapping[str, str]) -> Metric: ...


Factory = Callable[[str, str, str], Family]  # kind ("counter" or "gauge"), name, description


class TritonMetrics:
    """A factory over Triton's custom metrics, whose calls wait for another process and let go of the GIL meanwhile
    (milliseconds each, beside a busy thread), and of which two at a time crash the model process (Triton 2.51). So one
    thread makes them all; the others leave their values here, where they add up. Gauges go first, and at once.
    """

    def __init__(self, pb_utils: Any) -> None:
        self.families = pb_utils.MetricFamily
        self.wake = threading.Condition()
        self.sets: dict[TritonMetric, float] = {}
        self.adds: dict[TritonMetric, float] = {}
        self.batch: dict[TritonMetric, float] = {}  # of `adds`, being written
        self.due = 0.0  # when the next batch may be written
        threading.Thread(target=self._run, name="fastar-metrics", daemon=True).start()

    def __call__(self, kind: str, name: str, description: str) -> Family:
        return TritonFamily(self, {"kind": kind, "name": name, "description": description})

    def _run(self) -> None:
        try:
            while True:
                metric, act, value = self._next()
                getattr(metric.made(), act)(value)
        except Exception as error:  # a server without metrics: streams go on, nobody counts them
            report(error)

    def _next(self) -> tuple[TritonMetric, str, float]:
        with self.wake:
            while True:
                if self.sets:
                    metric = next(iter(self.sets))
                    return metric, "set", self.sets.pop(metric)
                now = time.monotonic()
                if not self.batch and now >= self.due:
                    self.batch, self.adds, self.due = self.adds, {}, now + COUNTERS_EVERY
                if self.batch:
                    metric = next(iter(self.batch))
                    return metric, "increment", self.batch.pop(metric)
                self.wake.wait(max(self.due - now, 0.001) if self.adds else None)


class TritonFamily:
    """Kept by its metrics: it must live as long as they do."""

    def __init__(self, writer: TritonMetrics, values: dict[str, str]) -> None:
        self.writer, self.values, self.family = writer, values, None

    def metric(self, labels: Mapping[str, str]) -> Metric:
        return TritonMetric(self, dict(labels))

    def made(self) -> Any:
        if self.family is None:
            families = self.writer.families
            kind = {"counter": families.COUNTER, "gauge": families.GAUGE}[self.values["kind"]]
            self.family = families(**self.values | {"kind": kind})
        return self.family


class TritonMetric:
    def __init__(self, family: TritonFamily, labels: dict[str, str]) -> None:
        self.family, self.labels, self.metric = family, labels, None
        self.increment(0.0)  # there from now on, as zero

    def increment(self, value: float) -> None:
        writer = self.family.writer
        with writer.wake:
            writer.adds[self] = writer.adds.get(self, 0.0) + value
            writer.wake.notify()

    def set(self, value: float) -> None:
        writer = self.family.writer
        with writer.wake:
            writer.sets[self] = value
            writer.wake.notify()

    def made(self) -> Any:
        """By the writer's thread only."""
        if self.metric is None:
            self.metric = self.family.made().Metric(labels=self.labels)
        return self.metric


def triton_factory(pb_utils: Any) -> Factory:
    return TritonMetrics(pb_utils)


class MemoryMetrics:
    """A factory whose values can be looked at: `values[name][labels]`, labels as a sorted tuple of pairs."""

    def __init__(self) -> None:
        self.values: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}

    def __call__(self, kind: str, name: str, description: str) -> Family:
        values = self.values.setdefault(name, {})

        class One:
            def __init__(self, labels: Mapping[str, str]) -> None:
                self.key = tuple(sorted(labels.items()))
                values[self.key] = 0.0

            def increment(self, value: float) -> None:
                values[self.key] += value

            def set(self, value: float) -> None:
                values[self.key] = value

        class Memory:
            def metric(self, labels: Mapping[str, str]) -> Metric:
                return One(labels)

        return Memory()


class Metrics:
    """The events of the service as metrics. Cheap and thread-safe: the engine's thread calls these, among others."""

    def __init__(self, factory: Factory) -> None:
        self._families: dict[str, Family] = {}
        for name, (kind, description, _, _) in TABLE.items():
            if kind == "histogram":
                for part, what in (("bucket", "at most `le`"), ("sum", "sum"), ("count", "count")):
                    self._families[f"{name}_{part}"] = factory("counter", f"{name}_{part}", f"{description}: {what}")
            else:
                self._families[name] = factory(kind, name, description)
        self._metrics: dict[tuple[str, tuple[tuple[str, str], ...]], Metric] = {}
        self._lock = threading.RLock()
        for name, (kind, _, labels, _) in TABLE.items():
            if not labels and kind != "histogram":
                self._metric(name)  # there from the start, as zero
        self._histogram("fastar_migration_seconds")  # these too: a server that drains is soon gone
        for result in ("stored", "failed"):
            self._metric("fastar_migrations_total", result=result)

    def capacity(self, streams: int, cache_bytes: int) -> None:
        self._metric("fastar_streams_capacity").set(streams)
        self._metric("fastar_cache_bytes_capacity").set(cache_bytes)

    def admitted(self) -> None:
        self._metric("fastar_streams_admitted_total").increment(1)

    def rejected(self, reason: str) -> None:
        self._metric("fastar_streams_rejected_total", reason=reason).increment(1)

    def ended(self, reason: str) -> None:
        self._metric("fastar_streams_ended_total", reason=reason).increment(1)

    def streams(self, active: int, places: int, paused: int) -> None:
        self._metric("fastar_streams_active").set(active)
        self._metric("fastar_streams_capacity").set(places)
        self._metric("fastar_streams_paused").set(paused)

    def load(self, utilisation: float, queued: int, cache_bytes: int) -> None:
        self._metric("fastar_utilisation").set(utilisation)
        self._metric("fastar_queue_requests").set(queued)
        self._metric("fastar_cache_bytes").set(cache_bytes)

    def step(self, streams: int) -> None:
        self._observe("fastar_step_streams", streams)

    def fps(self, value: float) -> None:
        self._observe("fastar_stream_fps", value)

    def chunk(self, stats: ChunkStats, queue_seconds: float, encode_seconds: float, late: str | None) -> None:
        """late: the reason, if it was."""
        self._metric("fastar_frames_total").increment(stats.frames)
        self._metric("fastar_cache_tokens").set(stats.cache_tokens)
        self._metric("fastar_merged_tokens").set(stats.merged_tokens)
        self._metric("fastar_density").set(stats.density)
        if stats.guard_recall is not None:
            self._observe("fastar_guard_recall", stats.guard_recall)
            self._observe("fastar_guard_error", stats.guard_error)
            self._metric("fastar_sparse_density").set(stats.sparse_density)
        for phase, seconds in {"queue": queue_seconds, **stats.phases, "encode": encode_seconds}.items():
            self._observe("fastar_chunk_seconds", seconds, phase=phase)
        if late:
            self._metric("fastar_late_chunks_total", reason=late).increment(1)

    def snapshot(self, seconds: float, stored: bool) -> None:
        self._observe("fastar_snapshot_seconds", seconds)
        self._metric("fastar_snapshots_total", result="stored" if stored else "failed").increment(1)

    def draining(self, draining: bool) -> None:
        self._metric("fastar_draining").set(draining)

    def migrated(self, seconds: float, stored: bool) -> None:
        self._observe("fastar_migration_seconds", seconds)
        self._metric("fastar_migrations_total", result="stored" if stored else "failed").increment(1)

    def control(self, kind: str, taken: bool) -> None:
        self._metric("fastar_controls_total", kind=kind, result="taken" if taken else "refused").increment(1)

    def _metric(self, name: str, **labels: str) -> Metric:
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            if key not in self._metrics:
                self._metrics[key] = self._families[name].metric(labels)
            return self._metrics[key]

    def _histogram(self, name: str, **labels: str) -> None:
        for bound in (*map(str, TABLE[name][3]), "+Inf"):
            self._metric(f"{name}_bucket", **labels, le=bound)
        for part in ("sum", "count"):
            self._metric(f"{name}_{part}", **labels)

    def _observe(self, name: str, value: float, **labels: str) -> None:
        buckets = TABLE[name][3]
        if (f"{name}_count", tuple(sorted(labels.items()))) not in self._metrics:
            self._histogram(name, **labels)
        for bound in (*map(str, buckets[bisect.bisect_left(buckets, value) :]), "+Inf"):
            self._metric(f"{name}_bucket", **labels, le=bound).increment(1)
        self._metric(f"{name}_sum", **labels).increment(value)
        self._metric(f"{name}_count", **labels).increment(1)


class Tracing:
    """Spans to an OTLP collector. Exporting is another thread's work, its queue is bounded, and what does not fit is
    dropped: a collector that hangs or is gone delays no frame."""

    def __init__(self, provider: Any) -> None:
        self.provider = provider
        self.tracer = provider.get_tracer("fastar")

    @classmethod
    def from_environment(cls) -> Tracing | None:
        """As the standard OTEL_* variables say; None, and nothing is even imported, where they name no collector."""
        wanted = any(os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") for name in ("ENDPOINT", "TRACES_ENDPOINT"))
        off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        if not wanted or off or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
            return None
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = os.environ.get("OTEL_SERVICE_NAME", "fastar-serve")
        provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def stream(self, traceparent: str | None, attributes: Mapping[str, Any]) -> StreamTrace:
        """traceparent: W3C, of the client's span or Triton's; a broken one is as good as none."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {})
        return StreamTrace(self.tracer, self.tracer.start_span("fastar.stream", context, attributes=dict(attributes)))

    def close(self, seconds: float) -> None:
        """Sends what is left, for so long: the SDK itself would try a collector that is gone again and again."""
        flush = threading.Thread(target=self.provider.force_flush, daemon=True)
        flush.start()
        flush.join(seconds)


class StreamTrace:
    """The span of one stream, and below it one of each chunk with its phases."""

    def __init__(self, tracer: Any, span: Any) -> None:
        from opentelemetry.trace import set_span_in_context

        self.tracer, self.span, self.within = tracer, span, set_span_in_context
        self.context = set_span_in_context(span)

    def chunk(self, number: int, arrived: float, began: float, phases: Mapping[str, float], encode_seconds: float,
              sent: float, attributes: Mapping[str, Any]) -> None:  # fmt: skip
        """Times in seconds since the epoch; phases in seconds, one after the other from `began`. The last child,
        `send`, holds what remains until `sent`."""
        chunk = self.tracer.start_span(
            "fastar.chunk", self.context, attributes={"fastar.chunk": number, **attributes}, start_time=nanos(arrived)
        )
        inside, at = self.within(chunk), began
        self._child("queue", inside, arrived, began)
        for name, seconds in phases.items():
            self._child(name, inside, at, at + seconds)
            at += seconds
        self._child("encode", inside, at, at + encode_seconds)
        self._child("send", inside, at + encode_seconds, max(sent, at + encode_seconds))
        chunk.end(nanos(sent))

    def _child(self, name: str, context: Any, start: float, end: float) -> None:
        self.tracer.start_span(f"fastar.{name}", context, start_time=nanos(start)).end(nanos(end))

    def event(self, name: str, attributes: Mapping[str, Any]) -> None:
        self.span.add_event(name, dict(attributes))

    def end(self, reason: str) -> None:
        self.span.set_attribute("fastar.ended", reason)
        self.span.end()


def nanos(seconds: float) -> int:
    return int(seconds * 1e9)
