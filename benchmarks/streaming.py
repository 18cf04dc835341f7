"""Speed and memory against video length: FAST-AR, a window of equal budget, and dense attention, in one run.

    python benchmarks/streaming.py --frames 2880 --dense-seconds 120 --out out/streaming

Each policy streams the same prompt, actions and seed through the engine (no server) in a process of its own. Dense
attention streams for --dense-seconds; beyond, its speed at a length is measured by filling its caches with random keys
and values to that length (the cost does not depend on what they hold) and timing three chunks. Every fifth chunk a
fixed piece of arithmetic is timed too: machines that others share change speed during a run, so flatness is given as
measured and relative to that reference. Writes streaming.json, streaming.md, streaming.png.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import torch
import typer
from rich.console import Console
from rich.progress import Progress

ACTIONS = ("forward",) * 6 + ("turn_left",) * 6 + ("forward",) * 4 + ("turn_right",) * 8  # per latent frame, looped
PROMPT = "a maze of metal rooms"
POLICIES = {"fastar": "{}", "window": '{"kind": "window"}', "dense": '{"kind": "dense"}'}
MARKS = (240, 480, 720, 1440, 2880)
app = typer.Typer(add_completion=False)


def action_of(chunk: int, latent_frames: int) -> tuple[str, ...]:
    return tuple(ACTIONS[(chunk * latent_frames + i) % len(ACTIONS)] for i in range(latent_frames))


@app.command(hidden=True)
def worker(world: str, device: str, attention: str, frames: int, seconds: float, threads: int) -> None:
    """One policy: a JSON line per chunk on stdout."""
    from fastar_backend.config import AttentionConfig, parse
    from fastar_backend.engine.engine import StreamEngine
    from fastar_backend.engine.stream import ChunkRequest, StreamOptions
    from fastar_backend.engine.warm_up import costs

    torch.set_num_threads(threads)
    config = parse(AttentionConfig, json.loads(attention), "attention")
    engine = StreamEngine.load(world, device, config)
    costs(engine, [1])
    latent_frames = engine.shape.chunk_frames
    process = psutil.Process()
    engine.open(1, PROMPT, StreamOptions(seed=1, start="my_way_home"))

    def memory() -> int:
        return torch.cuda.memory_allocated() if device == "cuda" else process.memory_info().rss

    began, frame, chunk = time.monotonic(), 0, 0
    while frame < frames and time.monotonic() - began < seconds:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        (result,) = engine.step([ChunkRequest(1, action_of(chunk, latent_frames))])
        elapsed = time.perf_counter() - start  # frames are on the CPU: the step is over
        frame, chunk = frame + result.stats.frames, chunk + 1
        if chunk % 5 == 1:
            reference = reference_seconds(device)
        row = {"frame": frame, "seconds": elapsed, "reference": reference, "memory": memory(),
               "cache_bytes": result.stats.cache_bytes, "density": result.stats.density,
               "tokens": result.stats.cache_tokens}  # fmt: skip
        print(json.dumps(row), flush=True)
    if config.kind == "dense":
        for mark in (mark for mark in MARKS if frame < mark <= frames):
            fill(engine.streams[1], mark // engine.world.config.frames_per_latent)
            for _ in range(3):
                start = time.perf_counter()
                (result,) = engine.step([ChunkRequest(1, ("forward",))])
                row = {"frame": mark, "seconds": time.perf_counter() - start, "memory": memory(),
                       "cache_bytes": result.stats.cache_bytes, "density": 1.0, "tokens": result.stats.cache_tokens,
                       "filled": True}  # fmt: skip
                print(json.dumps(row), flush=True)


def reference_seconds(device: str) -> float:
    """Time of a fixed piece of work, shaped like a chunk's: attention over 12 latent frames and matrix products."""
    query, keys, x = (torch.ones(shape, device=device) for shape in ((1, 4, 192, 64), (1, 4, 1344, 64), (192, 256)))
    weight = torch.ones(256, 608, device=device)
    start = time.perf_counter()
    for _ in range(6):
        torch.nn.functional.scaled_dot_product_attention(query, keys, keys)
        for _ in range(6):
            x @ weight
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fill(stream, latent_frames: int) -> None:
    """Makes dense caches hold `latent_frames` frames of random keys and values."""
    for cache in stream.caches:
        missing = latent_frames - len(cache.times)
        extra = torch.randn(cache.shape.heads, missing * cache.shape.frame_tokens, cache.shape.head_dim)
        held = cache.keys[:, : cache.end], cache.values[:, : cache.end]
        cache.keys, cache.values = (torch.cat([part, extra.to(part)], 1) for part in held)
        cache.times = list(range(latent_frames))
        cache.history_frames = cache.start = latent_frames
    stream.latent_frame = latent_frames


def measure(policy: str, frames: int, seconds: float, world: str, device: str, threads: int, progress: Progress):
    command = [sys.executable, __file__, "worker", world, device, POLICIES[policy], str(frames), str(seconds),
               str(threads)]  # fmt: skip
    rows, task = [], progress.add_task(policy, total=frames)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            rows.append(json.loads(line))
            fps = 4 * len(rows[-8:]) / sum(row["seconds"] for row in rows[-8:])
            progress.update(task, completed=rows[-1]["frame"], description=f"{policy:7s} {fps:5.1f} FPS")
    if process.returncode:
        raise SystemExit(f"{policy}: the worker ended with exit code {process.returncode}")
    return rows


def fps_at(rows: list[dict], frame: int, width: int = 12) -> float | None:
    """Median FPS of the chunks around `frame`; None if the run did not get there."""
    per_chunk = rows[1]["frame"] - rows[0]["frame"]
    filled = [row["seconds"] for row in rows if row.get("filled") and row["frame"] == frame]
    if filled:
        return per_chunk / float(np.median(filled))
    frames = np.array([row["frame"] for row in rows if not row.get("filled")])
    if frame > frames[-1]:
        return None
    near = np.argsort(abs(frames - frame))[:width]
    return per_chunk / float(np.median([rows[i]["seconds"] for i in near]))


def flatness(rows: list[dict]) -> dict[str, float]:
    """Last decile against the first steady decile (the tenth of the run after the cache is full), as measured and
    relative to the reference work, and memory growth."""
    full = next(i for i, row in enumerate(rows) if row["tokens"] >= 0.98 * rows[-1]["tokens"])
    tenth = max(len(rows) // 10, 1)
    seconds = np.array([row["seconds"] for row in rows])
    relative = seconds / np.array([row["reference"] for row in rows])
    first, last = slice(full, full + tenth), slice(-tenth, None)
    memory = np.array([row["memory"] for row in rows], dtype=float)
    return {
        "cache_full_at_frame": rows[full]["frame"],
        "last_over_first_decile_fps": float(np.median(seconds[first]) / np.median(seconds[last])),
        "same_relative_to_reference": float(np.median(relative[first]) / np.median(relative[last])),
        "memory_growth": float(memory[full + 1 :].max() / memory[first].max() - 1),
    }  # fmt: skip


def plot(runs: dict[str, list[dict]], path: Path, dense_seconds: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for policy, all_rows in runs.items():
        rows = [row for row in all_rows if not row.get("filled")]
        frames = [row["frame"] for row in rows]
        seconds = np.array([row["seconds"] for row in rows])
        smooth = np.array([np.median(seconds[max(0, i - 6) : i + 7]) for i in range(len(seconds))])
        left.plot(frames, (frames[1] - frames[0]) / smooth, label=policy)
        right.plot(frames, [row["memory"] / 2**20 for row in rows], label=policy)
    left.set(xlabel="frame", ylabel="frames per second", yscale="log")
    right.set(xlabel="frame", ylabel="process memory (MiB)", title="memory")
    marks = sorted({row["frame"] for row in runs["dense"] if row.get("filled")})
    left.plot(marks, [fps_at(runs["dense"], mark) for mark in marks], "o--", color="C2", label="dense, caches filled")
    left.set_title(f"speed (dense streamed for {dense_seconds:.0f} s)")
    left.legend()
    figure.savefig(path, dpi=120)


@app.command()
def run(
    frames: int = 2880,
    dense_seconds: float = 120.0,
    world: str = "doom",
    device: str = "cpu",
    threads: int = 2,
    out: Annotated[Path, typer.Option()] = Path("out/streaming"),
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True)) as progress:
        runs = {
            policy: measure(
                policy, frames, dense_seconds if policy == "dense" else 1e9, world, device, threads, progress
            )
            for policy in POLICIES
        }
    marks = [mark for mark in MARKS if mark <= frames]
    lines = ["| frame | FAST-AR FPS | window FPS | dense FPS | FAST-AR / dense |", "|---|---|---|---|---|"]
    table = []
    for mark in marks:
        row = {policy: fps_at(rows, mark) for policy, rows in runs.items()}
        ratio = row["fastar"] / row["dense"] if row["fastar"] and row["dense"] else None
        table.append({"frame": mark, **row, "ratio": ratio})
        cells = [f"{value:.2f}" if value else "not reached" for value in (*row.values(), ratio)]
        lines.append(f"| {mark} | " + " | ".join(cells) + " |")
    flat = {policy: flatness(runs[policy]) for policy in ("fastar", "window")}
    machine = {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count(), "threads": threads,
               "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    lines += ["", "| | last / first steady decile FPS | relative to reference work | memory growth, cache full |",
              "|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {name} | {f['last_over_first_decile_fps']:.3f} | {f['same_relative_to_reference']:.3f} "
        f"| {f['memory_growth']:+.1%} |"
        for name, f in flat.items()
    ]
    lines += ["", f"density at the last frame: {runs['fastar'][-1]['density']:.2%}; machine: {machine}"]
    (out / "streaming.md").write_text("\n".join(lines) + "\n")
    report = {"machine": machine, "table": table, "flatness": flat, "runs": runs}
    (out / "streaming.json").write_text(json.dumps(report) + "\n")
    plot(runs, out / "streaming.png", dense_seconds)
    print("\n".join(lines))


if __name__ == "__main__":
    app() if sys.argv[1:2] == ["worker"] else app(["run", *sys.argv[1:]])
