"""A test's report: report.json (all figures, and the raw times they are made of), report.html, report.png."""

from __future__ import annotations

import base64
import dataclasses
import html
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastar_client.load import plots
from fastar_client.load.measure import StreamFigures, Totals, figures, over, totals
from fastar_client.load.run import Probe
from fastar_client.load.scenario import Scenario
from fastar_client.load.slo import Target, verdict
from fastar_client.load.workers import Outcome
from fastar_client.video import write_bytes, write_json

VERSION = 1
LATE_SECONDS = 0.05  # p99 of the load generator's own lateness above which the report warns
SAMPLES = ("intervals", "requests", "jitter", "rtf", "controls", "control_periods")  # the JSON has their spreads


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a test has found. about: url, seed, processes, started."""

    about: Mapping[str, Any]
    scenario: Scenario
    probe: Probe
    outcome: Outcome
    each: list[StreamFigures]
    totals: Totals
    targets: list[Target]

    @property
    def missed(self) -> list[str]:
        """One line for each target that was missed, and each load process that died."""
        return [f"SLO missed: {target}" for target in self.targets if not target.met] + self.outcome.died

    @property
    def warnings(self) -> list[str]:
        """What makes the figures less than they seem."""
        found = [f"{line}: its running streams are in no figure" for line in self.outcome.died]
        for spread, what in ((self.totals.lateness, "streams began"), (self.totals.lag, "an event loop was")):
            if spread is not None and spread["p99"] > LATE_SECONDS:
                late = f"{what} {spread['p99']:.2f} s late (p99)"
                found.append(f"the load generator was too slow: {late}; more --processes, or another machine")
        if self.outcome.interrupted:
            found.append("the test was interrupted: what follows is of the streams that ran")
        if self.totals.controls_refused:
            found.append(f"{self.totals.controls_refused} controls were refused by the server")
        return found

    def as_json(self) -> dict[str, Any]:
        streams = []
        for record, own in zip(self.outcome.records, self.each, strict=True):
            values = {key: over(value) if key in SAMPLES else value for key, value in dataclasses.asdict(own).items()}
            streams.append({"figures": values, **record.as_json()})
        machine = {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()}
        return finite(
            {
                "version": VERSION,
                **self.about,
                "client": machine,
                "world": dataclasses.asdict(self.probe.world),
                "cold_ttfc_seconds": self.probe.cold_ttfc_seconds,
                "scenario": self.scenario.as_json(),
                "interrupted": self.outcome.interrupted,
                "warnings": self.warnings,
                "met": not self.missed,
                "slo": [{**dataclasses.asdict(target), "text": str(target)} for target in self.targets],
                "totals": dataclasses.asdict(self.totals),
                "streams": streams,
            }
        )

    def write(self, out: Path, plot: bool = True) -> None:
        """Raises OutputError. plot: also report.png, and in report.html; needs matplotlib."""
        write_json(out / "report.json", self.as_json())
        picture = None
        if plot:
            picture = plots.draw(self.outcome.records, self.each, self.scenario)
            write_bytes(out / "report.png", picture)
        write_bytes(out / "report.html", page(self, picture).encode())


def judge(about: Mapping[str, Any], scenario: Scenario, probe: Probe, outcome: Outcome, planned: int) -> Report:
    """planned: how many streams were to be."""
    each = [figures(record, scenario) for record in outcome.records]
    found = totals(outcome.records, each, planned, outcome.lags)
    return Report(about, scenario, probe, outcome, each, found, verdict(found, scenario))


def finite(value: Any) -> Any:
    """For JSON: what is infinite (never) becomes null."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The rows of the table of figures: of `Totals`, what it is called, factor, unit.
SPREADS = (
    ("fps", "stream FPS, steady", 1, ""),
    ("ttfc", "arrival to first chunk", 1, "s"),
    ("ttff", "arrival to first decoded frame", 1, "s"),
    ("continuous_play", "continuous play, prebuffer 1", 100, "%"),
    ("continuous_play_2", "continuous play, prebuffer 2", 100, "%"),
    ("rebuffer_by_stream", "rebuffer ratio, by stream", 100, "%"),
    ("interval", "chunk interval", 1000, "ms"),
    ("request", "chunk request to last byte", 1000, "ms"),
    ("jitter", "jitter", 1000, "ms"),
    ("rtf", "real-time factor", 1, ""),
    ("control", "control to first chunk that obeys", 1000, "ms"),
    ("control_periods", "the same, in chunk periods", 1, ""),
    ("slow_down", "last decile of chunk times / first", 1, ""),
    ("slope_per_minute", "slope of the chunk time, per minute", 1000, "ms"),
    ("lateness", "load generator: lateness of arrivals", 1000, "ms"),
    ("lag", "load generator: lag of its event loops", 1000, "ms"),
)
COLUMNS = ("p5", "min", "p50", "mean", "p95", "p99", "max")
STREAM_COLUMNS = (
    ("arrived", "s"),
    ("ended", "s"),
    ("outcome", ""),
    ("first chunk", "s"),
    ("FPS", ""),
    ("cont. play", "%"),
    ("stalls", ""),
    ("stalled", "s"),
    ("interval p95", "ms"),
    ("control p95", "periods"),
    ("reconnects", ""),
    ("note", ""),
)
MARKS = {"kept": "met", "MISSED": "missed", "not measured": ""}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; max-width: 1180px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p.about { color: #5b6574; margin-top: 0 } img { width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e4e7ec; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal } th { color: #5b6574; font-weight: 600 }
.verdict { display: inline-block; padding: .2rem .8rem; border-radius: .4rem; font-weight: 700; color: #fff }
.met { background: #1a7f4b } .missed { background: #c2372e } td.met, td.missed { background: none; font-weight: 600 }
td.met { color: #1a7f4b } td.missed { color: #c2372e } .warning { border-left: 4px solid #d98e04; padding-left: .8rem }
.scroll { overflow-x: auto } .scroll th { white-space: normal; vertical-align: bottom }
"""


def page(report: Report, picture: bytes | None) -> str:
    """HTML with everything in it. picture: PNG."""
    sums, scenario = report.totals, report.scenario
    mode = f"paced at {scenario.fps:g} FPS" if scenario.paced else f"saturating; viewers need {scenario.fps:g} FPS"
    about = f"{report.about['url']}, world {report.probe.world.name}, {mode}, {report.about['started']}"
    met, word = ("met", "SLO met") if not report.missed else ("missed", "SLO missed")
    outcomes = ", ".join(f"{count} {name}" for name, count in sums.outcomes.items()) or "none"
    parts = [f"<h1>Load test: {sums.planned} streams</h1><p class=about>{escape(about)}</p>"]
    parts.append(f'<p><span class="verdict {met}">{word}</span></p>')
    parts += [f"<p class=warning>{escape(line)}</p>" for line in report.warnings]
    rows = [[target.name, target_text(target), target.mark] for target in report.targets]
    parts.append(table(["target", "found", ""], rows, marked=True))
    summary = [
        f"{outcomes}; {sums.not_run} did not run. {sums.delivered_fps:.1f} frames per second to all of them.",
        f"{sums.stalls} stalls, the longest {sums.longest_stall:.2f} s. {sums.reconnects} streams taken up again.",
        f"Cold first chunk (before the test): {report.probe.cold_ttfc_seconds:.2f} s.",
    ]
    if sums.too_short:
        summary.append(f"{sums.too_short} streams were too short for a frame rate.")
    if sums.late_reasons:
        reasons = ", ".join(f"{name}: {count}" for name, count in sums.late_reasons.items())
        summary.append(f"Late chunks by the server's own account: {reasons}.")
    parts.append(f"<p>{escape(' '.join(summary))}</p>")
    if picture is not None:
        encoded = base64.b64encode(picture).decode()
        parts.append(f'<img alt="streams, frame rates, latencies and stalls" src="data:image/png;base64,{encoded}">')
    if sums.errors:
        parts.append("<h2>Errors</h2>" + table(["error", "streams"], [[k, str(v)] for k, v in sums.errors.items()]))
    rows = []
    for name, called, factor, unit in SPREADS:
        spread = getattr(sums, name)
        if spread is not None:
            rows.append([called + (f" ({unit})" if unit else ""), *(number(spread[c], factor) for c in COLUMNS)])
    parts.append("<h2>Figures</h2>" + table(["", *COLUMNS], rows))
    heads = ["stream", *(f"{name} ({unit})" if unit else name for name, unit in STREAM_COLUMNS)]
    rows = [stream_row(report, index) for index in range(len(report.each))]
    parts.append(f"<h2>Streams</h2><div class=scroll>{table(heads, rows)}</div>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>Load test</title><style>{STYLE}</style>"
    return head + "\n".join(parts) + "</html>\n"


def stream_row(report: Report, index: int) -> list[str]:
    record, own = report.outcome.records[index], report.each[index]
    intervals, controls = sorted(own.intervals), sorted(own.control_periods)
    note = record.error or ("slow reader" if record.planned.slow_factor is not None else "")
    return [
        str(own.number),
        f"{record.planned.at:.1f}",
        f"{record.ended:.1f}",
        own.outcome,
        number(own.ttfc, 1),
        number(own.fps, 1),
        number(own.continuous_play, 100),
        str(len(own.stalls)) if report.scenario.paced else "–",
        number(own.stalled, 1),
        number(plots.percentile(intervals, 95) if intervals else None, 1000),
        number(plots.percentile(controls, 95) if controls else None, 1),
        str(own.reconnects),
        note,
    ]


def target_text(target: Target) -> str:
    return str(target).partition(": ")[2]


def table(heads: list[str], rows: list[list[str]], marked: bool = False) -> str:
    """marked: the last column says whether a target was kept."""
    lines = ["<table><tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    for row in rows:
        kinds = [""] * len(row)
        if marked:
            kinds[-1] = f' class="{MARKS[row[-1]]}"'
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def number(value: float | None, factor: float) -> str:
    if value is None:
        return "–"
    if math.isinf(value):
        return "never"
    shown = value * factor
    return f"{shown:.3g}" if abs(shown) < 100 else f"{shown:.0f}"


def escape(text: str) -> str:
    return html.escape(text)
