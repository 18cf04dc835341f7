"""Streams for a long time, with something killed now and then: `python -m benchmarks.serving.soak --minutes 30`.

Viewers watch paced streams, steer them, leave by END or by vanishing, and come back. Every so often the model
process or tritonserver is killed. Asked in the end: no slot is held, no byte is booked, no viewer saw a gap, and a step
takes as long as it did at the start (a fixed piece of work beside it tells how much slower the machine became).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import queue
import random
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tritonclient.grpc as triton
import typer
from fastar_client import FastarError, connect
from tritonclient.utils import InferenceServerException

from fastar_backend.serve import Server, ServeSettings

PROMPTS = ("a maze of metal rooms", "dodging fireballs in a grey hall", "a round arena with monsters")


class Soak:
    def __init__(self, server: Server, minutes: float, seed: int) -> None:
        self.server, self.rng = server, random.Random(seed)
        self.ends = time.monotonic() + 60 * minutes
        self.counts: Counter[str] = Counter()
        self.steps: list[tuple[float, float]] = []  # when, seconds a stream in the step
        self.memory: list[float] = []
        self.reference: list[float] = []  # seconds of a fixed piece of work, for machines that change speed

    async def viewer(self, number: int, fps: float) -> None:
        while time.monotonic() < self.ends:
            length, expected = self.rng.randrange(40, 200), 0
            try:
                async with connect(self.server.grpc_url, reconnect_seconds=90, timeout=120) as c:
                    stream = c.stream(self.rng.choice(PROMPTS), actions="forward", seed=self.rng.randrange(99), fps=fps)
                    async for chunk in stream:
                        self.counts["gaps"] += chunk.stats.chunk != expected
                        expected = chunk.stats.chunk + 1
                        self.counts["chunks"] += 1
                        self.steps.append((time.monotonic(), chunk.stats.step_seconds / chunk.stats.batch))
                        self.memory.append(chunk.stats.process_bytes / 2**20)
                        if self.rng.random() < 0.1:
                            await stream.act(self.rng.choice(("forward", "turn_left", "attack", "")))
                            self.counts["controls"] += 1
                        if expected >= length or time.monotonic() > self.ends:
                            break
                    self.counts["resumed"] += stream.reconnects
                self.counts["watched"] += 1
            except FastarError as error:
                self.counts[f"failed: {type(error).__name__}"] += 1
                await asyncio.sleep(1)

    async def vanisher(self) -> None:
        """Opens streams and drops the call without a word."""
        while time.monotonic() < self.ends:
            await asyncio.sleep(self.rng.uniform(5, 20))
            try:
                await asyncio.to_thread(vanish, self.server.grpc_url, self.rng.getrandbits(62) + 1)
                self.counts["vanished"] += 1
            except (InferenceServerException, queue.Empty):  # the server was dead just then
                self.counts["not there to vanish from"] += 1

    async def killer(self, every: float) -> None:
        while time.monotonic() + every < self.ends:
            await asyncio.sleep(every * self.rng.uniform(0.6, 1.4))
            processes = self.server.model_processes
            if processes:
                victim = self.rng.choice((processes[0], processes[0].parent()))
                victim.kill()
                self.counts["kills"] += 1

    async def clock(self) -> None:
        work = bytes(16 << 20)
        while time.monotonic() < self.ends:
            began = time.perf_counter()
            await asyncio.to_thread(hashlib.sha256, work)
            self.reference.append(time.perf_counter() - began)
            await asyncio.sleep(2)

    async def run(self, viewers: int, fps: float, every: float) -> None:
        tasks = [self.viewer(number, fps) for number in range(viewers)]
        await asyncio.gather(*tasks, self.vanisher(), self.killer(every), self.clock())


def vanish(url: str, sequence: int) -> None:
    """Opens a stream and, with two chunks on their way, drops the call."""
    client, replies = triton.InferenceServerClient(url), queue.Queue()
    client.start_stream(lambda result, error: replies.put((result, error)))
    try:
        for index in range(4):
            inputs = []
            for name, text in {"ACTIONS": "forward", "PROMPT": "" if index else PROMPTS[0], "OPTIONS": ""}.items():
                inputs.append(triton.InferInput(name, [1, 1], "BYTES"))
                inputs[-1].set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
            client.async_stream_infer("fastar", inputs, sequence_id=sequence, sequence_start=index == 0)
        replies.get(timeout=60)
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def metrics(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as reply:
        lines = [line.split() for line in reply.read().decode().splitlines() if line.startswith("fastar_")]
    return {name: float(value) for name, value in lines if "{" not in name}


def main(
    out: Path = Path("out/serving"),
    minutes: float = 30.0,
    viewers: int = 3,
    fps: float = 4.0,
    kill_seconds: Annotated[float, typer.Option(help="Mean time between kills.")] = 90.0,
    world: str = "doom",
    seed: int = 1,
) -> None:
    settings = ServeSettings(
        http_port=0, grpc_port=0, metrics_port=0, world=world, idle_seconds=10, max_restarts=1000, snapshot_chunks=12
    )
    with Server(settings) as server:
        soak = Soak(server, minutes, seed)
        asyncio.run(soak.run(viewers, fps, kill_seconds))
        time.sleep(settings.service.idle_seconds + 5)
        left = metrics(server)
        restarts = server.restarts
    # Steps of equal work: the median of the first tenth of the time after the caches are full, against the last.
    seconds = np.array([value for _, value in soak.steps])
    tenth, of_reference = max(1, len(seconds) // 10), max(1, len(soak.reference) // 10)
    result: dict[str, Any] = {
        "minutes": minutes, "counts": dict(soak.counts), "restarts": restarts,
        "slots_left": left["fastar_streams_active"], "bytes_left": left["fastar_cache_bytes"],
        "slow_down": float(np.median(seconds[-tenth:]) / np.median(seconds[:tenth])),
        "slow_down_of_reference": float(
            np.median(soak.reference[-of_reference:]) / np.median(soak.reference[:of_reference])
        ),
        "memory_mib": {"first": float(np.median(soak.memory[:tenth])), "last": float(np.median(soak.memory[-tenth:]))},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "soak.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
