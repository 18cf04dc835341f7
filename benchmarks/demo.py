"""`make demo`: a live world streamed from a real Triton server, FAST-AR beside dense attention.

Starts the server, streams FRAMES frames with FAST-AR through gRPC (the prompt and the actions change on the way),
then the same stream with dense attention until a time limit, and writes video.mp4, contact.png, fps_and_memory.png,
report.md."""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import psutil
import typer
from fastar_client import FastarError, connect_blocking
from fastar_client.timing import ArrivalLog
from fastar_client.video import Mp4Writer, Sampler, contact_sheet, write_bytes, write_json
from rich.console import Console
from rich.progress import Progress, TextColumn

from fastar_backend.config import AttentionConfig
from fastar_backend.errors import FastarError as BackendError
from fastar_backend.serve import Server, ServeSettings

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

say = Console(highlight=False).print
SCRIPT = (
    ("forward",) * 5 + ("turn_left",) * 9 + ("forward",) * 4 + ("turn_right",) * 6 + ("left",) * 4 + ("attack",) * 2
    + ("turn_left",) * 7
)  # fmt: skip
SCENES = ("my_way_home", "health_gathering", "defend_the_center", "take_cover", "deadly_corridor", "basic")


def stream(
    connection, scenarios: dict[str, str], frames: int, seconds: float, name: str, video: Path | None, attention
):
    """Streams up to `frames` frames or `seconds`; returns the arrival log, a sampler of frames and stats per chunk."""
    sampler, stats = Sampler(12), []
    scene_frames = max(frames // len(SCENES), 1)
    writer = Mp4Writer(video, fps=24) if video else None
    progress = Progress(
        *Progress.get_default_columns()[:2], TextColumn("{task.fields[status]}"), console=Console(stderr=True)
    )
    live = connection.stream(
        scenarios[SCENES[0]], frames=frames, seed=7, start=SCENES[0], attention=attention,
        actions=(SCRIPT[i % len(SCRIPT)] for i in range(10**9)),
    )  # fmt: skip
    began, scene = time.monotonic(), 0
    log = ArrivalLog(began)
    try:
        with progress, live:
            task = progress.add_task(name, total=frames, status="")
            for chunk in live:
                log.add(chunk)
                first = chunk.stats.first_frame
                stats.append(chunk.stats)
                sampler.add(first, chunk.frames)
                if writer:
                    writer.write(chunk.frames)
                fps = log.recent_fps() or 0.0
                memory = chunk.stats.process_bytes / 2**20
                progress.update(
                    task, completed=first + len(chunk.frames),
                    status=f"{fps:5.1f} FPS, cache {chunk.stats.cache_tokens:6.0f} tokens, density "
                    f"{chunk.stats.density:6.1%}, server {memory:5.0f} MiB",
                )  # fmt: skip
                if (first + len(chunk.frames)) // scene_frames > scene and scene + 1 < len(SCENES):
                    scene += 1
                    live.prompt(scenarios[SCENES[scene]])
                if time.monotonic() - began > seconds:
                    break
    finally:
        if writer:
            writer.close()
    return log, sampler, stats


def smooth_fps(log: ArrivalLog, half: int = 4) -> tuple[np.ndarray, np.ndarray]:
    received = np.array([a.received for a in log.arrivals])
    frames = np.cumsum([a.frames for a in log.arrivals])
    low = np.maximum(np.arange(len(frames)) - half, 0)
    high = np.minimum(np.arange(len(frames)) + half, len(frames) - 1)
    return frames, (frames[high] - frames[low]) / np.maximum(received[high] - received[low], 1e-9)


def plot(runs: dict, path: Path, limit: float) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, (log, _, stats) in runs.items():
        frames, fps = smooth_fps(log)
        left.plot(frames[2:], fps[2:], label=name)
        right.plot(frames, [s.cache_bytes / 2**20 for s in stats], label=f"{name}: KV cache")
    left.set(xlabel="frame", ylabel="frames per second at the client", title="speed", ylim=(0, None))
    right.set(xlabel="frame", ylabel="MiB", title="memory of the stream", ylim=(0, None))
    frames, fps = smooth_fps(runs["dense"][0])
    left.annotate(f"dense: stopped at frame {frames[-1]}\nafter {limit:.0f} s", (frames[-1], fps[-1]), (0.35, 0.5),
                  textcoords="axes fraction", arrowprops={"arrowstyle": "->"}, fontsize=9)  # fmt: skip
    for axis in (left, right):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def report(runs: dict, frames: int, limit: float) -> str:
    fast, dense = runs["FAST-AR"], runs["dense"]
    rows = ["| frame | FAST-AR FPS | dense FPS | ratio |", "|---|---|---|---|"]
    fast_frames, fast_fps = smooth_fps(fast[0])
    dense_frames, dense_fps = smooth_fps(dense[0])
    last = int(dense_frames[-1])
    for mark in sorted({*(m for m in (48, 120, 240, 480, 720, 1440, 2880) if m <= min(frames, last)), last}):
        a = fast_fps[np.argmin(abs(fast_frames - mark))]
        b = dense_fps[np.argmin(abs(dense_frames - mark))]
        rows.append(f"| {mark} | {a:.1f} | {b:.1f} | {a / b:.1f}x |")
    metrics = fast[0].metrics()
    steady = [s.process_bytes for s in fast[2][len(fast[2]) // 4 :]]
    return "\n".join(
        [
            "# A live world from Triton",
            "",
            f"{metrics['frames']} frames with FAST-AR, {dense[0].metrics()['frames']} with dense attention (stopped at "
            f"{limit:.0f} s); same seed, prompts and actions; {platform.machine()}, {psutil.cpu_count()} cores, Python "
            f"{platform.python_version()}.",
            "",
            f"- first frame at the client: {metrics['time_to_first_frame_seconds']:.2f} s",
            f"- steady speed: {metrics['steady_fps']:.1f} FPS",
            f"- last tenth of the run against its first steady tenth: "
            f"{metrics.get('last_over_first_decile') or float('nan'):.2f} (chunk interval, 1 = flat)",
            f"- memory of the model process over the last three quarters: {min(steady) / 2**20:.0f} to "
            f"{max(steady) / 2**20:.0f} MiB",
            f"- executed attention at the last frame: {fast[2][-1].density:.1%} of dense",
            "",
            *rows,
            "",
            "![frames](contact.png)",
            "![speed and memory](fps_and_memory.png)",
            "",
        ]
    )


def main(
    frames: Annotated[int, typer.Option(min=8, help="Video frames with FAST-AR (2880: two minutes at 24 FPS).")] = 1440,
    dense_seconds: Annotated[float, typer.Option(min=1, help="Time limit of the dense stream.")] = 75.0,
    out: Annotated[Path, typer.Option(help="Where the files go.")] = Path("out"),
    attention: Annotated[str, typer.Option(help="JSON of AttentionConfig for the FAST-AR stream.")] = "{}",
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.WARNING)
    say("[bold]1/4[/] starting NVIDIA Triton Inference Server with model_repository/ ...")
    settings = ServeSettings(http_port=0, grpc_port=0, metrics_port=0, attention=AttentionConfig(), max_streams=4)
    with Server(settings) as server, connect_blocking(server.grpc_url) as connection:
        world = connection.world()
        buttons = ", ".join(world.buttons)
        say(f"      ready at {server.grpc_url}: world {world.name}, {world.width}x{world.height}, buttons {buttons}")
        say(f"[bold]2/4[/] FAST-AR: {frames} frames; the prompt changes every {max(frames // len(SCENES), 1)} frames")
        scenarios = dict(world.scenarios)
        runs = {
            "FAST-AR": stream(connection, scenarios, frames, 1e9, "FAST-AR", out / "video.mp4", json.loads(attention))
        }
        say(f"[bold]3/4[/] dense attention, the same stream, for at most {dense_seconds:.0f} s")
        runs["dense"] = stream(connection, scenarios, frames, dense_seconds, "dense", None, {"kind": "dense"})
    say("[bold]4/4[/] writing")
    write_bytes(out / "contact.png", contact_sheet(runs["FAST-AR"][1].frames))
    plot(runs, out / "fps_and_memory.png", dense_seconds)
    text = report(runs, frames, dense_seconds)
    (out / "report.md").write_text(text)
    write_json(out / "timings.json", {name: run[0].as_json() for name, run in runs.items()})
    say(text, markup=False)
    say(f"[bold green]Look at[/] {out}/video.mp4, {out}/contact.png, {out}/fps_and_memory.png, {out}/report.md")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (FastarError, BackendError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)
