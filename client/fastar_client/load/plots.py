"""The pictures of a load test: who was there, their frame rates, chunk latencies, and who waited when."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from fastar_client.errors import invalid
from fastar_client.load.measure import StreamFigures, percentile
from fastar_client.load.record import DISCONNECTED, LOST, StreamRecord
from fastar_client.load.scenario import Scenario

WINDOW = 4  # chunks over which a stream's frame rate is drawn
INK, BLUE, RED, AMBER, GREY = "#1d2430", "#2f6fb2", "#c2372e", "#e0a526", "#b9c0ca"


def check() -> None:
    """Raises InvalidArgument where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise invalid(
            "plots", True, "--no-plots, or `pip install 'fastar-client[load]'`, which has matplotlib"
        ) from None


def draw(records: list[StreamRecord], each: list[StreamFigures], scenario: Scenario) -> bytes:
    """A PNG. each: the figures of `records`, in the same order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    (at_once, rates), (latency, waits) = figure.subplots(2, 2)
    end = max([scenario.seconds if not records else 0.0, *(record.ended for record in records)])
    draw_streams(at_once, records)
    draw_rates(rates, records, each, scenario)
    draw_latency(latency, records, each, scenario)
    draw_waits(waits, records, each)
    for axes in (at_once, rates, waits):
        axes.set_xlim(0, 1.01 * end)
        axes.set_xlabel("seconds since the test began")
    for axes in (at_once, rates, latency, waits):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.title.set(color=INK, fontweight="bold", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def draw_streams(axes: Any, records: list[StreamRecord]) -> None:
    due = [(record.planned.at, min(record.planned.leaves, record.ended)) for record in records]
    seen = [(record.chunks[0].received, record.ended) for record in records if record.chunks]
    for spans, color, label in ((due, GREY, "due to be there"), (seen, BLUE, "with a picture")):
        times, counts = steps(spans)
        axes.step(times, counts, where="post", color=color, linewidth=1.8, label=label)
    lost = [record.ended for record in records if record.outcome in LOST]
    if lost:
        axes.plot(lost, [0] * len(lost), "x", color=RED, clip_on=False, label=f"lost ({len(lost)})")
    axes.set(title="streams at once", ylabel="streams", ylim=(0, 1.3 * max([1, *counts])))  # room for the legend
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper left", framealpha=0.9)


def steps(spans: list[tuple[float, float]]) -> tuple[list[float], list[int]]:
    """How many of `spans` (begin, end) are open, as of each moment when that changes."""
    changes = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    return [at for at, _ in changes], np.cumsum([change for _, change in changes]).tolist()


def draw_rates(axes: Any, records: list[StreamRecord], each: list[StreamFigures], scenario: Scenario) -> None:
    faint = max(0.15, min(0.9, 12 / max(len(records), 1)))
    below = scenario.slo.p5_fps_share or 0.0
    for record, own in zip(records, each, strict=True):
        times, rate = rate_over_time(record)
        slow = own.fps is not None and own.fps < below * scenario.fps
        color = GREY if not own.judged else RED if slow else BLUE
        axes.plot(times, rate, color=color, alpha=faint, linewidth=1.2)
    axes.axhline(scenario.fps, color=INK, linestyle="--", linewidth=1)
    styles = [(BLUE, "stream"), (RED, "stream below target"), (GREY, "slow reader")]
    used = {line.get_color() for line in axes.lines}
    for color, label in styles:
        if color in used:
            axes.plot([], [], color=color, label=label)
    axes.plot([], [], color=INK, linestyle="--", linewidth=1, label=f"{scenario.fps:g} FPS")
    axes.set(title=f"frame rate of each stream, over {WINDOW} chunks", ylabel="frames per second", ylim=(0, None))
    if scenario.paced:  # the first chunks come as fast as they can
        axes.set_ylim(0, 1.6 * scenario.fps)
    axes.legend(loc="lower right", framealpha=0.9)


def rate_over_time(record: StreamRecord) -> tuple[np.ndarray, np.ndarray]:
    """Times [n] and frames per second [n] over the last WINDOW chunks, from the stream's second chunk on."""
    received = np.array([chunk.received for chunk in record.chunks])
    frames = np.cumsum([chunk.frames for chunk in record.chunks])
    last = np.arange(1, len(received))
    first = np.maximum(last - WINDOW, 0)
    if not len(last):
        return np.array([]), np.array([])
    return received[last], (frames[last] - frames[first]) / np.maximum(received[last] - received[first], 1e-6)


def draw_latency(axes: Any, records: list[StreamRecord], each: list[StreamFigures], scenario: Scenario) -> None:
    judged = [own for own in each if own.judged]
    curves = [("from request to last byte", BLUE, [value for own in judged for value in own.requests])]
    curves.append(("between chunks, steady", AMBER, [value for own in judged for value in own.intervals]))
    for label, color, values in curves:
        if values:
            ordered = sorted(values)
            p95 = percentile(ordered, 95)
            share = np.arange(1, len(ordered) + 1) / len(ordered)
            axes.plot(np.array(ordered) * 1000, share, color=color, label=f"{label} (p95 {1000 * p95:.0f} ms)")
    frames = max((chunk.frames for record in records for chunk in record.chunks), default=0)
    if frames:
        period = 1000 * frames / scenario.fps
        axes.axvline(period, color=INK, linestyle="--", linewidth=1, label=f"{frames} frames at {scenario.fps:g} FPS")
    for level in (0.5, 0.95):
        axes.axhline(level, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(title="chunk latency", xlabel="milliseconds", ylabel="share of chunks", ylim=(0, 1.02), xlim=(0, None))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def draw_waits(axes: Any, records: list[StreamRecord], each: list[StreamFigures]) -> None:
    """A bar for each stream: waiting for its first chunk, playing, stalled."""
    used: dict[str, str] = {}
    shortest = max((record.ended for record in records), default=0.0) / 1000  # that can be seen

    def bars(color: str, label: str, row: int, spans: list[tuple[float, float]]) -> None:
        if spans:
            used[label] = color
            axes.broken_barh([(begin, max(length, shortest)) for begin, length in spans], (row - 0.4, 0.8), color=color)

    for row, (record, own) in enumerate(zip(records, each, strict=True)):
        begin = record.first
        waited = record.ended if begin is None else begin
        bars(AMBER, "no picture yet", row, [(record.planned.at, waited - record.planned.at)])
        if begin is not None:
            slow = record.planned.slow_factor is not None
            color, label = (GREY, "slow reader") if slow else ("#a9c9ea", "playing")
            bars(color, label, row, [(begin, record.ended - begin)])
        if own.judged and own.ttfc is not None:
            bars(RED, "stalled", row, [(stall.at, stall.seconds) for stall in own.stalls])
        mark = "x" if record.outcome in LOST else "|" if record.outcome == DISCONNECTED else None
        if mark is not None:
            axes.plot([record.ended], [row], mark, color=INK, markersize=6)
            used["lost" if mark == "x" else "disconnected"] = mark
    for label, color in used.items():
        if color in ("x", "|"):
            axes.plot([], [], color, color=INK, label=label)
        else:
            axes.plot([], [], color=color, linewidth=6, label=label)
    axes.set(title="what each viewer saw", ylabel="stream", ylim=(max(len(records), 1) - 0.4, -0.6))
    axes.yaxis.get_major_locator().set_params(integer=True)
    if used:
        axes.legend(loc="best", framealpha=0.9)
