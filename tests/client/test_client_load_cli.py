"""The `fastar-load` command: exit codes, one-line errors, and the verdict by the SLO."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fastar_client.load import cli
from scripted import BUSY, ScriptedServer, threaded_server

COMMAND = [sys.executable, "-m", "fastar_client.load"]
SMALL = {
    "phases": [{"seconds": 1.0, "burst": 3, "burst_seconds": 0.4}],
    "session_seconds": [1.5, 1.9],
    "fps": 20,
    "action_seconds": [0.3, 0.5],
}


def write(path: Path, **changed) -> str:
    path.write_text(json.dumps(SMALL | changed))
    return str(path)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@BUSY
def test_an_slo_that_is_missed(tmp_path):
    with threaded_server(ScriptedServer(step_seconds=0.25)) as url:
        scenario = write(tmp_path / "s.json", action_seconds=None, slo={"p5_fps_share": 0.9})
        done = run("run", scenario, "--url", url, "--out", str(tmp_path), "--no-plots")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastar-load: ")]
    assert [line.split(": ")[2] for line in lines] == ["p5 of the streams' FPS", "continuous play", "rebuffer ratio"]
    found = report(tmp_path)
    (target,) = [target for target in found["slo"] if target["name"] == "p5 of the streams' FPS"]
    assert f"missed by {18 - target['value']:.3g}" in lines[0]
    assert target["value"] == pytest.approx(16, rel=0.06)
    assert found["met"] is False
    assert not (tmp_path / "report.png").exists()
    assert "SLO missed" in (tmp_path / "report.html").read_text()


@dataclasses.dataclass
class Filling(ScriptedServer):
    """Refuses all streams but the first, which asks whether all is well."""

    calls: int = 0

    async def serve(self, requests):
        self.calls += 1
        if self.calls > 2:  # one asked for the world
            self.faults = {0: "RESOURCE_EXHAUSTED: streams: <8> are open; allowed: 8"}
        async with contextlib.aclosing(super().serve(requests)) as replies:
            async for reply in replies:
                yield reply


def test_rejected_streams_and_saturating_load(tmp_path):
    with threaded_server(Filling()) as url:
        scenario = write(tmp_path / "s.json", paced=False)
        done = run("run", scenario, "--url", url, "--out", str(tmp_path))
    assert done.returncode == 1
    assert "SLO missed: lost streams: 3; target: at most 0; missed by 3" in done.stderr
    found = report(tmp_path)
    assert [target["name"] for target in found["slo"]] == ["lost streams"]
    assert found["totals"]["ttfc"]["p50"] is None  # never
    assert (found["totals"]["no_first_chunk"], found["totals"]["fps"]["max"]) == (3, 0.0)
    assert "&lt;8&gt; are open" in (tmp_path / "report.html").read_text()


def command(*arguments: str, monkeypatch, capsys) -> tuple[int, str, str]:
    """The command in this process; exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["fastar-load", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


BAD = [
    (["run", "tide"], "scenario: got 'tide'; allowed: hold, steady, wave, chaos, or a readable JSON file"),
    (["run", "steady", "--streams", "0"], "streams: got 0; allowed: a number 1..100000"),
    (["run", "steady", "--seconds", "-1"], "seconds: got -1.0; allowed: a number 1..1e+06"),
    (["run", "steady", "--fps", "0"], "fps: got 0.0"),
    (["run", "s.json", "--streams", "4"], "streams: got 4; allowed: nothing: s.json is no preset"),
    (["run", "s.json", "--saturate"], "saturate: got False; allowed: nothing: s.json is no preset"),
    (["run", "--processes", "0"], "processes: got 0; allowed: an integer 1..256"),
    (["run", "--url", "localhost"], "url: got 'localhost'; allowed: host:port"),
    (["run", "--tenant", "a b"], "tenant: got 'a b'"),
    (["run", "--timeout", "0"], "timeout: got 0.0"),
    (["run", "--ca", "/no/such/file"], "tls.ca: got '/no/such/file'"),
    (["run", "--seed", "x"], "--seed"),
    (["capacity", "--first", "9", "--most", "4"], "first: got 9; allowed: 1..4"),
    (["show", "tide"], "scenario: got 'tide'"),
    (["dance"], "dance"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_is_refused_before_connecting(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = command(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert stderr.startswith("fastar-load: ")
    assert stderr.count("\n") == 1
    assert says in stderr
    assert not list(tmp_path.iterdir())


def test_other_failures(tmp_path, monkeypatch, capsys):
    def failing(*arguments: str) -> tuple[int, str]:
        code, _, stderr = command("run", *arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert stderr.count("\n") == 1
        return code, stderr

    code, stderr = failing("--url", "127.0.0.1:9", "--out", str(tmp_path))
    assert (code, "no Triton server at 127.0.0.1:9" in stderr) == (1, True)
    (tmp_path / "file").write_text("")
    code, stderr = failing("--url", "127.0.0.1:9", "--out", str(tmp_path / "file" / "out"))
    assert (code, "cannot be written" in stderr) == (1, True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, stderr = failing("--url", "127.0.0.1:9", "--out", str(tmp_path))
    assert (code, "plots: got True; allowed: --no-plots, or `pip install 'fastar-client[load]'`" in stderr) == (2, True)


def test_show_writes_what_run_reads(tmp_path, monkeypatch, capsys):
    ask = {"monkeypatch": monkeypatch, "capsys": capsys}
    code, text, _ = command("show", "chaos", "--streams", "7", "--seconds", "40", "--fps", "24", "--saturate", **ask)
    assert code == 0
    (tmp_path / "mine.json").write_text(text)
    assert command("show", str(tmp_path / "mine.json"), **ask) == (0, text, "")


@dataclasses.dataclass
class Crowded(ScriptedServer):
    """Is quick until a fourth stream is open."""

    open: int = 0

    async def serve(self, requests):
        self.open += 1
        self.step_seconds = 0.02 if self.open <= 3 else 0.3
        try:
            async with contextlib.aclosing(super().serve(requests)) as replies:
                async for reply in replies:
                    yield reply
        finally:
            self.open -= 1


@BUSY
def test_capacity(tmp_path, monkeypatch, capsys):
    """Of a server that has the time for three streams, and not for four."""
    with threaded_server(Crowded()) as url:
        arguments = ["--url", url, "--fps", "20", "--seconds", "2.5", "--first", "3", "--out", str(tmp_path)]
        code, out, _ = command("capacity", *arguments, "--no-plots", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, out
    assert "3 streams: held, the slowest at" in out
    assert "capacity: 3 streams hold 20 FPS for 2.5 s; 4 do not: the slowest stream had" in out
    assert report(tmp_path / "3-streams")["met"] is True
    assert report(tmp_path / "4-streams")["met"] is False


def test_help():
    done = run("--help")
    assert done.returncode == 0
    assert "capacity" in done.stdout
