"""One picture of a simulated day: pods, waiting viewers, moved streams."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from k8s.simulate.fleet import TICK, Demand, Run

COLOURS = ("#1b6ca8", "#d1495b")


def draw(runs: dict[str, Run], demand: Demand, title: str, path: Path) -> None:
    """runs: by the name of the placement; the first one's pods are drawn. Writes a PNG."""
    first = next(iter(runs.values()))
    figure, (pods, waiting, moved) = plt.subplots(
        3, 1, figsize=(11, 9), sharex=True, height_ratios=(2, 1, 1), constrained_layout=True
    )
    figure.suptitle(title)
    hours = first.at / 3600
    pods.fill_between(hours, first.active / first.slots, color="#dddddd", label="live streams / streams a pod")
    pods.plot(hours, first.asked, color=COLOURS[0], label="pods asked for")
    pods.plot(hours, first.ready, color="#222222", linewidth=0.8, label="pods ready")
    pods.set_ylabel("pods")
    pods.legend(loc="upper left")
    for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
        waiting.plot(
            run.at / 3600, run.waiting, color=colour, linewidth=0.8, label=name, zorder=2 + list(runs).index(name)
        )
        per_hour = np.add.reduceat(run.moved, np.arange(0, len(run.moved), int(3600 / TICK)))
        moved.step(
            np.arange(len(per_hour) + 1),
            [*per_hour, per_hour[-1]],
            where="post",
            color=colour,
            label=f"{name}: {run.moved.sum():.0f} in all",
        )
    waiting.set_ylabel("viewers that wait")
    moved.set_ylabel("streams moved an hour")
    moved.set_xlabel("hour of the day")
    moved.set_xlim(0, demand.seconds / 3600)
    moved.set_xticks(range(0, int(demand.seconds / 3600) + 1, 2))
    for axes in (pods, waiting, moved):
        axes.axvspan(
            demand.crowd_at / 3600,
            (demand.crowd_at + demand.crowd_seconds) / 3600,
            color="#f4d35e",
            alpha=0.4,
            linewidth=0,
        )
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (waiting, moved):
        axes.legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
