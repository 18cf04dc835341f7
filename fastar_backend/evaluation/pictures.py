"""The report's plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastar_backend.evaluation.metrics import BEST, decibels
from fastar_backend.evaluation.tables import Results

Rows = dict[str, dict[str, Any]]
# What is told apart by colour; the rest is grey with its name beside it.
COLOURS = {"dense": "black", "window": "#7f7f7f", "tempcache-quant": "#d62728", "fastar-quant": "#ff7f0e",
           "fastar default": "#d62728", "paper-recipe": "#8c564b", "flowcache": "#1f77b4", "radial": "#2ca02c",
           "svg1": "#9467bd", "svg2": "#e377c2", "teacache": "#17becf", "flowcache+radial": "#bcbd22"}  # fmt: skip
SMOOTH = 3  # chunks


def draw(rows: Rows, results: Results, folder: Path) -> list[tuple[str, str]]:
    """Writes those that the results allow; returns names and captions."""
    import matplotlib

    matplotlib.use("Agg")
    made = [picture(rows, results, folder) for picture in (_speed, _recall, _fidelity, _drift)]
    return [picture for picture in made if picture]


def _figure(columns: int, width: float = 5.6, height: float = 4.2):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(columns * width, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure, path: Path) -> str:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path.name


def _style(name: str) -> dict[str, Any]:
    heavy = name in ("dense", "window", "tempcache-quant", "fastar-quant", "fastar default")
    return {"color": COLOURS.get(name, "#c7c7c7"), "linewidth": 2.2 if heavy else 1.2, "zorder": 3 if heavy else 2}


def _speed(rows: Rows, results: Results, folder: Path) -> tuple[str, str] | None:
    timed = {name: row["speed"]["rows"] for name, row in rows.items() if row["speed"]}
    if not timed:
        return None
    figure, (left, right) = _figure(2)
    for name, points in timed.items():
        frames = [point["frame"] for point in points]
        known = name in COLOURS
        label = name if known else None
        left.plot(frames, [point["fps"] for point in points], marker=".", label=label, **_style(name))
        right.plot(frames, [point["peak_bytes"] / 1e6 for point in points], marker=".", label=label, **_style(name))
    if others := [name for name in timed if name not in COLOURS]:
        left.plot([], [], color="#c7c7c7", label=f"{len(others)} others")
    ticks = [point["frame"] for point in max(timed.values(), key=len)]
    for axis, what in ((left, "frames per second"), (right, "peak memory of the process (MB)")):
        axis.set(xscale="log", yscale="log", xlabel="frames of history", ylabel=what)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        low, high = axis.get_ylim()
        nice = [t for e in range(-4, 6) for t in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if low <= t <= high]
        axis.set_yticks(nice, [f"{tick:g}" for tick in nice])
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return _save(figure, folder / "speed.png"), "Speed and memory by length of the history."


def _recall(rows: Rows, results: Results, folder: Path) -> tuple[str, str] | None:
    points = {
        n: (100 * r["density"].mean, 100 * r["recall"].mean) for n, r in rows.items() if r["recall"] and r["density"]
    }
    if len(points) < 2:
        return None
    figure, (axis,) = _figure(1, 9.0, 5.2)
    for name, (x, y) in points.items():
        axis.scatter(x, y, s=46, color=COLOURS.get(name, "#5b7ea8"), zorder=3, edgecolor="white", linewidth=0.6)
    axis.set(xlabel="density: query-key pairs executed (%)", ylabel="recall: attention mass kept (%)", xscale="log")
    low, high = min(x for x, _ in points.values()), max(x for x, _ in points.values())
    ticks = [tick for tick in (2, 5, 10, 15, 20, 30, 40, 50, 70, 100) if low / 1.3 <= tick <= high * 1.3]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(low / 1.25, high * 1.7)
    _name_points(axis, points)
    return _save(figure, folder / "recall_density.png"), "Recall against density, mean over layers and passes."


def _name_points(axis, points: dict[str, tuple[float, float]]) -> None:
    """Each name to the right of its point, moved down or up until it covers no other name."""
    axis.figure.canvas.draw()
    taken: list[tuple[float, float, float]] = []  # left, right, height of names, in pixels
    place = axis.transData.transform
    for name, point in sorted(points.items(), key=lambda item: -item[1][1]):
        x, y = place(point)
        width, step, offset = 6.2 * len(name) + 14, 11.0, 0.0
        tried = [0.0, *(sign * k * step for k in range(1, 30) for sign in (-1, 1))]
        for offset in tried:
            clear = all(x + width < a or x > b or abs(y + offset - c) >= step for a, b, c in taken)
            if clear:
                break
        taken.append((x, x + width, y + offset))
        line = {"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6} if abs(offset) > step else None
        axis.annotate(
            name, point, (7, offset * 72 / axis.figure.dpi), textcoords="offset points", fontsize=7.5, va="center",
            color=COLOURS.get(name, "#444444"), arrowprops=line,
        )  # fmt: skip


def _fidelity(rows: Rows, results: Results, folder: Path) -> tuple[str, str] | None:
    """PSNR by frame: mean squared error over rollouts and a few chunks."""
    if not results.has("rollout"):
        return None
    figure, axes = _figure(2)
    drawn = False
    for axis, field, what in zip(axes, ("dense", "truth"), ("the dense rollout", "the game"), strict=True):
        for name in rows:
            units = [u["result"] for u in results.of("rollout", name) if field in u["result"]]
            if not units:
                continue
            length, size = min(len(u[field]["squared_error"]) for u in units), units[0]["chunk_frames"]
            errors = np.mean([u[field]["squared_error"][:length] for u in units], 0)
            chunks = [decibels(errors[max(0, i - SMOOTH * size) : i]) for i in range(size, length + 1, size)]
            frames, values = np.arange(size, length + 1, size), np.array(chunks)
            same = values < BEST - 1  # as long as nothing differs there is nothing to draw
            label = name if name in COLOURS else None
            axis.plot(frames[same], values[same], label=label, **_style(name))
            drawn = True
        axis.set(xlabel="frame of the rollout", ylabel=f"PSNR against {what} (dB)")
    if not drawn:
        return None
    if others := [name for name in rows if name not in COLOURS]:
        axes[0].plot([], [], color="#c7c7c7", label=f"{len(others)} others")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)
    return _save(figure, folder / "fidelity.png"), "Free rollouts against dense attention's and against the game."


def _drift(rows: Rows, results: Results, folder: Path) -> tuple[str, str] | None:
    names = [name for name in rows if results.of("drift", name) and rows[name]["drift"]["sharpness"]]
    if not names:
        return None
    figure, axes = _figure(3, 3.8, 3.2)
    frames = max(rows[name]["drift"]["frames"] for name in names)
    middle = (np.arange(10) + 0.5) * frames / 10
    for axis, look in zip(axes, ("sharpness", "brightness", "contrast"), strict=True):
        for name in names:
            axis.plot(middle, rows[name]["drift"][look], marker=".", label=name, **_style(name))
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="frame", title=look, ylim=(0, None))
    axes[0].set_ylabel("over the mean of the game's")
    axes[-1].legend(frameon=False, fontsize=8)
    return _save(figure, folder / "drift.png"), "Looks of a long rollout, by tenths of the run."
