"""One life of tritonserver, with a small program in its place: when it counts as ready, and how it is drained."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastar_backend.serve import ServeSettings, server
from fastar_backend.serve.runtime import Launch, _command

# Listens at each port as soon as there is a file of that name beside it; ends at SIGTERM.
PROGRAM = """
import pathlib, socket, sys, time
folder, held = pathlib.Path(sys.argv[1]), {}
while True:
    for port in sys.argv[2:]:
        if port not in held and (folder / port).exists():
            held[port] = socket.create_server(("127.0.0.1", int(port)))
    time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def answers(monkeypatch):
    """Whoever listens at all three ports answers the canary."""
    probe = types.SimpleNamespace(
        check=lambda _: None, close=lambda: None, client=types.SimpleNamespace(close=lambda: None)
    )
    monkeypatch.setattr(server, "Probe", lambda *_: probe)
    monkeypatch.setattr(server, "POLL", 0.02)


@contextlib.contextmanager
def attempt(snapshots: str = "") -> Iterator[tuple[server.Attempt, list[str]]]:
    """Ports: gRPC, HTTP, metrics."""
    folder = Path(tempfile.mkdtemp(prefix="fastar-attempt-"))
    with contextlib.ExitStack() as held:
        free = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [str(one.getsockname()[1]) for one in free]
    command = [sys.executable, "-c", PROGRAM, str(folder), *ports]
    launch = Launch(folder, f"fastar_attempt_{os.getpid()}_", command, dict(os.environ))
    one = server.Attempt(launch, [f"127.0.0.1:{port}" for port in ports], ServeSettings(), snapshots)
    try:
        yield one, ports
    finally:
        one.kill()
    assert not folder.exists()


@pytest.mark.parametrize("last", [0, 1, 2], ids=["grpc", "http", "metrics"])
def test_it_is_ready_when_all_three_ports_listen(last):
    with attempt() as (one, ports):
        waiting = threading.Thread(target=one.wait_until_ready, args=(threading.Event(),))
        waiting.start()
        for port in ports[:last] + ports[last + 1 :]:
            (one.launch.folder / port).touch()
        waiting.join(1.0)
        assert waiting.is_alive(), "one of them is closed"
        (one.launch.folder / ports[last]).touch()
        waiting.join(10)
        assert not waiting.is_alive()


def test_http_is_looked_for_where_it_listens():
    """Beside gRPC with TLS it is this machine's alone, and its URL is that of the loopback."""
    settings = ServeSettings(host="10.1.2.3", tls_certificate="/a/certificate", tls_key="/a/key")
    one = server.Server(settings)
    one.ports = {"grpc": 1, "http": 2, "metrics": 3}
    assert (one.grpc_url, one.http_url, one.metrics_url) == (
        "10.1.2.3:1", "http://127.0.0.1:2", "http://10.1.2.3:3/metrics"
    )  # fmt: skip
    installation = types.SimpleNamespace(server="tritonserver")
    flags = _command(settings, one.ports, installation, Path("/a/folder"), "name")
    assert [flag for flag in flags if "address" in flag] == [
        "--grpc-address=10.1.2.3", "--http-address=127.0.0.1", "--metrics-address=10.1.2.3"
    ]  # fmt: skip


@pytest.mark.parametrize("private", [False, True], ids=["streams can go on", "nowhere to go on"])
def test_a_server_that_has_just_died_is_drained(private, tmp_path):
    """Its guard has cleared up, and has not ended yet."""
    with attempt(str(tmp_path / "snapshots") if private else "") as (one, ports):
        for port in ports:
            (one.launch.folder / port).touch()
        one.wait_until_ready(threading.Event())
        shutil.rmtree(one.launch.folder)
        one.drain(timeout=5.0)
        assert one.guard.poll() is not None
