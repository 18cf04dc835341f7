"""Many streams on one real server: steered, cut off, killed under way, resumed; watched and protected."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import trustme
from conftest import FREE_PORTS, SMALL
from fastar_client import InvalidArgument, NotFound, ServerUnavailable, TlsFiles, connect, connect_blocking
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families
from serve_raw import Refused, Stream, gone, metric, until

from fastar_backend.errors import InvalidInput
from fastar_backend.serve import Server, ServeSettings
from fastar_backend.service.telemetry import TABLE

pytestmark = pytest.mark.server

PROMPT = "walking through a maze"
GUARDED = SMALL | {"sparse_density": 0.3, "sparse_block": 6, "guard": "hold", "recall_floor": 0.5}


def settings_of(world, **values) -> ServeSettings:
    common = {"world": str(world), "device": "cpu", "attention": SMALL, "deterministic": True, "threads": 1,
              "exit_timeout": 3}  # fmt: skip
    return ServeSettings(**FREE_PORTS | common | values)


@pytest.fixture(scope="module")
def steady(tiny_world):
    """Deterministic, so that streams can be compared to the bit; a snapshot every 4 chunks."""
    with Server(settings_of(tiny_world, max_streams=6, snapshot_chunks=4, idle_seconds=20)) as server:
        yield server


async def take(stream, count: int) -> list[np.ndarray]:
    return [(await anext(stream)).frames for _ in range(count)]


def alone(server: Server, chunks: int, seed: int = 1) -> list[np.ndarray]:
    """A stream that nothing happens to."""

    async def run():
        async with connect(server.grpc_url) as c, c.stream(PROMPT, actions="forward", seed=seed) as stream:
            return await take(stream, chunks)

    return asyncio.run(run())


def equal(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


# Steering


def test_a_control_overtakes_the_chunk_that_is_being_made(fake_server):
    with Stream(fake_server.grpc_url) as stream:
        stream.chunk(prompt=PROMPT, start=True)
        stream.send(["stall"])  # 3 s
        stream.send(["forward"])
        time.sleep(0.5)
        began = time.monotonic()
        receipt = stream.control(id=1, action="turn_left")
        assert time.monotonic() - began < 1.0
        assert receipt["control"] == {"id": 1, "error": None}
        assert stream.reply()[1]["actions"] == ["stall"]
        stats = stream.reply()[1]
        assert (stats["actions"], stats["applied"]) == (["turn_left"], [1])
        stream.chunk(["end"], end=True)


def test_controls_belong_to_control_requests(steady):
    with Stream(steady.grpc_url) as stream:
        stream.chunk(prompt=PROMPT, start=True)
        assert "INVALID_ARGUMENT" in stream.control(id=1, fly=1)["control"]["error"]
        assert stream.chunk(end=True)[1]["chunk"] == 1, "a refused control ends nothing"


def test_receipts_rewind_and_encodings_through_the_client(steady):
    async def run():
        async with connect(steady.grpc_url) as c, c.stream(PROMPT, actions="forward", seed=1) as stream:
            first = await take(stream, 3)
            receipt = await stream.set_encoding("h264")
            await receipt.received()
            while (chunk := await anext(stream)).stats.encoding == "raw":
                first.append(chunk.frames)
            assert chunk.frames.shape == first[0].shape
            assert await receipt.applied() == chunk.stats.chunk
            refused = await stream.prompt("a lake")
            await refused.received()
            with pytest.raises(InvalidArgument, match="density"):
                await (await stream.set_density(7)).received()
            return first

    first = asyncio.run(run())
    assert equal(first, alone(steady, len(first)))


def test_interleaved_streams_with_everything_equal_their_solo_runs(steady):
    async def one(c, seed):
        frames = []
        async with c.stream(PROMPT, actions="forward", seed=seed) as stream:
            for _ in range(6):
                frames += await take(stream, 1)
                await asyncio.sleep(0.01 * (seed % 3))
        return frames

    async def run():
        async with connect(steady.grpc_url) as c:
            return await asyncio.gather(*(one(c, seed) for seed in range(6)))

    for seed, frames in enumerate(asyncio.run(run())):
        assert equal(frames, alone(steady, 6, seed)), seed


# Life and death


def scrape(server: Server) -> str:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as reply:
        return reply.read().decode()


def test_a_cancelled_stream_frees_its_slot_at_once(fake_server):
    stream = Stream(fake_server.grpc_url)
    stream.chunk(prompt=PROMPT, start=True)
    stream.send(["stall"])
    stream.send()
    stream.send()
    time.sleep(0.3)
    stream.vanish()
    assert until(lambda: 'fastar_streams_ended_total{reason="cancelled"}' in scrape(fake_server), 5)
    assert metric(fake_server, "fastar_streams_active") == 0


def killed_under_way(server: Server, kill) -> tuple[list[np.ndarray], int]:
    async def run():
        frames = []
        connection = connect(server.grpc_url, reconnect_seconds=60)
        async with connection as c, c.stream(PROMPT, actions="forward", seed=1) as stream:
            frames += await take(stream, 7)
            kill()
            frames += await take(stream, 7)
            return frames, stream.reconnects

    return asyncio.run(run())


@pytest.mark.parametrize("victim", ["model process", "tritonserver"])
def test_a_killed_server_is_replaced_and_its_streams_go_on(steady, victim):
    expected = alone(steady, 14)
    (model,) = steady.model_processes
    process = model if victim == "model process" else model.parent()
    frames, reconnects = killed_under_way(steady, process.kill)
    assert reconnects >= 1
    assert equal(frames, expected), "the viewer saw a pause, and not one frame else"
    assert gone([process])
    assert until(lambda: metric(steady, "fastar_streams_active") == 0, 10)


def test_a_stream_moves_to_another_server(tiny_world, tmp_path, steady):
    """SIGTERM with a busy stream and a paused one; both go on elsewhere from the same store."""
    store = str(tmp_path / "store")

    async def first(url):
        async with connect(url, reconnect_seconds=0) as c:
            busy = c.stream(PROMPT, actions="forward", seed=1)
            frames = await take(busy, 6)
            token = busy.token
            await (await busy.snapshot()).received()
            frames += await take(busy, 1)
            await asyncio.sleep(0.5)
            return token, frames, busy

    async def second(url, token):
        async with connect(url) as c, c.resume(token, actions="forward") as stream:
            chunk = await anext(stream)
            return chunk.stats.chunk, [chunk.frames, *await take(stream, 2)]

    values = {"snapshots": store, "snapshot_chunks": 2, "exit_timeout": 2}
    with Server(settings_of(tiny_world, **values)) as server:
        token, frames, _ = asyncio.run(first(server.grpc_url))
    with Server(settings_of(tiny_world, **values)) as server:
        chunk, more = asyncio.run(second(server.grpc_url, token))
    assert 4 <= chunk <= 8
    assert equal(more, alone(steady, chunk + 3)[chunk:])
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert files
    assert not any(token in str(path) or token.encode() in path.read_bytes() for path in files)


def test_bad_tokens(steady):
    with connect_blocking(steady.grpc_url) as c, pytest.raises(NotFound):
        next(iter(c.resume("x" * 43)))
    with connect_blocking(steady.grpc_url, tenant="a") as c:
        stream = c.stream(PROMPT)
        next(iter(stream))
        with connect_blocking(steady.grpc_url, tenant="b") as thief, pytest.raises(NotFound):
            next(iter(thief.fork(stream.token)))
        stream.close()


# Eyes


def test_every_metric_is_there_under_its_name(steady):
    with Stream(steady.grpc_url) as stream:
        stream.chunk(prompt=PROMPT, options={"fps": 20.0, "attention": GUARDED}, start=True)
        time.sleep(1.0)
        stream.chunk()
        stream.control(id=1, snapshot=True)
        stream.chunk(end=True)
    time.sleep(0.5)
    text = scrape(steady)
    assert list(text_string_to_metric_families(text)), "not what Prometheus reads"
    names = set(re.findall(r"^(\w+)[{ ]", text, re.MULTILINE))
    for name, (kind, *_) in TABLE.items():
        if name in ("fastar_streams_rejected_total", "fastar_stream_fps"):  # appear with the first such event
            continue
        for suffix in ("_bucket", "_sum", "_count") if kind == "histogram" else ("",):
            assert f"{name}{suffix}" in names, name
    assert PROMPT not in text
    late = [line for line in text.splitlines() if line.startswith("fastar_late_chunks_total{")]
    assert any('reason="slow_reader"' in line for line in late)
    assert metric(steady, "fastar_guard_recall_count") == 3
    assert 0 < metric(steady, "fastar_guard_recall_sum") < 3
    assert metric(steady, "fastar_guard_error_sum") > 0
    assert metric(steady, "fastar_sparse_density") == 0.3


class Receiver:
    """A real OTLP/HTTP collector."""

    def __enter__(self) -> Receiver:
        self.spans, self.tritons = spans, tritons = [], []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                if self.headers["Content-Type"] == "application/json":  # Triton's
                    for resource in json.loads(body)["resourceSpans"]:
                        for scope in resource["scopeSpans"]:
                            tritons.extend(scope["spans"])
                else:
                    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                        for scope in resource.scope_spans:
                            spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_one_trace_from_the_clients_span_to_every_phase(tiny_world, monkeypatch):
    with Receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        with Server(settings_of(tiny_world, attention=GUARDED)) as server:
            stream = Stream(server.grpc_url, headers={"traceparent": f"00-{trace}-{parent}-01"})
            stats = [stream.chunk(prompt=PROMPT, start=True)[1], stream.chunk(end=True)[1]]
            stream.close()
            assert until(lambda: any(span.name == "fastar.stream" for span in receiver.spans), 20)
        spans = [span for span in receiver.spans if span.trace_id.hex() == trace]
    (root,) = [span for span in spans if span.name == "fastar.stream"]
    assert root.parent_span_id.hex() == parent
    chunks = [span for span in spans if span.name == "fastar.chunk"]
    assert len(chunks) == 2
    assert {span.parent_span_id for span in chunks} == {root.span_id}
    for chunk in chunks:
        inside = {span.name for span in spans if span.parent_span_id == chunk.span_id}
        phases = ("queue", "prepare", "denoise", "write", "decode", "encode", "send")
        assert inside == {f"fastar.{phase}" for phase in phases}
    told = [{item.key: item.value.double_value for item in span.attributes} for span in chunks]
    for name in ("guard_recall", "guard_error", "sparse_density"):
        assert [values[f"fastar.{name}"] for values in told] == [values[name] for values in stats], name
    assert all(0 < values["guard_recall"] < 1 for values in stats)
    assert not any(PROMPT in str(span) for span in spans)


def test_tritons_own_span_is_the_streams_parent(tiny_world, monkeypatch):
    with Receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        with Server(settings_of(tiny_world, trace_rate=1)) as server:
            stream = Stream(server.grpc_url, headers={"traceparent": f"00-{trace}-{parent}-01"})
            stream.chunk(prompt=PROMPT, start=True)
            stream.chunk(end=True)
            stream.close()
            mine = lambda: [span for span in receiver.spans if span.name == "fastar.stream"]  # noqa: E731
            assert until(lambda: mine() and receiver.tritons, 20)
        (root,) = [span for span in mine() if span.trace_id.hex() == trace]
        spans = {span["spanId"]: span for span in receiver.tritons if span["traceId"] == trace}
    assert root.parent_span_id.hex() in spans, "below Triton's, which is below the client's"
    above = spans[root.parent_span_id.hex()]
    while above.get("parentSpanId") in spans:
        above = spans[above["parentSpanId"]]
    assert above["parentSpanId"] == parent


def test_tritons_trace_needs_a_collector(tiny_world, monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    with pytest.raises(ValueError, match="set OTEL_EXPORTER_OTLP_ENDPOINT"):
        settings_of(tiny_world, trace_rate=1)


def test_a_dead_collector_delays_nothing_and_sigterm_with_a_busy_stream_is_bounded_and_typed(tiny_world, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    server = Server(settings_of(tiny_world, exit_timeout=2))
    server.start()
    processes = server.model_processes

    async def run():
        async with connect(server.grpc_url, reconnect_seconds=0) as c:
            stream = c.stream(PROMPT)
            began = time.monotonic()
            await take(stream, 20)
            assert time.monotonic() - began < 10
            threading.Thread(target=server.stop).start()
            async for _ in stream:
                pass

    began = time.monotonic()
    with pytest.raises(Exception) as failed:  # noqa: PT011
        asyncio.run(run())
    assert type(failed.value).__name__ in ("StreamLost", "ServerUnavailable")
    assert time.monotonic() - began < 35
    assert until(lambda: gone(processes), 10)


# Security


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("server", "client"):
        certificate = authority.issue_cert("localhost" if name == "server" else "viewer.example")
        certificate.private_key_pem.write_to_path(folder / f"{name}.key")
        with open(folder / f"{name}.pem", "wb") as file:
            for part in certificate.cert_chain_pems:
                file.write(part.bytes())
    return folder


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(tiny_world, certificates, mutual):
    files = {"tls_certificate": certificates / "server.pem", "tls_key": certificates / "server.key"}
    if mutual:
        files["tls_client_ca"] = certificates / "ca.pem"
    with Server(settings_of(tiny_world, canary_seconds=0.5, **files)) as server:
        url = f"localhost:{server.ports['grpc']}"
        mine = {"certificate": certificates / "client.pem", "key": certificates / "client.key"} if mutual else {}
        with connect_blocking(url, tls=TlsFiles(ca=certificates / "ca.pem", **mine)) as c:
            chunk = next(iter(c.stream(PROMPT)))
            assert chunk.frames.std() > 1
        if mutual:
            with pytest.raises(ServerUnavailable), connect_blocking(url, tls=TlsFiles(ca=certificates / "ca.pem")):
                pass
        with pytest.raises(ServerUnavailable), connect_blocking(url, connect_timeout=2):
            pass
        time.sleep(1.2)
        assert server.restarts == 0, "the health check speaks TLS, too"


def test_tls_files_that_are_not_there(tiny_world, tmp_path):
    files = {"tls_certificate": tmp_path / "no.pem", "tls_key": tmp_path / "no.key"}
    with pytest.raises(InvalidInput, match="--tls-certificate: cannot read .*no.pem; allowed: a PEM file"):
        Server(settings_of(tiny_world, **files)).start()


def test_fuzzed_requests_break_nothing(steady):
    """Random values, shapes, ids and order, from many sequences; the 10,000 of benchmarks/serving are like these."""
    from benchmarks.serving import fuzz

    (model,) = steady.model_processes
    report = fuzz.run(steady.grpc_url, requests=600, seed=int(os.environ.get("FUZZ_SEED", "1")))
    assert report["answered"] > 0
    assert steady.model_processes == [model], "the model process was replaced"
    assert until(lambda: metric(steady, "fastar_streams_active") == 0, 40)
    assert equal(alone(steady, 3), alone(steady, 3))


def test_metrics_and_logs_hold_no_prompt(steady, caplog):
    secret = "xylophone-orchard"
    with Stream(steady.grpc_url) as stream:
        stream.chunk(prompt=secret, start=True)
        stream.control(id=1, prompt=f"{secret} again")
        stream.send(["fly"])
        with pytest.raises(Refused) as refused:
            stream.reply()
    assert secret not in scrape(steady)
    assert secret not in caplog.text + str(refused.value)
