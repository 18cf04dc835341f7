"""What serving costs and how it scales, on the machine it runs on: `python -m benchmarks.serving.load --out DIR`.

Every figure has its baseline in the same run: the engine alone in this process for the overhead, one stream for many,
the chunk period for the latency of a control. Writes load.json, load.md and load.png.
"""

from __future__ import annotations

import asyncio
import json
import platform
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import psutil
import torch
import typer
from fastar_client import connect
from rich.console import Console

from benchmarks.serving import fuzz
from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.snapshot import Snapshot
from fastar_backend.engine.stream import ChunkRequest, StreamOptions
from fastar_backend.serve import Server, ServeSettings
from fastar_backend.service.store import SnapshotStore

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

PROMPT = "a maze of metal rooms"
PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
WARM = 14  # chunks until the caches are full
say = Console(highlight=False).print


def engine_alone(device: str, chunks: int) -> dict[str, float]:
    """The baseline: seconds of a chunk of one stream in this process, and of storing and restoring it."""
    engine = StreamEngine.load("doom", device)
    engine.open(1, PROMPT, StreamOptions(seed=1))
    seconds = []
    for _ in range(WARM + chunks):
        began = time.perf_counter()
        engine.step([ChunkRequest(1, ("forward",))])
        seconds.append(time.perf_counter() - began)
    result = {"chunk": statistics.median(seconds[WARM:])}
    with tempfile.TemporaryDirectory() as folder:
        store, times = SnapshotStore(folder, 2, 3600.0), {"snapshot": [], "resume": []}
        for number in range(5):
            began = time.perf_counter()
            store.put("token", number, engine.snapshot(1).to_bytes())
            stored = time.perf_counter()
            engine.restore(2, Snapshot.from_bytes(store.get("token")[1]))
            times["snapshot"].append(stored - began)
            times["resume"].append(time.perf_counter() - stored)
            engine.close(2)
        result |= {name: statistics.median(values) for name, values in times.items()}
        result["snapshot_bytes"] = len(store.get("token")[1])
    return result


async def one_stream(url: str, chunks: int) -> dict[str, float]:
    """Seconds between chunks at the client, and of the steps that made them."""
    arrivals, steps, encodes = [], [], []
    async with connect(url) as c, c.stream(PROMPT, actions="forward", seed=1) as stream:
        async for chunk in stream:
            arrivals.append(chunk.received_at)
            steps.append(chunk.stats.step_seconds)
            encodes.append(chunk.stats.encode_seconds)
            if len(arrivals) == WARM + chunks:
                break
    return {
        "chunk": statistics.median(np.diff(arrivals)[WARM:].tolist()),
        "step": statistics.median(steps[WARM:]),
        "encode": statistics.median(encodes[WARM:]),
    }


async def many(url: str, streams: int, seconds: float) -> dict[str, Any]:
    """Frames per second of all streams together, after all are warm; who was in how full a batch."""
    batches: Counter[int] = Counter()
    counted: list[tuple[float, int, int]] = []

    async def one(c: Any, number: int) -> None:
        async with c.stream(PROMPT, actions="forward", seed=number) as stream:
            async for chunk in stream:
                if chunk.stats.chunk >= WARM:
                    counted.append((chunk.received_at, number, len(chunk.frames)))
                    batches[chunk.stats.batch] += 1
                if len({n for _, n, _ in counted}) == streams and not until[0]:
                    until[0] = chunk.received_at + seconds
                if until[0] and chunk.received_at > until[0]:
                    return

    until = [0.0]
    async with connect(url) as c:
        await asyncio.gather(*(one(c, number) for number in range(streams)))
    inside = [item for item in counted if until[0] - seconds <= item[0] <= until[0]]
    each = Counter()
    for _, number, frames in inside:
        each[number] += frames
    return {
        "streams": streams,
        "fps": sum(frames for _, _, frames in inside) / seconds,
        "slowest": min(each.values()) / seconds,
        "fastest": max(each.values()) / seconds,
        "batches": {str(size): count for size, count in sorted(batches.items())},
    }


async def control_latency(url: str, fps: float, controls: int) -> dict[str, Any]:
    """From `act` to the arrival of the first chunk that obeys, in periods of a paced stream's chunks."""
    rng, waits = np.random.default_rng(1), []
    async with connect(url) as c, c.stream(PROMPT, actions="forward", seed=1, fps=fps) as stream:
        arrived: dict[int, float] = {}
        period = 0.0

        async def read() -> None:
            nonlocal period
            async for chunk in stream:
                arrived[chunk.stats.chunk] = chunk.received_at
                period = len(chunk.frames) / fps

        reader = asyncio.create_task(read())
        while len(arrived) < WARM:
            await asyncio.sleep(0.05)
        for index in range(controls):
            await asyncio.sleep(float(rng.uniform(1.0, 2.0)) * period)
            began = time.monotonic()
            receipt = await stream.act(("turn_left", "forward")[index % 2])
            chunk = await receipt.applied()
            while chunk not in arrived:
                await asyncio.sleep(0.001)
            waits.append((arrived[chunk] - began) / period)
        reader.cancel()
    p50, p95 = np.percentile(waits, (50, 95))
    return {"fps": fps, "controls": controls, "p50": float(p50), "p95": float(p95), "max": max(waits)}


def main(
    out: Path = Path("out/serving"),
    device: str = "cpu",
    seconds: Annotated[float, typer.Option(help="Of each measurement of many streams.")] = 20.0,
    chunks: Annotated[int, typer.Option(help="Of each measurement of one stream.")] = 60,
    streams: Annotated[str, typer.Option(help="Numbers of streams.")] = "1,2,4,8,16",
    requests: Annotated[int, typer.Option(help="Fuzzed requests; 0: none.")] = 10_000,
) -> None:
    """Runs all but the soak (`benchmarks.serving.soak`)."""
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    machine = {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count(), "threads": threads,
               "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip
    result: dict[str, Any] = {"machine": machine, "alone": engine_alone(device, chunks)}
    say(f"engine alone: {result['alone']}")
    settings = ServeSettings(**PORTS, device=device, attention=AttentionConfig(), max_streams=16)
    with Server(settings) as server:
        url = server.grpc_url
        result["served"] = asyncio.run(one_stream(url, chunks))
        say(f"served: {result['served']}")
        result["many"] = []
        for number in map(int, streams.split(",")):
            result["many"].append(asyncio.run(many(url, number, seconds)))
            say(str(result["many"][-1]))
        fps = 0.5 * result["many"][0]["fps"]
        result["control"] = asyncio.run(control_latency(url, fps, 60))
        say(f"control: {result['control']}")
        (model,) = server.model_processes
        fuzz.run(url, requests // 10, seed=1)
        time.sleep(2)
        before = model.memory_info().rss
        counts = fuzz.run(url, requests, seed=2)
        time.sleep(settings.service.idle_seconds + 2)
        result["fuzz"] = counts | {
            "memory_growth_mib": (model.memory_info().rss - before) / 2**20,
            "restarts": server.restarts,
            "same_process": server.model_processes == [model],
        }
        say(f"fuzz: {result['fuzz']}")
    (out / "load.json").write_text(json.dumps(result, indent=1))
    (out / "load.md").write_text(table(result))
    plot(result, out / "load.png")
    say(table(result))


def table(result: dict[str, Any]) -> str:
    alone, served, control = result["alone"], result["served"], result["control"]
    over = served["chunk"] - served["step"]
    one = result["many"][0]["fps"]
    lines = [
        f"Machine: {result['machine']}",
        "",
        "| | |",
        "|---|---|",
        f"| chunk, engine alone in a process | {1000 * alone['chunk']:.1f} ms |",
        f"| chunk at the client, one stream | {1000 * served['chunk']:.1f} ms |",
        f"| of which step | {1000 * served['step']:.1f} ms |",
        f"| serving overhead a chunk (interval less step) | {1000 * over:.1f} ms ({over / served['chunk']:.1%}) |",
        f"| snapshot and resume | {1000 * alone['snapshot']:.0f} + {1000 * alone['resume']:.0f} ms, "
        f"{alone['snapshot_bytes'] / 2**20:.1f} MiB |",
        f"| control to its first chunk, stream at {control['fps']:.1f} FPS | p50 {control['p50']:.2f}, p95 "
        f"{control['p95']:.2f} periods ({control['controls']} controls) |",
        f"| fuzz | {result['fuzz']} |",
        "",
        "| streams | total FPS | against one | slowest / fastest stream | chunks by batch size |",
        "|---|---|---|---|---|",
    ]
    for row in result["many"]:
        batches = ", ".join(f"{size}: {count}" for size, count in row["batches"].items())
        spread = f"{row['slowest']:.2f} / {row['fastest']:.2f}"
        lines.append(f"| {row['streams']} | {row['fps']:.1f} | {row['fps'] / one:.2f}x | {spread} | {batches} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    rows = result["many"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([row["streams"] for row in rows], [row["fps"] for row in rows], "o-", label="all streams")
    left.plot([row["streams"] for row in rows], [row["slowest"] for row in rows], "s--", label="the slowest of them")
    left.set(xlabel="streams", ylabel="frames per second", ylim=(0, None), title="as fast as possible")
    left.legend()
    for row in rows:
        sizes = sorted(map(int, row["batches"]))
        counts = np.array([row["batches"][str(size)] for size in sizes])
        right.plot(sizes, counts / counts.sum(), "o-", label=f"{row['streams']} streams")
    right.set(xlabel="streams in the step", ylabel="share of chunks", title="how full batches are")
    right.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
