"""The admin port of `fastar serve`: what a cluster's controller and gateways ask, without a running server."""

from __future__ import annotations

import http.client
import http.server
import socket
import threading
import time
import types
import urllib.error
import urllib.request
from typing import ClassVar

import pytest

from fastar_backend import serve
from fastar_backend.errors import InvalidInput
from fastar_backend.serve import ServerError, ServeSettings, placement
from fastar_backend.serve.admin import Admin


def test_the_admin_port_answers_what_it_cannot_do():
    """No server runs; another has its port; its streams have nowhere to go."""
    server = serve.Server(ServeSettings(admin_port=0))
    with pytest.raises(ServerError, match="not running"):
        server.move(1)
    assert server.placement() == "not ready"
    said = []

    def move(streams: int) -> None:
        said.append(streams)
        raise ServerError("streams: nowhere to go on; allowed: with --snapshots that other servers share")

    admin = Admin("127.0.0.1", 0, types.SimpleNamespace(move=move))
    try:
        with pytest.raises(InvalidInput, match=r"--admin-port: port \d+ of 127.0.0.1: address already in use"):
            Admin("127.0.0.1", admin.port, types.SimpleNamespace(move=move))
        request = urllib.request.Request(f"http://127.0.0.1:{admin.port}/move?streams=3", method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=5)
        assert (refused.value.code, said) == (409, [3])
        assert b"nowhere to go on" in refused.value.read()
        refused.value.close()
    finally:
        admin.stop()


class Replies(http.server.BaseHTTPRequestHandler):
    """What Triton would say: path -> status, text."""

    said: ClassVar[dict[str, tuple[int, str]]] = {}

    def do_GET(self) -> None:
        status, text = self.said.get(self.path, (404, ""))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def replies():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Replies)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_server_says_whether_new_streams_should_come(replies, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(placement.time, "monotonic", lambda: now[0])
    metrics = '# TYPE fastar_streams_active gauge\nfastar_streams_active{{model="x"}} {}\nfastar_streams_capacity 2\n'
    one = placement.Placement()

    def look(live: float, ready: int = 200, text: str = metrics) -> str:
        Replies.said = {"/v2/health/ready": (ready, ""), "/metrics": (200, text.format(live))}
        return one.look(replies, f"{replies}/metrics")

    assert [look(live) for live in (0.0, 1.0, 2.0, 3.0)] == ["open", "open", "full", "full"]
    assert look(0.0, ready=400) == "not ready"
    assert look(0.0, text="fastar_streams_active 0\n") == "not ready"
    one.close(60)
    assert [look(1.0), look(2.0), look(1.0, ready=400)] == ["closed", "full", "not ready"]
    now[0] += 59
    assert look(1.0) == "closed"
    now[0] += 1
    assert look(1.0) == "open", "nobody has said it again"
    one.close(60)
    one.close(0)
    assert look(1.0) == "open"
    assert one.look("http://127.0.0.1:9", "http://127.0.0.1:9/metrics") == "not ready"


@pytest.mark.parametrize(
    ("state", "status", "degraded"),
    [("open", 200, None), ("full", 200, "true"), ("closed", 200, "true"), ("not ready", 503, None)],
)
def test_the_admin_port_tells_gateways_of_room(state, status, degraded):
    asked = []
    server = types.SimpleNamespace(placement=lambda: state, close=asked.append)
    admin = Admin("127.0.0.1", 0, server)
    connection = http.client.HTTPConnection("127.0.0.1", admin.port, timeout=5)

    def ask(method: str, path: str) -> int:
        connection.request(method, path)
        return connection.getresponse().status

    try:
        connection.request("GET", "/placement")
        reply = connection.getresponse()
        assert (reply.status, reply.getheader("x-envoy-degraded"), reply.read()) == (
            status, degraded, f"{state}\n".encode()
        )  # fmt: skip
        assert [ask("GET", path) for path in ("/", "/metrics")] == [404, 404]
        assert [ask("POST", f"/close?seconds={n}") for n in ("0", "600", "601", "-1", "x")] == [202, 202, 400, 404, 404]
        assert asked == [0, 600]
    finally:
        connection.close()
        admin.stop()


def test_a_caller_that_does_not_wait_is_nobodys_trouble(capfd):
    """A gateway's health check gives up after a while; the rest of the answer then goes nowhere."""
    asked, gone = threading.Event(), threading.Event()

    def state() -> str:
        asked.set()
        gone.wait(5)
        return "open" * 2_000_000  # more than the socket takes

    admin = Admin("127.0.0.1", 0, types.SimpleNamespace(placement=state))
    threads = threading.active_count()
    try:
        with socket.create_connection(("127.0.0.1", admin.port)) as caller:
            caller.sendall(b"GET /placement HTTP/1.0\r\n\r\n")
            assert asked.wait(5)
        gone.set()
        deadline = time.monotonic() + 5
        while threading.active_count() > threads and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        admin.stop()
    assert "Traceback" not in capfd.readouterr().err
