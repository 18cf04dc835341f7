"""What happens when something dies: over a real tritonserver and, where an engine must misbehave, a fake engine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from serve_raw import MODEL_PROCESS, Refused, Stream, descendants, gone, metric, tensor, until

from fastar_backend.errors import WeightsError
from fastar_backend.model.world import load_world
from fastar_backend.serve import Server, ServerError

pytestmark = pytest.mark.server


@pytest.fixture(autouse=True)
def _all_logs(caplog):
    caplog.set_level("INFO", logger="fastar.serve")


PROMPT = "a secret castle"
STATE_BYTES = 64 << 20  # of one fake stream


def test_an_engine_bug_is_told_in_one_line_and_harms_nobody_else(fake_server, caplog):
    with Stream(fake_server.grpc_url) as live, Stream(fake_server.grpc_url) as stream:
        live.chunk(prompt=PROMPT, start=True)
        stream.chunk(prompt=PROMPT, start=True)
        stream.send(["crash"])
        with pytest.raises(Refused) as refused:
            stream.reply()
        assert refused.value.code == "INTERNAL"
        assert "Traceback" not in str(refused.value)
        assert PROMPT not in str(refused.value)
        assert live.chunk(end=True)[1]["chunk"] == 1
    assert until(lambda: "ZeroDivisionError" in caplog.text, 5), "not in the log"
    assert "service.py" in caplog.text
    assert PROMPT not in caplog.text


def raw(name: str, shape: list[int], content: bytes) -> triton.InferInput:
    """BYTES as they travel, each element with its length before it."""
    result = tensor(name, [""])
    result.set_shape(shape)
    result._raw_content = content
    return result


def test_malformed_bytes_harm_nobody(fake_server):
    (model,) = fake_server.model_processes
    two = b"\x01\0\0\0a" * 2
    for shape, content in (
        ([1, 1], b"\xff\xff\xff\x7fabc"),
        ([1, 1], b"abc"),
        ([1, 1], two),
        ([1, 3], two),
        ([1, 1], b""),
    ):
        for name in ("ACTIONS", "PROMPT"):
            inputs = {key: tensor(key, [""]) for key in ("ACTIONS", "PROMPT", "OPTIONS")} | {
                name: raw(name, shape, content)
            }
            with Stream(fake_server.grpc_url) as stream:
                stream.send(inputs=list(inputs.values()), start=True)
                with pytest.raises(Refused):
                    stream.reply(timeout=10)
    with Stream(fake_server.grpc_url) as stream:
        stream.chunk(prompt=PROMPT, start=True, end=True)
    assert fake_server.model_processes == [model]


def test_failed_starts_that_are_never_ended_block_nobody(fake_server):
    for _ in range(60):
        with Stream(fake_server.grpc_url) as stream:
            stream.send(prompt="", start=True)
            with pytest.raises(Refused, match="INVALID_ARGUMENT: PROMPT: "):
                stream.reply()
    with Stream(fake_server.grpc_url) as stream:
        stream.chunk(prompt=PROMPT, start=True, end=True)


def test_end_gives_the_memory_back(fake_server):
    with Stream(fake_server.grpc_url) as stream:
        before = stream.chunk(["end"], start=True, end=True)[1]["process_bytes"]
        during = stream.chunk(prompt=PROMPT, start=True)[1]["process_bytes"]
        assert during - before > 0.9 * STATE_BYTES
        stream.chunk(end=True)
        after = stream.chunk(["end"], start=True, end=True)[1]["process_bytes"]
    assert after - before < 0.1 * STATE_BYTES
    assert metric(fake_server, "fastar_streams_active") == 0


def test_a_vanished_client_is_swept_without_any_request(fake_server):
    (model,) = fake_server.model_processes
    before = model.memory_info().rss
    stream = Stream(fake_server.grpc_url)
    stream.chunk(prompt=PROMPT, start=True)
    stream.send(["stall"])
    stream.vanish()
    assert metric(fake_server, "fastar_streams_active") == 1
    assert until(lambda: metric(fake_server, "fastar_streams_active") == 0, 20)
    assert until(lambda: model.memory_info().rss - before < 0.1 * STATE_BYTES, 5)


def test_a_killed_model_process_is_replaced(fake_server, caplog):
    with Stream(fake_server.grpc_url) as stream:
        stream.chunk(prompt=PROMPT, start=True)
        (old,) = fake_server.model_processes
        parent = old.parent()
        restarts = fake_server.restarts
        old.kill()
        assert until(lambda: fake_server.restarts == restarts + 1, 10)
        assert until(lambda: "answers again" in caplog.text, 60)
    assert gone([old, parent])
    assert "the model process died" in caplog.text
    with Stream(fake_server.grpc_url) as stream:
        assert stream.chunk(prompt=PROMPT, start=True, end=True)[1]["chunk"] == 0


def test_the_canary_waits_for_a_long_step_and_disturbs_nobody_but_a_hung_model_is_replaced(fake_settings, caplog):
    settings = fake_settings.model_copy(update={"canary_seconds": 0.2, "hang_seconds": 5.0})  # a stall takes 3 s
    with Server(settings) as server:
        with Stream(server.grpc_url) as stream:
            assert stream.chunk(["stall"], PROMPT, start=True)[1]["chunk"] == 0
            assert stream.chunk(["stall"])[1]["chunk"] == 1
            assert stream.chunk(end=True)[1]["chunk"] == 2
        assert server.restarts == 0
        (old,) = server.model_processes
        old.suspend()
        assert until(lambda: "answers again" in caplog.text, 60)
        assert gone([old])


def test_it_gives_up_after_the_allowed_restarts(fake_settings):
    server = Server(fake_settings.model_copy(update={"max_restarts": 0}))
    server.start()
    processes = server.model_processes
    tritonserver = processes[0].parent()
    tritonserver.kill()
    with pytest.raises(ServerError, match="gave up after 0 restarts: tritonserver died"):
        server.wait()
    server.stop()
    assert gone([tritonserver, *processes])


def test_silently_wrong_bytes_are_never_ready(fake_repository, fake_settings, tmp_path):
    """Stands for an older server with numpy 2, whose replies have the right shape and no content."""
    model = fake_repository / "fastar" / "1" / "model.py"
    text = model.read_text()
    broken = tmp_path / "fastar" / "1"
    broken.mkdir(parents=True)
    (tmp_path / "fastar" / "config.pbtxt").write_text((fake_repository / "fastar" / "config.pbtxt").read_text())
    assert "json.dumps(reply.stats).encode()" in text
    (broken / "model.py").write_text(text.replace("json.dumps(reply.stats).encode()", "bytes(300)"))
    server = Server(fake_settings.model_copy(update={"model_repository": tmp_path}))
    with pytest.raises(ServerError, match="wrong bytes"):
        server.start()
    assert server.model_processes == []


class Command:
    """`fastar serve` as a user runs it."""

    def __init__(self, repository: Path | None, *options: str, wait: bool = True) -> None:
        chosen = ["--model-repository", str(repository)] if repository else []
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastar_backend.cli", "serve", *ports, *chosen, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.banner = ""
        if wait:
            for line in self.process.stdout:
                self.banner += line
                if "Ready" in line:
                    break
            else:
                pytest.fail(f"no server: {self.process.communicate()[1]}")
            self.children = descendants(self.process.pid)

    @property
    def url(self) -> str:
        return self.banner.split("gRPC")[1].split()[0]

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def end(self, timeout: float) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def left_behind(self) -> set[Path]:
        return traces(self.process.pid)


def traces(supervisor: int) -> set[Path]:
    """What its servers keep outside their memory."""
    folder = Path(tempfile.gettempdir())
    return {*Path("/dev/shm").glob(f"fastar_{supervisor}_*"), *folder.glob(f"fastar-{supervisor}-*")}


@pytest.fixture
def command(fake_repository):
    with Command(fake_repository, "--exit-timeout", "2") as command:
        assert any(
            MODEL_PROCESS in process.name() or process.cmdline()[0].endswith(MODEL_PROCESS)
            for process in command.children
        )
        yield command


def test_sigterm_ends_it_in_time_though_a_stream_is_live(command):
    with Stream(command.url) as stream:
        stream.chunk(prompt=PROMPT, start=True)
        began = time.monotonic()
        command.process.send_signal(signal.SIGTERM)
        status, out, err = command.end(timeout=20)
        assert time.monotonic() - began < 8
    assert status == 0, err
    assert "Stopped." in out
    assert "Traceback" not in err
    assert PROMPT not in err
    assert until(lambda: gone(command.children), 5)


def test_a_live_stream_may_end_while_the_server_drains(fake_repository):
    with Command(fake_repository, "--exit-timeout", "20") as command:
        with Stream(command.url) as stream:
            stream.chunk(prompt=PROMPT, start=True)
            command.process.send_signal(signal.SIGTERM)
            time.sleep(1)
            assert stream.chunk()[1]["chunk"] == 1
            assert stream.chunk(end=True)[1]["chunk"] == 2
        status, _, err = command.end(timeout=15)
    assert status == 0, err


def test_a_second_ctrl_c_ends_it_at_once(fake_repository):
    with Command(fake_repository, "--exit-timeout", "60") as command, Stream(command.url) as stream:
        stream.chunk(prompt=PROMPT, start=True)
        command.process.send_signal(signal.SIGINT)
        time.sleep(1)
        command.process.send_signal(signal.SIGINT)
        command.end(timeout=10)
        assert until(lambda: gone(command.children), 5)


def test_a_killed_supervisor_leaves_nothing_behind(command):
    assert len(command.left_behind()) >= 2, "a folder and shared memory, while it runs"
    command.process.kill()
    assert until(lambda: gone(command.children), 10)
    assert until(lambda: not command.left_behind(), 5)


def test_a_killed_guard_leaves_nothing_behind(fake_settings):
    before = traces(os.getpid())
    server = Server(fake_settings.model_copy(update={"max_restarts": 0}))
    server.start()
    guard = server.model_processes[0].parent().parent()
    assert "guard.py" in guard.cmdline()[1]
    processes = [guard, *guard.children(recursive=True)]
    guard.kill()
    with pytest.raises(ServerError, match="tritonserver died"):
        server.wait()
    assert until(lambda: gone(processes), 5)
    assert traces(os.getpid()) == before


def test_a_port_in_use_is_named(fake_repository):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with Command(fake_repository, "--grpc-port", str(port), wait=False) as command:
            status, _, err = command.end(timeout=20)
    assert status == 2
    assert err.strip().splitlines() == [
        f"fastar: --grpc-port: port {port} of 127.0.0.1: address already in use; "
        "allowed: a free port, or 0 to have one chosen"
    ]


def failed_start(*options: str, repository: Path | None = None) -> str:
    """The one line on standard error."""
    with Command(repository, *options, wait=False) as command:
        status, _, err = command.end(timeout=90)
        assert status != 0
        assert not command.left_behind()
    (line,) = err.strip().splitlines()
    return line


def test_missing_weights(tiny_world, tmp_path):
    with pytest.raises(WeightsError, match=str(tmp_path / "nowhere")):
        load_world(str(tmp_path / "nowhere"), "cpu")
    world = Path(shutil.copytree(tiny_world, tmp_path / "world"))
    (world / "weights.safetensors").unlink()
    assert str(world / "weights.safetensors") in failed_start("--world", str(world))


def test_corrupt_weights(tiny_world, tmp_path):
    world = Path(shutil.copytree(tiny_world, tmp_path / "world"))
    weights = world / "weights.safetensors"
    whole = weights.read_bytes()
    for content in (b"\xff" * len(whole), b"", whole[: len(whole) // 2]):
        weights.write_bytes(content)
        with pytest.raises(WeightsError, match=str(weights)):
            load_world(str(world), "cpu")
    assert str(weights) in failed_start("--world", str(world))


def test_bad_settings_and_a_missing_repository(tmp_path):
    assert "attention.kind" in failed_start("--attention", "magic")
    assert "attention.budget_frames" in failed_start("--attention", '{"budget_frames": 0}')
    assert "device" in failed_start("--device", "tpu")
    assert "--model-repository" in failed_start(repository=tmp_path)


def test_the_embedded_world_out_of_the_box():
    with Command(None, "--max-streams", "1") as command, Stream(command.url) as stream:
        frames, stats = stream.chunk(prompt="a corridor", start=True)
        assert frames.std() > 1
        assert stats["world"]["name"] == "doom"
        assert np.array_equal(stream.chunk(prompt="a corridor", start=True, end=True)[0], frames)
