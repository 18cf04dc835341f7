"""The command: exit codes, one-line errors, and the files that every ending leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
import trustme
from fastar_client import cli
from live import LiveServer
from PIL import Image
from scripted import ScriptedServer, threaded_server

COMMAND = [sys.executable, "-m", "fastar_client"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=30)


def stream(url: str, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("stream", "--url", url, "--prompt", "a hall", "--out", str(out), *arguments)


def frames_of(out: Path) -> int:
    with av.open(str(out / "video.mp4")) as container:
        return sum(1 for _ in container.decode(video=0))


def timings(out: Path) -> dict:
    return json.loads((out / "timings.json").read_text())


def wait_for(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_one_line(stderr: str) -> bool:
    return stderr.count("\n") == 1 and stderr.startswith("fastar-client: ") and "Traceback" not in stderr


def test_a_whole_stream(tmp_path):
    server = ScriptedServer()
    with threaded_server(server) as url:
        arguments = ["--actions", "forward*3,turn_left", "--frames", "30", "--fps", "240", "--seed", "7"]
        arguments += ["--start", "auto", "--attention", '{"kind":"dense"}']
        done = stream(url, tmp_path / "new" / "out", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "30 frames" in done.stdout
    out = tmp_path / "new" / "out"
    assert sorted(p.name for p in out.iterdir()) == ["contact.png", "timings.json", "video.mp4"]
    assert frames_of(out) == 30
    with Image.open(out / "contact.png") as sheet:
        assert sheet.width > 500
    result = timings(out)
    assert (result["ended"], result["error"]) == ("frames", None)
    assert result["options"] == {
        "prompt": "a hall",
        "frames": 30,
        "fps": 240.0,
        "seed": 7,
        "start": "auto",
        "attention": {"kind": "dense"},
    }
    assert result["world"]["buttons"] == ["forward", "turn_left"]
    assert result["metrics"]["frames"] == sum(chunk["frames"] for chunk in result["chunks"]) == 30
    assert [r.actions for r in server.chunks[:3]] == [("forward",) * 2, ("forward", "turn_left"), ("forward",) * 2]


def test_server_errors_keep_what_came(tmp_path):
    for fault, code, says in (
        ("INVALID_ARGUMENT: actions: got 'fly'; allowed: forward", 2, "actions: got 'fly'; allowed: forward"),
        ("RESOURCE_EXHAUSTED: streams: 8 are open; allowed: 8", 1, "streams: 8 are open"),
        (ScriptedServer.finish, 1, "closed the stream"),
    ):
        with threaded_server(ScriptedServer(faults={3: fault})) as url:
            done = stream(url, tmp_path)
        assert done.returncode == code
        assert is_one_line(done.stderr)
        assert says in done.stderr
        assert frames_of(tmp_path) == 12
        assert timings(tmp_path)["ended"] == "error"
        assert says in timings(tmp_path)["error"]
        assert (tmp_path / "contact.png").exists()


def test_a_killed_server(tmp_path):
    scripted = [sys.executable, str(Path(__file__).with_name("scripted.py"))]
    with subprocess.Popen(scripted, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().strip()
        arguments = ["stream", "--url", url, "--prompt", "a hall", "--out", str(tmp_path), "--reconnect-seconds", "0"]
        with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True) as client:
            _, stderr = client.communicate(timeout=20)
    assert client.returncode == 1
    assert is_one_line(stderr)
    assert "lost" in stderr
    assert frames_of(tmp_path) == timings(tmp_path)["metrics"]["frames"] == 32


def test_a_server_that_shuts_down(tmp_path):
    server = ScriptedServer(step_seconds=0.03)
    with threaded_server(server) as url:
        arguments = ["stream", "--url", url, "--prompt", "a hall", "--out", str(tmp_path)]
        client = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
        wait_for(lambda: len(server.requests) >= 8)
    with client:
        _, stderr = client.communicate(timeout=20)
    assert client.returncode == 1
    assert is_one_line(stderr)
    assert frames_of(tmp_path) == timings(tmp_path)["metrics"]["frames"] > 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_stream_and_keep_the_files(tmp_path, number, code):
    server = ScriptedServer(step_seconds=0.03)
    with threaded_server(server) as url:
        arguments = ["stream", "--url", url, "--prompt", "a hall", "--out", str(tmp_path)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([*COMMAND, *arguments], **pipes) as client:
            wait_for(lambda: len(server.requests) >= 8)
            client.send_signal(number)
            stdout, stderr = client.communicate(timeout=20)
        assert (client.returncode, stderr) == (code, "")
        assert "ended by interrupted" in stdout
        assert len(server.ends) == 1
    assert frames_of(tmp_path) == timings(tmp_path)["metrics"]["frames"] > 0
    assert timings(tmp_path)["ended"] == "interrupted"


def test_max_seconds(tmp_path):
    server = ScriptedServer(step_seconds=0.03)
    with threaded_server(server) as url:
        done = stream(url, tmp_path, "--max-seconds", "0.5")
        assert (done.returncode, done.stderr) == (0, "")
        assert len(server.ends) == 1
    assert timings(tmp_path)["ended"] == "max_seconds"
    assert frames_of(tmp_path) == timings(tmp_path)["metrics"]["frames"] > 0


def test_a_server_that_never_answers(tmp_path):
    with threaded_server(ScriptedServer(faults={0: ScriptedServer.hang})) as url:
        done = stream(url, tmp_path, "--timeout", "0.3")
    assert done.returncode == 1
    assert is_one_line(done.stderr)
    assert "no answer for 0.3 s" in done.stderr
    assert timings(tmp_path)["metrics"]["frames"] == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' /dev/full")
def test_a_full_disk(tmp_path):
    (tmp_path / "video.mp4").symlink_to("/dev/full")
    server = ScriptedServer(height=64, width=96)
    with threaded_server(server) as url:
        done = stream(url, tmp_path, "--frames", "400")
        assert done.returncode == 1
        assert is_one_line(done.stderr)
        assert "video.mp4: cannot be written (No space left on device)" in done.stderr
        assert len(server.ends) == 1
    assert timings(tmp_path)["ended"] == "error"
    assert (tmp_path / "contact.png").exists()


def command(*arguments: str, monkeypatch, capsys) -> tuple[int, str, str]:
    """The command in this process; exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["fastar-client", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


BAD = [
    (["--frames", "0"], "frames: got 0; allowed: an integer >= 1"),
    (["--frames", "-3"], "frames: got -3"),
    (["--frames", "many"], "--frames"),
    (["--prompt", ""], "prompt: got ''"),
    (["--prompt", "x" * 5000], "at most 4096 bytes"),
    (["--attention", "{"], "attention: got '{'; allowed: a JSON object"),
    (["--attention", "[1]"], "attention: got '[1]'"),
    (["--seed", "-1"], "seed: got -1"),
    (["--fps", "0"], "fps: got 0.0"),
    (["--actions", "a*0"], "actions: got 'a*0'"),
    (["--actions", "@/no/such/file"], "actions: got '@/no/such/file'"),
    (["--max-seconds", "0"], "max_seconds: got 0.0"),
    (["--timeout", "-1"], "timeout: got -1.0"),
    (["--url", "localhost"], "url: got 'localhost'"),
    (["--encoding", "gif"], "encoding: got 'gif'; allowed: raw, jpeg, h264"),
    (["--tenant", "a b"], "tenant: got 'a b'"),
    (["--reconnect-seconds", "-1"], "reconnect_seconds: got -1.0"),
    (["--ca", "/no/such/file"], "tls.ca: got '/no/such/file'; allowed: a readable PEM file"),
    (["--certificate", "/dev/null"], "tls.key: got None; allowed: certificate and key together"),
    (["--ca", "/dev/null"], "tls.ca: got '/dev/null'; allowed: a PEM file"),
    (["--no-such-option"], "--no-such-option"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_is_refused_before_connecting(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["stream", "--prompt", "a hall", "--url", "127.0.0.1:9", *arguments]
    code, _, stderr = command(*given, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert is_one_line(stderr)
    assert says in stderr
    assert not list(tmp_path.iterdir())


def test_other_failures(tmp_path, monkeypatch, capsys):
    def failing(*arguments: str) -> tuple[int, str]:
        code, _, stderr = command(*arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert is_one_line(stderr)
        return code, stderr

    (tmp_path / "file").write_text("")
    nowhere = ["--url", "127.0.0.1:9", "--prompt", "a hall", "--out"]
    assert failing("stream", *nowhere, str(tmp_path / "file" / "out"))[1].endswith("choose another --out\n")
    code, stderr = failing("stream", *nowhere, str(tmp_path / "out"))
    assert (code, "no Triton server at 127.0.0.1:9" in stderr) == (1, True)
    assert timings(tmp_path / "out")["ended"] == "error"
    assert failing("ping", "--url", "127.0.0.1:9")[0] == 1
    assert failing("no-such-command")[0] == 2
    assert failing()[0] == 2


def test_ping(monkeypatch, capsys):
    for ready, code in ((True, 0), (False, 1)):
        with threaded_server(ScriptedServer(ready=ready)) as url:
            done = command("ping", "--url", url, monkeypatch=monkeypatch, capsys=capsys)
        assert done[0] == code
        assert ("ready (" in done[1]) is ready
        assert ready or "not ready" in done[2]


def test_an_event_log_is_replayed(tmp_path, monkeypatch, capsys):
    log = tmp_path / "events.jsonl"
    with threaded_server(LiveServer()) as url:
        arguments = ["--actions", "forward*3,turn_left", "--frames", "30", "--seed", "7", "--event-log", str(log)]
        assert stream(url, tmp_path, *arguments).returncode == 0
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert lines[0]["options"]["prompt"] == "a hall"
        assert [line["chunk"] for line in lines[1:]] == list(range(8))
        assert lines[1]["actions"] == ["forward", "forward"]
        replayed = ["replay", str(log), "--url", url]
        assert command(*replayed, monkeypatch=monkeypatch, capsys=capsys) == (0, "8 of 8 chunks identical\n", "")
        lines[4]["actions"] = ["jump"]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code, out, _ = command(*replayed, monkeypatch=monkeypatch, capsys=capsys)
        assert (code, out) == (1, "3 of 8 chunks identical; the first that differs: chunk 3\n")
    for text in ("", "{}", '{"event": "open", "version": 9}\n', log.read_text().splitlines()[0] + "\n"):
        log.write_text(text)
        code, _, stderr = command("replay", str(log), monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2
        assert is_one_line(stderr)
        assert "event_log: got" in stderr


def test_tls(tmp_path, monkeypatch, capsys):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    ours = authority.issue_cert("client@example.org")
    ours.private_key_pem.write_to_path(tmp_path / "key.pem")
    ours.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    ask = {"monkeypatch": monkeypatch, "capsys": capsys}
    files = ["--ca", f"{tmp_path}/ca.pem", "--certificate", f"{tmp_path}/cert.pem", "--key", f"{tmp_path}/key.pem"]
    with threaded_server(ScriptedServer(), authority=authority) as url:
        secure = url.replace("127.0.0.1", "localhost")
        assert command("ping", "--url", secure, *files, **ask)[0] == 0
        assert stream(secure, tmp_path, "--frames", "4", *files).returncode == 0
        for arguments in (["--ca", f"{tmp_path}/ca.pem"], ["--tls"], []):  # no certificate; unknown authority; no TLS
            code, _, stderr = command("ping", "--url", secure, *arguments, **ask)
            assert code == 1
            assert is_one_line(stderr)


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastar-client", "ping", "--url", "127.0.0.1:9", "--debug"])
    with pytest.raises(cli.FastarError, match="no Triton server"):
        cli.main()


def test_help():
    done = run("--help")
    assert done.returncode == 0
    assert "stream" in done.stdout


def test_progress_on_a_terminal(tmp_path):
    pty = pytest.importorskip("pty")
    with threaded_server(ScriptedServer(step_seconds=0.02)) as url:
        ours, theirs = pty.openpty()
        arguments = ["stream", "--url", url, "--prompt", "a hall", "--frames", "40", "--out", str(tmp_path)]
        with subprocess.Popen([*COMMAND, *arguments], stdout=theirs, env=os.environ | {"COLUMNS": "160"}) as client:
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):
                while part := os.read(ours, 65536):
                    shown += part
        os.close(ours)
        assert client.returncode == 0
    for figure in (b"frame 40", b"FPS", b"first frame", b"400 tokens", b"density 0.50", b"server 1.00 GiB"):
        assert figure in shown
