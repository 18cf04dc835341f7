"""How fast, and how much memory, by length of the history: each policy in a process of its own, on all threads.

    python -m fastar_backend.evaluation.speed '{"world": ..., "device": ..., "attention": {...}, "marks": [...]}'

The caches are filled with random keys and values up to each length (a chunk's cost does not depend on what they hold,
but for what merges), then chunks are timed: from the call to the frames. Memory: the process's peak since the fill
(Linux; on a GPU the allocator's). Beside the chunks a fixed piece of work is timed, always the same: where others share
the machine it tells how fast that was just then. Prints a line of JSON for each mark."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from fastar_backend.attention.layers import PortableCaches
from fastar_backend.config import AttentionConfig, parse
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import ChunkRequest, Stream, StreamOptions
from fastar_backend.engine.warm_up import fill_chunk
from fastar_backend.errors import FastarError

CHUNKS = 3  # timed at each mark, at most; the median counts
START = 30.0  # seconds to load
SECONDS = 4.0  # of timing at a mark: no further chunk after that (but at least one)
PATIENCE = 20.0  # seconds a mark for a policy; what takes longer is not measured further on


def measure_speed(world: str, device: str, attention: AttentionConfig, marks: Sequence[int], threads: int | None
                  ) -> dict[str, Any]:  # fmt: skip
    """In a fresh process. marks: video frames, ascending. Raises FastarError if that fails."""
    job = {"world": world, "device": device, "attention": attention.model_dump(mode="json"), "marks": list(marks),
           "threads": threads}  # fmt: skip
    command = [sys.executable, "-m", "fastar_backend.evaluation.speed", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE * len(marks) + START)
        out, ended = done.stdout, done.stderr.decode().strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        stopped = None if done.returncode == 0 else ended[0]
    except subprocess.TimeoutExpired as error:
        out, stopped = error.stdout or b"", "it took too long"
    rows = [json.loads(line) for line in out.decode().splitlines() if line.endswith("}")]
    if not rows:
        raise FastarError(f"speed: no chunk was timed ({stopped!s:.200}); allowed: a policy that runs on {device}")
    return {"rows": rows, "stopped": stopped}


def main(job: dict[str, Any]) -> None:
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    attention = parse(AttentionConfig, job["attention"], "attention")
    engine = StreamEngine.load(job["world"], job["device"], attention, max_streams=1)
    engine.stream_bytes = 1 << 62
    scenario = next(iter(engine.world.config.scenarios.values()), None)
    engine.open(1, scenario.prompt if scenario else "a world", StreamOptions(seed=1, start="nothing"))
    stream = engine.streams[1]
    for _ in range(2):  # compiles, allocates
        _timed(engine)
    filled = 0
    for mark in job["marks"]:
        peak = peak_bytes(device)
        fill(engine, stream, max(0, mark // engine.world.config.frames_per_latent - filled))
        filled = mark // engine.world.config.frames_per_latent
        reference, seconds, began = reference_seconds(device), [], time.perf_counter()
        while len(seconds) < CHUNKS and (not seconds or time.perf_counter() - began < SECONDS):
            frames, taken, bytes_held = _timed(engine)
            seconds.append(taken)
        row = {"frame": mark, "fps": frames / sorted(seconds)[len(seconds) // 2], "cache_bytes": bytes_held,
               "peak_bytes": peak(), "reference": (reference + reference_seconds(device)) / 2}  # fmt: skip
        print(json.dumps(row), flush=True)


def reference_seconds(device: torch.device) -> float:
    """Median time of some matrix products."""
    x, weight = torch.ones(192, 256, device=device), torch.ones(256, 608, device=device)
    found = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(200):
            x @ weight
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return sorted(found)[2]


def _timed(engine: StreamEngine) -> tuple[int, float, int]:
    """Frames, seconds and cache bytes of the next chunk. Raises FastarError."""
    began = time.perf_counter()
    (result,) = engine.step([ChunkRequest(1, ("",))])
    if isinstance(result, FastarError):
        raise result
    return result.stats.frames, time.perf_counter() - began, result.stats.cache_bytes


def fill(engine: StreamEngine, stream: Stream, latents: int) -> None:
    """Random history of so many more latent frames. A cache that no longer grows is not filled further, but its clock
    goes on."""
    size = engine.shape.chunk_frames
    sizes: list[float] = []
    for chunk in range(latents // size):
        sizes.append(stream.caches.stats().tokens)
        if len(sizes) > 6 and sizes[-1] <= sizes[-6]:  # full
            stream.latent_frame += (latents // size - chunk) * size
            return
        _append(engine, stream)


@torch.inference_mode()
def _append(engine: StreamEngine, stream: Stream) -> None:
    """A chunk of random keys and values. Portable caches take it without computing attention."""
    if not isinstance(stream.caches, PortableCaches):
        fill_chunk(engine, stream)
        return
    shape = engine.shape
    like = (shape.heads, shape.chunk_tokens, shape.head_dim)
    stream.begin_caches()
    for cache in stream.caches:
        cache.append(*(torch.randn(like, device=engine.device, dtype=engine.dtype) for _ in range(3)))
    stream.caches.commit()
    stream.latent_frame += shape.chunk_frames


def peak_bytes(device: torch.device) -> Callable[[], int]:
    """Begins to watch; the function returned says the peak since then."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        lines = Path("/proc/self/status").read_text()
        if "VmHWM:" in lines:
            return lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except OSError:  # not Linux, or not allowed: what is held now
        pass
    process = psutil.Process()
    return lambda: process.memory_info().rss


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except FastarError as error:
        sys.exit(f"{error}")
