"""Encodings, store, metrics and traces of the service, each alone."""

from __future__ import annotations

import io
import json
import os
import re
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from fastar_backend.engine.stream import ChunkStats
from fastar_backend.errors import UnknownStream
from fastar_backend.service.encode import make_encoder
from fastar_backend.service.store import SnapshotStore, StoreError, open_store
from fastar_backend.service.telemetry import TABLE, MemoryMetrics, Metrics, Tracing

# Encodings


def moving(frames: int, height: int, width: int) -> np.ndarray:
    """A smooth picture that moves."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x + 3 * t) / 17 + c) + np.cos((y - 2 * t) / 13 + c) for t in range(frames) for c in range(3)]
    return ((np.array(waves).reshape(frames, 3, height, width) + 2) * 63).astype(np.uint8).transpose(0, 2, 3, 1).copy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def h264(packets: list[bytes]) -> np.ndarray:
    decoder = av.CodecContext.create("h264", "r")
    frames = [frame for packet in packets for frame in decoder.decode(av.Packet(packet))]
    return np.array([frame.to_ndarray(format="rgb24") for frame in [*frames, *decoder.decode(None)]])


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (240, 320)])
def test_jpeg_and_h264_show_the_picture(size):
    video = moving(12, *size)
    jpeg, stream = make_encoder("jpeg", 24, size[1], size[0]), make_encoder("h264", 24, size[1], size[0])
    pictures = [np.asarray(Image.open(io.BytesIO(packet))) for packet in jpeg.encode(video)]
    assert psnr(np.array(pictures), video) > 30
    packets = [packet for chunk in np.split(video, 3) for packet in stream.encode(chunk)]
    assert len(packets) == 12
    shown = h264(packets)[:, : size[0], : size[1]]
    assert psnr(shown, video) > 30
    assert sum(map(len, packets)) < video.nbytes / 20
    assert make_encoder("raw", 24, 8, 8) is None


def test_every_packet_can_be_shown_at_once():
    """No frame waits for a later one: what was sent so far decodes to as many frames."""
    video, stream = moving(9, 64, 96), make_encoder("h264", 24, 96, 64)
    packets = []
    for index, frame in enumerate(video):
        packets += stream.encode(frame[None])
        assert len(h264(packets)) == index + 1


# Store


@pytest.fixture(params=["folder", "memory", "redis"])
def store(request, tmp_path):
    urls = {"folder": str(tmp_path / "store"), "memory": f"memory://{tmp_path.name}"}
    return open_store(urls.get(request.param) or request.getfixturevalue("redis").url, keep=2, ttl=3600)


def test_what_is_stored_comes_back(store):
    assert store.chunks("token") == []
    for chunk in (3, 5, 9):
        store.put("token", chunk, b"x" * chunk)
    store.put("other", 1, b"o")
    assert store.chunks("token") == [5, 9]
    assert store.get("token") == (9, b"x" * 9)
    assert store.get("token", 5) == (5, b"x" * 5)
    with pytest.raises(UnknownStream, match="allowed: 5, 9"):
        store.get("token", 3)
    with pytest.raises(UnknownStream):
        store.get("unknown")
    store.drop("token", after=5)
    assert store.chunks("token") == [5]
    store.drop("token")
    store.drop("token")
    assert store.chunks("token") == []
    assert store.get("other") == (1, b"o")


def test_old_snapshots_are_swept(tmp_path):
    store = SnapshotStore(str(tmp_path), keep=2, ttl=100)
    store.put("old", 1, b"o")
    store.put("new", 1, b"n")
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"o"]
    os.utime(file, (time.time() - 200,) * 2)
    store.sweep()
    assert store.chunks("old") == []
    assert store.chunks("new") == [1]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("store", ["folder", "memory"], indirect=True)
def test_a_write_that_breaks_leaves_nothing_half(store, monkeypatch):
    store.put("token", 1, b"whole")
    monkeypatch.setattr(store.files, "mv", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="cannot write .No space left on device.; allowed: "):
        store.put("token", 2, b"half")
    assert store.chunks("token") == [1]
    assert store.get("token") == (1, b"whole")


def test_errors_do_not_show_the_url():
    with pytest.raises(StoreError) as refused:
        SnapshotStore("nosuch://user:secret@host/bucket", 2, 100)
    assert "secret" not in str(refused.value)


# Metrics


def stats(**values) -> ChunkStats:
    common = {"chunk": 1, "first_frame": 4, "frames": 4, "cache_tokens": 9.0, "cache_bytes": 1, "density": 0.5}
    more = {"recall": None, "merged_tokens": 2.0, "text_tokens": 3.0, "step_seconds": 0.1, "batch": 2}
    phases = {"prepare": 0.001, "denoise": 0.05, "write": 0.02, "decode": 0.01}
    return ChunkStats(**common | more | {"prompt_applied": False, "phases": phases} | values)


def test_events_are_counted():
    memory = MemoryMetrics()
    metrics = Metrics(memory)
    metrics.chunk(stats(), 0.002, 0.004, "queued")
    metrics.chunk(stats(), 0.002, 0.004, None)
    metrics.rejected("fps")
    assert memory.values["fastar_frames_total"][()] == 8
    assert memory.values["fastar_late_chunks_total"][(("reason", "queued"),)] == 1
    assert memory.values["fastar_streams_rejected_total"][(("reason", "fps"),)] == 1
    buckets = {
        dict(labels)["le"]: value
        for labels, value in memory.values["fastar_chunk_seconds_bucket"].items()
        if dict(labels)["phase"] == "denoise"
    }
    assert buckets["0.03"] == 0
    assert buckets["0.1"] == buckets["10.0"] == buckets["+Inf"] == 2
    assert memory.values["fastar_chunk_seconds_sum"][(("phase", "denoise"),)] == pytest.approx(0.1)
    assert memory.values["fastar_chunk_seconds_count"][(("phase", "denoise"),)] == 2


def test_the_guards_figures_are_counted_where_it_is_on():
    memory = MemoryMetrics()
    metrics = Metrics(memory)
    metrics.chunk(stats(), 0.0, 0.0, None)
    assert memory.values["fastar_guard_recall_count"] == {}
    for recall in (0.91, 0.96):
        metrics.chunk(stats(guard_recall=recall, guard_error=0.04, sparse_density=0.3), 0.0, 0.0, None)
    buckets = {dict(labels)["le"]: value for labels, value in memory.values["fastar_guard_recall_bucket"].items()}
    assert (buckets["0.9"], buckets["0.95"], buckets["0.97"], buckets["+Inf"]) == (0, 1, 2, 2)
    assert memory.values["fastar_guard_error_sum"][()] == pytest.approx(0.08)
    assert memory.values["fastar_sparse_density"][()] == 0.3


def test_the_dashboard_shows_metrics_that_exist_and_all_of_them():
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    used = set(re.findall(r"fastar_\w+", " ".join(queries)))
    known = {
        name if kind != "histogram" else f"{name}_{part}"
        for name, (kind, *_) in TABLE.items()
        for part in (("bucket", "sum", "count") if kind == "histogram" else ("",))
    }
    assert used <= known
    shown = {name for name in TABLE if any(name in query for query in queries)}
    assert shown == set(TABLE)


def test_a_chunk_costs_telemetry_little():
    """Less than a thousandth of a chunk of the embedded world."""
    metrics = Metrics(MemoryMetrics())
    began = time.perf_counter()
    for _ in range(200):
        metrics.chunk(stats(), 0.002, 0.004, None)
    assert (time.perf_counter() - began) / 200 < 0.001


# Traces


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_no_traces_unless_asked(monkeypatch, variables):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Tracing.from_environment() is None


def test_a_dead_collector_does_not_hold_up_a_chunk(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracing = Tracing.from_environment()
    trace = tracing.stream("nonsense", {})
    began = time.perf_counter()
    for number in range(500):
        trace.chunk(number, 1.0, 1.1, {"denoise": 0.1}, 0.0, 1.3, {})
    trace.end("end")
    assert time.perf_counter() - began < 50, "each would wait for a second"
    began = time.perf_counter()
    tracing.close(1.0)
    assert time.perf_counter() - began < 2
