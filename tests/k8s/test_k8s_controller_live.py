"""The controller's view of a real server: the names it reads are those that are exported."""

from __future__ import annotations

import asyncio

import pytest
from fake_api import Api, eventually
from fastar_client import connect
from fastar_controller.health import slowest_tenth
from fastar_controller.scrape import scrape
from running_controller import controller

from fastar_backend.serve import Server, ServeSettings

pytestmark = pytest.mark.server
pytest.importorskip("kubernetes")


@pytest.fixture(scope="module")
def server(tiny_world):
    settings = ServeSettings(
        http_port=0, grpc_port=0, metrics_port=0, world=str(tiny_world), device="cpu", threads=1, max_streams=1,
        attention={"kind": "fastar", "budget_frames": 4, "recent_frames": 2},
    )  # fmt: skip
    with Server(settings) as server:
        yield server


async def watch(server: Server, api: Api) -> None:
    """One viewer, long enough for his rate to be measured (two seconds), and in the deletion cost meanwhile."""
    async with connect(f"127.0.0.1:{server.ports['grpc']}") as c, c.stream("walking through a maze", seed=1) as stream:
        start = asyncio.get_running_loop().time()
        async for _ in stream:
            if asyncio.get_running_loop().time() - start > 4:
                break
        await asyncio.to_thread(eventually, lambda: api.costs() == {"triton-0": "100"})


def test_a_live_server_gets_its_cost(server):
    api = Api()
    api.add("triton-0", server.ports["metrics"])
    before = scrape(server.metrics_url, 5.0)
    assert (before.streams, before.slots, before.draining) == (0, 1, False)
    try:
        with controller(api):
            eventually(lambda: api.costs() == {"triton-0": "0"})
            asyncio.run(asyncio.wait_for(watch(server, api), 60))
            eventually(lambda: api.costs() == {"triton-0": "0"})
            eventually(lambda: slowest_tenth(before.rates, scrape(server.metrics_url, 5.0).rates) is not None)
    finally:
        api.stop()
