"""A run that is killed goes on where it was, and ends in the report of one that was left in peace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gameworld import SMALL, fastar, write

from fastar_backend.errors import InvalidInput
from fastar_backend.evaluation import game, suites

pytestmark = pytest.mark.skipif(game.missing() is not None, reason="the game is not installed")


def report(out: Path) -> dict:
    found = json.loads((out / "report.json").read_text())
    del found["timing"]
    return found


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(suites.SUITES, "quick", SMALL)
    out, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = ["--world", write(tmp_path / "world"), "--policies", "fastar-quant", "--budget", 6, "--workers", 1,
                 "--parts", "rollout", "--out"]  # fmt: skip
    code = (
        "import sys; from fastar_backend.evaluation import suites; from fastar_backend import cli\n"
        f"suites.SUITES['quick'] = suites.Suite.model_validate_json({SMALL.model_dump_json()!r})\n"
        "cli.main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "eval", *map(str, [*arguments, out])], env=os.environ
    ) as process:
        lines, until = out / "units.jsonl", time.monotonic() + 60
        while time.monotonic() < until and not (lines.exists() and lines.read_bytes().count(b"\n") >= 1):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    kept = lines.read_text()
    assert 1 <= kept.count("\n") < 4, "it was to be killed midway"
    lines.write_text(kept + '{"key": "torn')
    with pytest.raises(InvalidInput, match="--out: .* holds results; allowed: --resume"):
        fastar(*arguments, out)
    fastar(*arguments, out, "--resume")
    fastar(*arguments, whole)
    assert lines.read_text().startswith(kept)
    keys = [json.loads(line)["key"] for line in lines.read_text().splitlines()]
    assert len(keys) == len(set(keys)), "what was done is not done again"
    assert report(out) == report(whole)
