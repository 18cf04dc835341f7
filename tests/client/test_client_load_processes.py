"""A load test's processes as one: what they report together, and how they end together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
from live import LiveServer
from PIL import Image
from scripted import BUSY, threaded_server
from test_client_load_cli import COMMAND, report, run, write

PERIOD = 0.2  # 4 frames at 20 FPS


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@BUSY
def test_a_test_that_is_passed(tmp_path):
    server = LiveServer(step_seconds=0.02)
    scenario = write(tmp_path / "s.json", disconnect_share=0.34)
    with threaded_server(server) as url:
        done = run("run", scenario, "--url", url, "--processes", "2", "--out", str(tmp_path / "new" / "out"))
    assert done.returncode == 0, done.stderr
    assert "3 streams: " in done.stdout
    assert "kept" in done.stdout
    assert "MISSED" not in done.stdout
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.png"]
    found = report(out)
    assert (found["met"], found["interrupted"], found["url"], found["processes"]) == (True, False, url, 2)
    assert found["totals"]["outcomes"] == {"completed": 2, "disconnected": 1}
    assert [stream["planned"]["number"] for stream in found["streams"]] == [0, 1, 2]
    assert found["scenario"]["actions"] == ["forward", "turn_left", ""]  # the world's
    check_against_raw_times(found)
    page = (out / "report.html").read_text()
    assert "SLO met" in page
    assert "data:image/png;base64," in page
    assert f"<td>{found['totals']['ttfc']['max']:.3g}</td>" in page
    with Image.open(out / "report.png") as picture:
        assert picture.width > 1000
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def check_against_raw_times(found: dict) -> None:
    """The totals of the report are what its own raw times say."""
    fps, ttfc, jitter, controls = [], [], [], []
    for stream in found["streams"]:
        chunks, ended = stream["chunks"], stream["ended"]
        received, frames = np.array(chunks["received"]), np.array(chunks["frames"])
        full = max(0, chunks["cache_tokens"].index(max(chunks["cache_tokens"])))
        fps.append(frames[full + 1 :].sum() / (max(received[-1], ended - PERIOD) - received[full]))
        ttfc.append(received[0] - stream["planned"]["at"])
        own = abs(np.diff(received[full:]) - frames[full + 1 :] / 20).tolist()
        assert stream["figures"]["jitter"]["p95"] == pytest.approx(np.percentile(own, 95), abs=1e-4)
        jitter += own
        controls += [c["applied"] - c["due"] for c in stream["controls"] if c["applied"] is not None]
    totals = found["totals"]
    assert totals["fps"]["p5"] == pytest.approx(np.percentile(fps, 5), rel=1e-4)
    assert totals["fps"]["min"] == pytest.approx(min(fps), rel=1e-4)
    assert totals["ttfc"]["p95"] == pytest.approx(np.percentile(ttfc, 95), rel=1e-3)
    assert totals["jitter"]["p99"] == pytest.approx(np.percentile(jitter, 99), abs=1e-4)
    assert totals["control"]["p50"] == pytest.approx(np.percentile(controls, 50), abs=0.02)


def test_a_signal_ends_the_test_and_keeps_its_report(tmp_path):
    server = LiveServer(step_seconds=0.02)
    with threaded_server(server) as url:
        arguments = ["run", "hold", "--streams", "3", "--seconds", "60", "--processes", "2", "--url", url]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([*COMMAND, *arguments, "--out", str(tmp_path)], **pipes) as client:
            wait_for(lambda: len(server.made) >= 12)
            processes = psutil.Process(client.pid).children(recursive=True)
            client.send_signal(signal.SIGINT)
            stdout, stderr = client.communicate(timeout=20)
        assert client.returncode == 130, stderr
        assert "Traceback" not in stderr
        assert "was interrupted" in stdout
    found = report(tmp_path)
    assert found["interrupted"] is True
    assert found["totals"]["not_run"] + found["totals"]["outcomes"]["interrupted"] == 3
    assert sum(map(len, (s["chunks"]["sent"] for s in found["streams"]))) >= 8
    assert psutil.wait_procs(processes, timeout=5)[1] == []


def test_a_load_process_that_dies_is_told(tmp_path):
    server = LiveServer(step_seconds=0.02)
    with threaded_server(server) as url:
        scenario = write(tmp_path / "s.json", session_seconds=[4, 4])
        arguments = ["run", scenario, "--processes", "2", "--url", url, "--out", str(tmp_path), "--no-plots"]
        with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True) as client:
            wait_for(lambda: len(server.made) >= 12)
            workers = psutil.Process(client.pid).children(recursive=True)
            doomed = [p for p in workers if "spawn_main" in " ".join(p.cmdline())][-1]
            doomed.kill()
            _, stderr = client.communicate(timeout=20)
    assert client.returncode == 1
    assert "died (exit code -9)" in stderr
    found = report(tmp_path)
    assert found["totals"]["not_run"] == 3 - len(found["streams"]) > 0
    assert any("in no figure" in line for line in found["warnings"])


@BUSY
def test_progress_on_a_terminal(tmp_path):
    pty = pytest.importorskip("pty")
    with threaded_server(LiveServer(step_seconds=0.02)) as url:
        ours, theirs = pty.openpty()
        arguments = ["run", write(tmp_path / "s.json"), "--url", url, "--out", str(tmp_path), "--no-plots"]
        env = os.environ | {"COLUMNS": "160"}
        with subprocess.Popen([*COMMAND, *arguments], stdout=theirs, stderr=theirs, env=env) as client:
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):
                while part := os.read(ours, 65536):
                    shown += part
        os.close(ours)
        assert client.returncode == 0
    for figure in (b"3 of 3 arrived", b"running", b"frames/s", b"of 2 s"):
        assert figure in shown
