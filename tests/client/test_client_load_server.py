"""The load test against a real server, with more viewers than it has slots for some of the time."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from fastar_backend.serve import Server, ServeSettings

pytestmark = pytest.mark.server
PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
SMALL = {"kind": "fastar", "budget_frames": 4, "recent_frames": 2}


IDLE_SECONDS = 2.0


@pytest.fixture(scope="module")
def server(tiny_world):
    service = {"max_streams": 6, "idle_seconds": IDLE_SECONDS}
    # Triton waits for streams whose clients vanished when it is stopped.
    settings = ServeSettings(**PORTS, world=str(tiny_world), device="cpu", attention=SMALL, exit_timeout=3, **service)
    with Server(settings) as server:
        yield server


def load(url: str, out, scenario: dict, processes: int = 2) -> tuple[int, dict]:
    out.mkdir()
    (out / "s.json").write_text(json.dumps(scenario))
    command = [sys.executable, "-m", "fastar_client.load", "run", str(out / "s.json"), "--url", url, "--out", str(out)]
    done = subprocess.run([*command, "--processes", str(processes)], capture_output=True, text=True, timeout=120)
    assert (out / "report.png").exists(), done.stderr
    return done.returncode, json.loads((out / "report.json").read_text())


def test_paced_viewers_who_break_off_are_slow_and_steer(server, tmp_path):
    scenario = {
        "phases": [{"seconds": 3, "per_minute": 30, "burst": 3, "burst_seconds": 2}],
        "session_seconds": [2, 3],
        "fps": 8,
        "disconnect_share": 0.34,
        "slow_share": 0.2,
        "action_seconds": [0.4, 0.8],
        "prompt_seconds": [0.7, 1.4],
        "slo": {"p5_fps_share": 0.5, "continuous_play": 0.3, "rebuffer": 0.3, "ttfc_p95_seconds": 10.0,
                "control_p95_periods": 10.0},
    }  # fmt: skip
    code, found = load(server.grpc_url, tmp_path / "paced", scenario)
    assert code == 0, found["slo"]
    assert found["world"]["name"] == "random"
    totals = found["totals"]
    assert totals["outcomes"]["disconnected"] >= 1
    assert totals["outcomes"]["completed"] >= 2
    assert totals["controls_refused"] == 0
    assert totals["control"]["p50"] > 0
    assert totals["fps"]["p50"] > 6  # a short session has chunks ahead of its rate
    assert server.restarts == 0


def test_saturating_viewers_beyond_the_slots_are_lost(server, tmp_path):
    """Of eight, two; the slots of those who broke off in the test before are free again after IDLE_SECONDS."""
    time.sleep(IDLE_SECONDS + 2)
    scenario = {"phases": [{"seconds": 1, "burst": 8, "burst_seconds": 0.5}], "session_seconds": [2, 2], "paced": False}
    code, found = load(server.grpc_url, tmp_path / "saturating", scenario | {"action_seconds": None}, processes=1)
    assert code == 1
    outcomes = found["totals"]["outcomes"]
    assert outcomes == {"completed": 6, "rejected": 2}
    assert found["totals"]["fps"]["min"] == 0
    assert all("retry in" in error for error in found["totals"]["errors"])
    assert found["totals"]["rtf"]["p50"] > 0
