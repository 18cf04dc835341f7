"""What a server says of itself: its /metrics, read."""

from __future__ import annotations

import dataclasses
import http.client
import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

LARGEST = 8 << 20  # bytes of an answer
NEEDED = ("fastar_streams_active", "fastar_streams_capacity")


class ScrapeError(Exception):
    """Which address, and why."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """One look. rates: observations of `fastar_stream_fps` so far, by the upper bound of their bucket, cumulative."""

    streams: int
    slots: int
    draining: bool
    rates: dict[float, float]


def parse(text: str) -> Reading:
    """Prometheus' text format. Raises ValueError where it is broken, or is not a server's."""
    values: dict[str, float] = {}
    rates: dict[float, float] = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("fastar_"):
            continue
        for sample in family.samples:
            # Triton has no histograms in its Python API: the buckets are counters.
            if sample.name.removesuffix("_total") == "fastar_stream_fps_bucket":
                bound = float(sample.labels["le"])
                rates[bound] = rates.get(bound, 0.0) + sample.value
            elif sample.name in (*NEEDED, "fastar_draining"):
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    if missing := [name for name in NEEDED if name not in values]:
        raise ValueError(f"no {missing[0]}")
    active, capacity = (int(values[name]) for name in NEEDED)
    return Reading(active, capacity, values.get("fastar_draining", 0.0) > 0, rates)


def scrape(url: str, timeout: float) -> Reading:
    """Raises ScrapeError: no answer in `timeout` seconds, another status than 200, or not a server's metrics."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=timeout) as reply:
            return parse(reply.read(LARGEST).decode())
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise ScrapeError(f"{url}: {error}") from error
