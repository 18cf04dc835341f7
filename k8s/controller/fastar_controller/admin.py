"""What a server is told by its admin port (`fastar serve --admin-port`)."""

from __future__ import annotations

import http.client
import urllib.request


class AdminError(Exception):
    """Which address, and why."""


def move(url: str, streams: int, timeout: float) -> None:
    """So many live streams are to go on at other servers. url: http://host:port. Raises AdminError, see `tell`."""
    tell(f"{url}/move?streams={streams}", timeout)


def close(url: str, seconds: int, timeout: float) -> None:
    """For so long new streams are to go elsewhere, as far as others take any; 0: no longer. Raises AdminError."""
    tell(f"{url}/close?seconds={seconds}", timeout)


def tell(url: str, timeout: float) -> None:
    """Returns when the server has taken note. Raises AdminError: no answer in `timeout` seconds, or one that is
    not 202."""
    request = urllib.request.Request(url, method="POST")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=timeout) as reply:
            status = reply.status
    except (OSError, http.client.HTTPException) as error:
        raise AdminError(f"{url}: {error}") from error
    if status != 202:
        raise AdminError(f"{url}: status {status}")
