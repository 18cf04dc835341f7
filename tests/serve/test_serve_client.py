"""End to end: the client package, real Triton, the embedded world."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import av
import numpy as np
import pytest
from fastar_client import InvalidArgument, StreamLost, connect, connect_blocking

from fastar_backend.serve import Server, ServeSettings

pytestmark = pytest.mark.server
PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


@pytest.fixture(scope="module")
def doom():
    with Server(ServeSettings(**PORTS, max_streams=2, threads=1)) as server:
        yield server


def collect(url: str, prompt: str, **options) -> np.ndarray:
    with connect_blocking(url) as connection:
        return np.concatenate([chunk.frames for chunk in connection.stream(prompt, **options)])


def test_actions_and_prompts_change_a_running_stream(doom):
    async def run():
        chunks, obeys = [], {}
        async with connect(doom.grpc_url) as connection:
            stream = connection.stream("a maze of metal rooms", actions="forward", frames=32, seed=7)
            async for chunk in stream:
                chunks.append(chunk)
                if chunk.stats.chunk == 2:
                    obeys["act"] = await stream.act("turn_left+attack")
                    obeys["prompt"] = await stream.prompt("gathering medkits on green acid")
        return chunks, obeys

    chunks, obeys = asyncio.run(run())
    assert [chunk.stats.chunk for chunk in chunks] == list(range(8))
    assert all(chunk.frames.shape == (4, 64, 96, 3) and chunk.frames.dtype == np.uint8 for chunk in chunks)
    assert [chunk.stats.prompt_applied for chunk in chunks] == [i == obeys["prompt"] for i in range(8)]
    assert chunks[-1].stats.cache_tokens > chunks[0].stats.cache_tokens
    assert 0 < chunks[-1].stats.density <= 1


def test_streams_side_by_side_show_what_they_show_alone(doom):
    prompts = {"take cover from fireballs": 3, "gathering medkits on green acid": 4}
    alone = {p: collect(doom.grpc_url, p, frames=12, seed=seed, actions="left") for p, seed in prompts.items()}

    async def one(connection, prompt: str, seed: int) -> np.ndarray:
        stream = connection.stream(prompt, frames=12, seed=seed, actions="left")
        return np.concatenate([chunk.frames async for chunk in stream])

    async def run():
        async with connect(doom.grpc_url) as connection:
            return await asyncio.gather(*(one(connection, p, seed) for p, seed in prompts.items()))

    for prompt, together in zip(prompts, asyncio.run(run()), strict=True):
        assert abs(alone[prompt].astype(int) - together).max() <= 3, prompt


def test_the_prompt_tells_the_scenario_even_from_nothing(doom):
    acid = collect(
        doom.grpc_url, "walk over glowing green slime and pick up medkits", frames=8, seed=1, start="nothing"
    )
    arena = collect(doom.grpc_url, "defend the center of the arena", frames=8, seed=1, start="nothing")
    floor = slice(40, 64)
    green = [video[:, floor, :, 1].mean() - video[:, floor, :, 0].mean() for video in (acid, arena)]
    assert green[0] > 20
    assert green[1] < 10


def test_actions_move_the_view(doom):
    left, right = (
        collect(doom.grpc_url, "take cover from fireballs", frames=24, seed=1, actions=turn).astype(int)
        for turn in ("turn_left", "turn_right")
    )
    assert abs(left[-1] - right[-1]).mean() > 2.5 * abs(left[0] - right[0]).mean()


def test_bad_input_costs_only_its_own_stream(doom):
    with connect_blocking(doom.grpc_url) as connection:
        live = connection.stream("take cover from fireballs", seed=1)
        first = next(live)
        with pytest.raises(InvalidArgument, match=r"ACTIONS\[0\].*'jump'.*forward"):
            list(connection.stream("a maze", actions="jump", frames=8))
        assert next(live).stats.chunk == first.stats.chunk + 1
        live.close()


def test_the_command_line(doom, tmp_path):
    command = [sys.executable, "-m", "fastar_client", "stream", "--url", doom.grpc_url, "--prompt", "a deadly corridor"]
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, "--actions", "forward*2,turn_left", "--frames", "10", "--out", str(out)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    with av.open(str(out / "video.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 10
    assert json.loads((out / "timings.json").read_text())["metrics"]["frames"] == 10
    bad = subprocess.run([*command, "--actions", "fly", "--out", str(out)], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "'fly'" in bad.stderr


def test_a_server_that_dies_leaves_what_was_received(tiny_world):
    received = []

    def watch(server: Server) -> None:
        with connect_blocking(server.grpc_url, reconnect_seconds=1) as connection:
            for chunk in connection.stream("take cover from fireballs", seed=1):
                received.append(chunk.stats.chunk)
                if len(received) == 3:
                    server.kill()

    settings = ServeSettings(**PORTS, world=str(tiny_world), max_streams=1, max_restarts=0, exit_timeout=3)
    with Server(settings) as server, pytest.raises(StreamLost):
        watch(server)
    assert received[:3] == [0, 1, 2]
