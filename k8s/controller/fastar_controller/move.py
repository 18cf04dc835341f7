"""Asks a server to send live streams on to others (`fastar serve --admin-port`)."""

from __future__ import annotations

import http.client
import urllib.request


class MoveError(Exception):
    """Which address, and why."""


def move(url: str, streams: int, timeout: float) -> None:
    """url: http://host:port. Returns when the server has taken note. Raises MoveError: no answer in `timeout` seconds,
    or another one than 202."""
    request = urllib.request.Request(f"{url}/move?streams={streams}", method="POST")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=timeout) as reply:
            status = reply.status
    except (OSError, http.client.HTTPException) as error:
        raise MoveError(f"{url}: {error}") from error
    if status != 202:
        raise MoveError(f"{url}: status {status}")
