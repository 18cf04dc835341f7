"""The `fastar-load` command: many viewers at once, and what they see.

Exit codes: 0 every target of the SLO was met, 1 one was missed (or the server cannot be reached, or a file not be
written), 2 bad usage or invalid input, 130 stopped by Ctrl-C or SIGTERM (the report is of what ran).
"""

from __future__ import annotations

import asyncio
import datetime
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fastar_client import __version__
from fastar_client.errors import FastarError, InvalidArgument, invalid
from fastar_client.load import plots, workers
from fastar_client.load.live import LiveView
from fastar_client.load.plan import plan
from fastar_client.load.report import Report, judge
from fastar_client.load.run import Probe, Target, probe
from fastar_client.load.scenario import PRESETS, Scenario, preset, read_scenario
from fastar_client.transport import TlsFiles
from fastar_client.video import output_errors

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
MAX_PROCESSES = 256
Name = Annotated[str, typer.Argument(help=f"{', '.join(PRESETS)}, or a JSON file (`fastar-load show` writes one)")]
Url = Annotated[str, typer.Option(help="host:port of Triton's gRPC port, or of what stands before it")]
Streams = Annotated[int | None, typer.Option(help="of a preset: how many at once  [default: 4]")]
Seconds = Annotated[float | None, typer.Option(help="of a preset: how long streams arrive  [default: 60]")]
Fps = Annotated[float | None, typer.Option(help="of a preset: the rate that a viewer needs  [default: 16]")]
Saturate = Annotated[bool, typer.Option("--saturate", help="of a preset: as fast as possible, instead of paced")]
Seed = Annotated[int, typer.Option(help="of all that is drawn: arrivals, sessions, prompts, actions")]
Processes = Annotated[int, typer.Option(help="load processes that share the streams")]
Out = Annotated[Path, typer.Option(help="folder for report.json, report.html, report.png")]
Plots = Annotated[bool, typer.Option(help="report.png, and pictures in report.html; needs matplotlib")]
Timeout = Annotated[float, typer.Option(help="seconds without an answer that count as failure")]
Reconnect = Annotated[float, typer.Option(help="seconds to try to take up a stream that was lost; 0: not at all")]
Tenant = Annotated[str | None, typer.Option(help="in whose name  [default: the server's]")]
Tls = Annotated[bool, typer.Option("--tls", help="TLS, checked against the system's authorities")]
Ca = Annotated[Path | None, typer.Option(help="TLS, checked against the authorities in this PEM file")]
Certificate = Annotated[Path | None, typer.Option(help="TLS, with our own certificate (PEM)")]
Key = Annotated[Path | None, typer.Option(help="of that certificate (PEM)")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]


@app.command()
def run(
    scenario: Name = "steady",
    url: Url = "localhost:8001",
    streams: Streams = None,
    seconds: Seconds = None,
    fps: Fps = None,
    saturate: Saturate = False,
    seed: Seed = 0,
    processes: Processes = 1,
    out: Out = Path("load"),
    plots: Plots = True,
    timeout: Timeout = 60.0,
    reconnect_seconds: Reconnect = 30.0,
    tenant: Tenant = None,
    tls: Tls = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    debug: Debug = False,
) -> int:
    """Run a scenario against a server, and judge what its viewers saw."""
    described = scenario_of(scenario, streams, seconds, fps, saturate)
    target = target_of(url, timeout, reconnect_seconds, tenant, tls, ca, certificate, key)
    prepare(out, processes, plots)
    report = measured(target, described, seed, processes)
    report.write(out, plots)
    for line in summary(report):
        print(line)
    print(f"report: {out / 'report.html'}")
    if report.outcome.interrupted:
        return 130
    for line in report.missed:
        print(f"fastar-load: {line}", file=sys.stderr)
    return 1 if report.missed else 0


@app.command()
def capacity(
    url: Url = "localhost:8001",
    fps: Annotated[float, typer.Option(help="the rate that a viewer needs")] = 16.0,
    seconds: Annotated[float, typer.Option(help="how long the streams of each step are watched")] = 600.0,
    first: Annotated[int, typer.Option(help="streams of the first step")] = 1,
    most: Annotated[int, typer.Option(help="stop there, even if the server carries more")] = 64,
    seed: Seed = 0,
    processes: Processes = 1,
    out: Out = Path("load"),
    plots: Plots = True,
    timeout: Timeout = 60.0,
    tenant: Tenant = None,
    tls: Tls = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    debug: Debug = False,
) -> int:
    """Find the largest number of streams of which every one holds the SLO: one more each time, until it is missed."""
    if not 1 <= first <= most:
        raise invalid("first", first, f"1..{most}, which is --most")
    target = target_of(url, timeout, 0.0, tenant, tls, ca, certificate, key)
    prepare(out, processes, plots)
    held, why = first - 1, ""
    for streams in range(first, most + 1):
        report = measured(target, preset("hold", streams, seconds, fps), seed, min(processes, streams))
        folder = out / f"{streams}-streams"
        with output_errors(folder):
            folder.mkdir(exist_ok=True)
        report.write(folder, plots)
        if report.outcome.interrupted:
            return 130
        slowest = min(own.fps or 0.0 for own in report.each)
        below = slowest < (report.scenario.slo.p5_fps_share or 0.0) * fps
        missed = [f"the slowest stream had {slowest:.4g} FPS"] * below + report.missed
        print(f"{streams} streams: {'; '.join(missed) or f'held, the slowest at {slowest:.4g} FPS'}", flush=True)
        if missed:
            why = f"; {streams} do not: {missed[0]}"
            break
        held = streams
    print(f"capacity: {held} streams hold {fps:g} FPS for {seconds:g} s{why}")
    return 0 if held >= first else 1


@app.command()
def show(
    scenario: Name = "steady",
    streams: Streams = None,
    seconds: Seconds = None,
    fps: Fps = None,
    saturate: Saturate = False,
    debug: Debug = False,
) -> int:
    """Write a scenario as JSON, to be changed and run."""
    print(json.dumps(scenario_of(scenario, streams, seconds, fps, saturate).as_json(), indent=1))
    return 0


def scenario_of(name: str, streams: int | None, seconds: float | None, fps: float | None, saturate: bool) -> Scenario:
    """A preset with these parameters, or a file, which takes none. Raises InvalidArgument."""
    given = {"streams": streams, "seconds": seconds, "fps": fps, "paced": False if saturate else None}
    given = {field: value for field, value in given.items() if value is not None}
    if name in PRESETS:
        return preset(name, **given)
    for field, value in given.items():
        raise invalid("saturate" if field == "paced" else field, value, f"nothing: {name} is no preset, and says it")
    return read_scenario(Path(name))


def target_of(
    url: str,
    timeout: float,
    reconnect_seconds: float,
    tenant: str | None,
    tls: bool,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
) -> Target:
    """Raises InvalidArgument."""
    secure = TlsFiles(ca, certificate, key) if ca or certificate or key else tls
    target = Target(url, timeout, reconnect_seconds=reconnect_seconds, tenant=tenant, tls=secure)
    target.connection()
    return target


def prepare(out: Path, processes: int, plot: bool) -> None:
    """Whatever can be known to fail later fails now. Raises InvalidArgument, OutputError."""
    if not 1 <= processes <= MAX_PROCESSES:
        raise invalid("processes", processes, f"an integer 1..{MAX_PROCESSES}")
    if plot:
        plots.check()
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)


def measured(target: Target, scenario: Scenario, seed: int, processes: int) -> Report:
    """Runs `scenario`. Raises as a stream does, where not even a first one runs."""
    found: Probe = asyncio.run(probe(target, scenario))
    scenario = scenario.in_world(found.world)
    streams = plan(scenario, seed)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about: dict[str, Any] = {"fastar_client": __version__, "url": target.url, "started": started}
    about |= {"seed": seed, "processes": processes}
    with LiveView(streams) as view:
        outcome = workers.run(target, scenario, streams, processes, view.show)
    return judge(about, scenario, found, outcome, len(streams))


def summary(report: Report) -> list[str]:
    sums = report.totals
    outcomes = ", ".join(f"{count} {name}" for name, count in sums.outcomes.items()) or "none ran"
    lines = [f"{sums.planned} streams: {outcomes}"]
    lines += [f"{target.mark:12}  {target}" for target in report.targets]
    return lines + [f"warning: {line}" for line in report.warnings]


def main() -> NoReturn:
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except FastarError as error:
        fail(str(error), 2 if isinstance(error, InvalidArgument) else 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # usage errors of typer, whose classes differ between its versions
            fail(" ".join(error.format_message().split()), 2)
        fail(f"unexpected {type(error).__name__}: {error}; --debug shows where", 1)


def fail(message: str, code: int) -> NoReturn:
    """Inside an `except` block: ends the process with one line, or with the traceback where --debug is given."""
    if "--debug" in sys.argv:
        raise  # noqa: PLE0704
    print(f"fastar-load: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
