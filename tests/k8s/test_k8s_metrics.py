"""A live server behind the live gateway: what rules, alerts and triggers name is there, and streams pass."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.parse
import urllib.request

import policy
import pytest
from fastar_client import ResourceExhausted, connect
from rendered import VARIANTS, rendered
from running_envoy import Gateway, gateway

from fastar_backend.serve import Server, ServeSettings

pytestmark = pytest.mark.server
PROMPT = "walking through a maze"
RATE = 12.0  # FPS of the viewer


@pytest.fixture(scope="module")
def server(tiny_world):
    settings = ServeSettings(
        http_port=0, grpc_port=0, metrics_port=0, world=str(tiny_world), device="cpu", threads=1, max_streams=1,
        admin_port=0, snapshot_chunks=2, attention={"kind": "fastar", "budget_frames": 4, "recent_frames": 2},
    )  # fmt: skip
    with Server(settings) as server:
        yield server


@pytest.fixture(scope="module")
def running(server, tmp_path_factory):
    ports = server.ports["grpc"], urllib.parse.urlsplit(server.admin_url).port
    with gateway(tmp_path_factory.mktemp("envoy"), [ports]) as running:
        running.wait_for(1)  # the server answers both kinds of health checks
        running.wait_for_open(1)
        yield running


async def watch(running: Gateway) -> None:
    """One viewer, refused a second time, as the only server is full; slow for a moment, so that a chunk is late."""
    async with connect(running.url) as c:
        async with c.stream(PROMPT, fps=RATE, seed=1) as stream:
            chunk = await anext(stream)
            await asyncio.to_thread(running.wait_for_open, 0)
            async with c.stream(PROMPT, seed=2) as refused:
                with pytest.raises(ResourceExhausted):
                    await anext(refused)
            await asyncio.sleep(3)
            frames = 0
            while frames < 3 * RATE:  # longer than the window over which the server measures a stream's rate
                chunk = await anext(stream)
                frames += chunk.stats.frames
        assert chunk.frames.std() > 1


def scrape(server: Server) -> dict[str, set[str]]:
    """Series name, as Prometheus stores it, -> the labels that it has."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as reply:
        text = reply.read().decode()
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^([a-zA-Z_:][\w:]*)(\{.*\})? ", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def wanted() -> set[str]:
    """The servers' series in all that ships."""
    fleets = [policy.Fleet(rendered(variant)) for variant in VARIANTS]
    named = {name for fleet in fleets for query in fleet.queries() for name in policy.names_in(query)}
    return named - policy.ENVOY - {name for fleet in fleets for name in fleet.recorded()}


def test_every_metric_in_k8s_is_exported(server, running):
    asyncio.run(asyncio.wait_for(watch(running), 60))
    assert len(wanted()) >= 10
    deadline = time.monotonic() + 20
    while wanted() - (found := scrape(server)).keys() and time.monotonic() < deadline:
        time.sleep(0.2)  # counters are written in the background
    assert not wanted() - found.keys()
    assert found["fastar_streams_rejected_total"] >= {"reason"}
    assert found["fastar_chunk_seconds_count"] >= {"phase"}
    assert found["fastar_snapshots_total"] >= {"result"}
    assert found["fastar_stream_fps_bucket"] >= {"le"}
