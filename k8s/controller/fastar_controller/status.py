"""What the controller says of itself: /metrics and /healthz, and one line on stderr for each kind of error a minute."""

from __future__ import annotations

import http.server
import sys
import threading
import time

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest

QUIET = 60.0  # seconds between two lines of a kind
DEAD = 120.0  # seconds without a round: well above the longest pause and the slowest scrapes


class Status:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def of(kind: type, name: str, text: str, labels: tuple[str, ...] = ()):
            return kind(f"fastar_controller_{name}", text, labels, registry=self.registry)

        self._pods = of(Gauge, "pods", "Pods seen by the leader", ("placement",))
        self._streams = of(Gauge, "streams", "Live streams on them")
        self._patches = of(Counter, "patches", "Pods patched")
        self._moves = of(Counter, "moves", "Streams that slow pods were asked to send on")
        self._errors = of(Counter, "errors", "Calls that failed", ("call",))
        self._leader = of(Gauge, "leader", "1 while this one leads")
        for call in ("api", "close", "lease", "move", "scrape"):
            self._errors.labels(call)
        self._alive = time.monotonic()
        self._said: dict[str, float] = {}

    def seen(self, opened: int, closed: int, streams: int) -> None:
        self._pods.labels("open").set(opened)
        self._pods.labels("closed").set(closed)
        self._streams.set(streams)

    def patched(self) -> None:
        self._patches.inc()

    def moved(self) -> None:
        self._moves.inc()

    def led(self, leads: bool) -> None:
        self._leader.set(leads)
        if not leads:
            self._pods.clear()  # another's to count
            self._streams.set(0)

    def error(self, call: str, text: str) -> None:
        self._errors.labels(call).inc()
        now = time.monotonic()
        if now - self._said.get(call, -QUIET) >= QUIET:
            self._said[call] = now
            print(f"{call}: {text}", file=sys.stderr, flush=True)

    def alive(self) -> None:
        self._alive = time.monotonic()

    def serve(self, host: str, port: int) -> http.server.ThreadingHTTPServer:
        """Raises OSError. Its `server_address` has the port."""
        status = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self.reply(200, generate_latest(status.registry), CONTENT_TYPE_LATEST)
                elif self.path == "/healthz":
                    well = time.monotonic() - status._alive < DEAD
                    self.reply(200 if well else 503, b"ok\n" if well else b"stuck\n", "text/plain")
                else:
                    self.reply(404, b"", "text/plain")

            def reply(self, code: int, body: bytes, kind: str) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Probes are no news."""

        server = http.server.ThreadingHTTPServer((host, port), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, name="status", daemon=True).start()
        return server
