"""What benchmarks/wan.py measured, as Markdown and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FRAMES = 12  # of a chunk, but for the first, which has 9


def markdown(result: dict[str, Any]) -> str:
    lines = [f"{result['device']}, torch {result['torch']}, {result['settings']}", ""]
    if runs := result.get("rollouts"):
        lines += [
            "| | steady FPS | last tenth | whole run | last / first tenth | peak GiB, first -> last | stopped by |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, run in runs.items():
            if "fps" in run:
                lines.append(
                    f"| {name} | {run['fps']:.1f} | {run['fps_last']:.1f} | {run['fps_whole']:.1f} | "
                    f"{run['flat']:.3f} | {run['peak_gib'][8]:.1f} -> {run['peak_gib'][-1]:.1f} | "
                    f"{run['stopped_by']} at {run['frames'][-1]} |"
                )
    if rows := result.get("against_dense"):
        lines += ["", "| frame | dense FPS | FAST-AR is as fast, here | over all frames so far |", "|---|---|---|---|"]
        lines += [
            f"| {r['frame']} | {r['dense_fps']:.2f} | {r['faster_here']:.1f}x | {r['faster_so_far']:.1f}x |"
            for r in rows
        ]
        lines.append("")
    if rows := result.get("by_setting"):
        lines += ["| setting | ms a chunk | FPS | peak GiB |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {r['ms']:.0f} | {1000 * FRAMES / r['ms']:.1f} | {r['peak_gib']:.1f} |"
            for name, r in rows.items()
        ]
        lines.append("")
    for row in result.get("streams", ()):
        lines.append(
            f"{row['policy']}: {row['streams']} streams, {row['fps_each']:.1f} FPS each, {row['peak_gib']:.1f} GiB"
        )
    if row := result.get("guard"):
        lines.append(
            f"quality guard: {row['off_ms']:.1f} ms a chunk without, {row['on_ms']:.1f} with it; of neighbouring "
            f"chunks' ratios the median {row['ratio_of_pairs']:.4f}"
        )
    if parts := result.get("table"):
        lines += ["", f"A chunk takes {parts['chunk_ms']:.0f} ms, kernels run for {parts['kernels_ms']:.0f} ms.", ""]
        lines += ["| kernels | ms |", "|---|---|"]
        lines += [f"| {name} | {value:.1f} |" for name, value in parts["parts_ms"].items()]
        lines += [f"| at the floor: {name} | {value:.0f} |" for name, value in parts["floors_ms"].items()]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, run in result["rollouts"].items():
        frames, seconds = np.array(run["frames"][1:]), np.array(run["seconds"][1:])
        smooth = np.array([np.median(seconds[max(0, i - 2) : i + 3]) for i in range(len(seconds))])
        (line,) = left.plot(frames, FRAMES / smooth, label=name)
        if rows := [row for row in result.get("lengths", {}).get(name, ()) if name == "dense"]:
            at, colour = [4 * row["latent_frames"] for row in rows], line.get_color()
            left.plot(
                at, [1000 * FRAMES / row["ms"] for row in rows], ":o", ms=3, color=colour, label="dense, caches filled"
            )
            right.plot(at, [row["peak_gib"] for row in rows], ":o", ms=3, color=colour)
        right.plot(frames, run["peak_gib"][1:], label=name)
        if run["stopped_by"] == "memory":
            right.annotate("out of memory", (frames[-1], run["peak_gib"][-1]), ha="left", va="top")
    left.set(xlabel="frame", ylabel="frames per second", ylim=(0, None), title="speed, frames in host memory")
    right.set(xlabel="frame", ylabel="GiB", ylim=(0, None), title="peak GPU memory of each chunk")
    left.legend(loc="upper right", bbox_to_anchor=(1, 0.8))
    figure.savefig(path, dpi=110)
