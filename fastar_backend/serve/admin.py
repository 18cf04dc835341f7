"""`fastar serve --admin-port`: what a cluster's controller may ask of a server. Plain HTTP without passwords: only the
controller should reach that port.

`POST /move?streams=N`: N live streams (1..200) go on at other servers. 202: on its way; 400: wrong N; 409: impossible.
"""

from __future__ import annotations

import http.server
import re
import socket
import threading
from collections.abc import Callable

from fastar_backend.errors import InvalidInput
from fastar_backend.serve.settings import ServerError

SECONDS = 5.0  # that a caller may take
MOVE = re.compile(r"/move\?streams=(\d{1,3})")
MOST = 200


class Admin:
    """Listens from the start until `stop`. Raises InvalidInput where the port is in use."""

    def __init__(self, host: str, port: int, move: Callable[[int], None]) -> None:
        """port: 0 picks a free one. move: is asked with the number of streams; raises ServerError."""

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = SECONDS

            def do_POST(self) -> None:
                match = MOVE.fullmatch(self.path)
                if not match:
                    return self.reply(404, "allowed: POST /move?streams=N")
                if not 1 <= int(match[1]) <= MOST:
                    return self.reply(400, f"streams: got {match[1]}; allowed: 1..{MOST}")
                try:
                    move(int(match[1]))
                except ServerError as error:
                    return self.reply(409, str(error))
                return self.reply(202, "on its way")

            def reply(self, code: int, text: str) -> None:
                body = f"{text}\n".encode()
                self.send_response(code)
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
