"""Whether new streams should come to a server: what gateways are told when they ask (admin.py)."""

from __future__ import annotations

import http.client
import re
import time
import urllib.request

OPEN = "open"
CLOSED = "closed"  # the cluster's controller wants new streams elsewhere
FULL = "full"
NOT_READY = "not ready"
SECONDS = 1.0  # that Triton may take to say something
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # our own address needs no proxy


class Placement:
    """Of one server. Thread-safe."""

    def __init__(self) -> None:
        self._closed_until = 0.0  # time.monotonic

    def close(self, seconds: float) -> None:
        """Closed for so long, unless it is full; 0: no longer."""
        self._closed_until = time.monotonic() + seconds

    def look(self, url: str, metrics: str) -> str:
        """OPEN, CLOSED, FULL or NOT_READY. url: of Triton's HTTP port."""
        try:
            fetch(f"{url}/v2/health/ready")
            text = fetch(metrics)
            live, slots = (gauge(text, f"fastar_streams_{name}") for name in ("active", "capacity"))
        except (OSError, http.client.HTTPException, ValueError):
            return NOT_READY
        if live >= slots:
            return FULL
        return CLOSED if time.monotonic() < self._closed_until else OPEN


def fetch(url: str) -> str:
    """Raises OSError (of which HTTPError is one) or HTTPException."""
    with DIRECT.open(url, timeout=SECONDS) as reply:
        return reply.read().decode()


def gauge(metrics: str, name: str) -> float:
    """Raises ValueError where it is not there."""
    found = re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE)
    if not found:
        raise ValueError(f"no {name}")
    return float(found[1])
