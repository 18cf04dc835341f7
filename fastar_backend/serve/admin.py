"""`fastar serve --admin-port`: what a cluster's controller and gateways may ask of a server. Plain HTTP without
passwords: nobody else should reach that port.

`POST /move?streams=N`: N live streams (1..200) go on at other servers. 409: impossible.
`POST /close?seconds=N`: for so long (0..600) new streams should go elsewhere; 0: no longer. Both are answered 202.
`GET /placement`: whether they should come here. 200 and "open"; 200, "full" or "closed" and the header that Envoy takes
for "only if nobody else can" in a health check; 503 and "not ready".
"""

from __future__ import annotations

import contextlib
import http.server
import re
import socket
import threading
from typing import Protocol

from fastar_backend.errors import InvalidInput
from fastar_backend.serve.placement import CLOSED, FULL, NOT_READY
from fastar_backend.serve.settings import ServerError

SECONDS = 5.0  # that a caller may take
ASK = re.compile(r"/(?:move\?(streams)|close\?(seconds))=(\d{1,3})")
ALLOWED = {"streams": range(1, 201), "seconds": range(601)}


class Asked(Protocol):
    """The server."""

    def move(self, streams: int) -> None:
        """Raises ServerError."""

    def close(self, seconds: float) -> None: ...

    def placement(self) -> str: ...


class Admin:
    """Listens from the start until `stop`. Raises InvalidInput where the port is in use."""

    def __init__(self, host: str, port: int, server: Asked) -> None:
        """port: 0 picks a free one."""

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = SECONDS

            def do_GET(self) -> None:
                if self.path != "/placement":
                    return self.reply(404, "allowed: GET /placement")
                state = server.placement()
                return self.reply(503 if state == NOT_READY else 200, state, state in (FULL, CLOSED))

            def do_POST(self) -> None:
                match = ASK.fullmatch(self.path)
                if not match:
                    return self.reply(404, "allowed: POST /move?streams=N, POST /close?seconds=N")
                name, value = match[1] or match[2], int(match[3])
                if value not in (allowed := ALLOWED[name]):
                    return self.reply(400, f"{name}: got {value}; allowed: {allowed[0]}..{allowed[-1]}")
                try:
                    (server.move if name == "streams" else server.close)(value)
                except ServerError as error:
                    return self.reply(409, str(error))
                return self.reply(202, "on its way")

            def reply(self, code: int, text: str, degraded: bool = False) -> None:
                body = f"{text}\n".encode()
                with contextlib.suppress(ConnectionError):  # the caller did not wait
                    self.send_response(code)
                    if degraded:
                        self.send_header("x-envoy-degraded", "true")
                    self.send_header("Content-Type", "text/plain")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """The model process says what it moves."""

        class Listener(http.server.ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True

        try:
            self._server = Listener((host, port), Handler)
        except OSError as error:
            where = f"port {port} of {host}: {(error.strerror or str(error)).lower()}"
            raise InvalidInput("--admin-port", where, "a free port, or 0 to have one chosen") from None
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="fastar-admin", daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
