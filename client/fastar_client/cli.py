"""The `fastar-client` command: watch a live stream from a terminal, and keep it as files.

Exit codes: 0 done (also when --max-seconds ran out), 2 bad usage or invalid input, 130 or 143 stopped by Ctrl-C or
SIGTERM, 1 any other failure (also a replay that differs). Errors are one line on stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fastar_client import eventlog
from fastar_client.actions import Actions, parse_script
from fastar_client.errors import FastarError, InvalidArgument, OutputError, invalid
from fastar_client.protocol import Chunk, StreamOptions
from fastar_client.session import Connection, connect
from fastar_client.timing import ArrivalLog
from fastar_client.transport import TlsFiles
from fastar_client.video import Mp4Writer, Sampler, contact_sheet, output_errors, write_bytes, write_json

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
Url = Annotated[str, typer.Option(help="host:port of Triton's gRPC port")]
Tls = Annotated[bool, typer.Option("--tls", help="TLS, checked against the system's authorities")]
Ca = Annotated[Path | None, typer.Option(help="TLS, checked against the authorities in this PEM file")]
Certificate = Annotated[Path | None, typer.Option(help="TLS, with our own certificate (PEM)")]
Key = Annotated[Path | None, typer.Option(help="of that certificate (PEM)")]
Tenant = Annotated[str | None, typer.Option(help="in whose name  [default: the server's]")]
Timeout = Annotated[float, typer.Option(help="seconds without an answer that count as failure")]
Reconnect = Annotated[float, typer.Option(help="seconds to try to take up a stream that was lost; 0: not at all")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
URL = "localhost:8001"


@app.command()
def stream(
    prompt: Annotated[str, typer.Option(help="what to show, at most 4096 bytes")],
    url: Url = URL,
    actions: Annotated[str, typer.Option(help='e.g. "forward*8,turn_left*4,forward+attack", or @file')] = "",
    once: Annotated[bool, typer.Option("--once", help="hold the last action instead of looping the script")] = False,
    frames: Annotated[int | None, typer.Option(help="stop after this many frames  [default: endless]")] = None,
    fps: Annotated[float | None, typer.Option(help="pace to this rate  [default: as fast as possible]")] = None,
    seed: Annotated[int | None, typer.Option(help="0..2^63-1")] = None,
    start: Annotated[str | None, typer.Option(help='a start of the world, "auto" or "nothing"')] = None,
    attention: Annotated[str | None, typer.Option(help='JSON object, e.g. {"kind": "dense"}')] = None,
    out: Annotated[Path, typer.Option(help="folder for video.mp4, contact.png and timings.json")] = Path("out"),
    max_seconds: Annotated[float | None, typer.Option(help="stop after this time")] = None,
    encoding: Annotated[str, typer.Option(help="how frames travel: raw, jpeg or h264")] = "raw",
    event_log: Annotated[Path | None, typer.Option(help="file for what is needed to replay the stream")] = None,
    timeout: Timeout = 60.0,
    reconnect_seconds: Reconnect = 30.0,
    tenant: Tenant = None,
    tls: Tls = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    debug: Debug = False,
) -> int:
    """Stream live video into a folder."""
    if max_seconds is not None and not 0 < max_seconds < float("inf"):
        raise invalid("max_seconds", max_seconds, "a number of seconds > 0")
    settings = None if attention is None else json_object("attention", attention)
    options = StreamOptions(prompt, frames, seed, start, settings, fps=fps, encoding=encoding)
    script = parse_script(actions, loop=not once)
    secure = tls_files(tls, ca, certificate, key)
    connection = connect(url, timeout=timeout, reconnect_seconds=reconnect_seconds, tenant=tenant, tls=secure)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    events = None if event_log is None else eventlog.EventLog(event_log, options)
    with events or contextlib.nullcontext(), Recording(out, options, events) as recording:
        asyncio.run(record(connection, options, script, recording, max_seconds))
    print(recording.summary())
    return recording.exit_code


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="written by `fastar-client stream --event-log`")],
    url: Url = URL,
    timeout: Timeout = 60.0,
    tenant: Tenant = None,
    tls: Tls = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    debug: Debug = False,
) -> int:
    """Run a recorded stream again, and compare its frames with those that were recorded."""
    options, recorded = eventlog.read(file)

    async def run() -> eventlog.Comparison:
        secure = tls_files(tls, ca, certificate, key)
        async with connect(url, timeout=timeout, tenant=tenant, tls=secure) as connection:
            return await eventlog.replay(connection, options, recorded)

    result = asyncio.run(run())
    first = result.first_difference
    differs = "" if first is None else f"; the first that differs: chunk {recorded[first].chunk}"
    print(f"{result.identical} of {result.chunks} chunks identical{differs}")
    return 0 if result.identical == result.chunks else 1


@app.command()
def ping(
    url: Url = URL,
    tls: Tls = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    debug: Debug = False,
) -> int:
    """Ask whether server and model are ready."""

    async def ask() -> tuple[bool, float]:
        async with connect(url, tls=tls_files(tls, ca, certificate, key)) as connection:
            asked = time.monotonic()
            return await connection.ready(), time.monotonic() - asked

    ready, seconds = asyncio.run(ask())
    if not ready:
        print(f"fastar-client: {url}: the server is live, but its model fastar is not ready (yet)", file=sys.stderr)
        return 1
    print(f"{url}: ready ({seconds * 1e3:.1f} ms)")
    return 0


def tls_files(tls: bool, ca: Path | None, certificate: Path | None, key: Path | None) -> bool | TlsFiles:
    return TlsFiles(ca, certificate, key) if ca or certificate or key else tls


class Recording:
    """The files of one stream. Whatever ends it, they are completed with what had arrived."""

    def __init__(self, out: Path, options: StreamOptions, events: eventlog.EventLog | None = None) -> None:
        self.out = out
        self._events = events
        self.ended = "frames"  # or max_seconds, interrupted, error
        self.exit_code = 0
        self._options = options
        self._world: Any = None
        self._error: str | None = None
        self._sampler = Sampler()
        self.log = ArrivalLog(time.monotonic(), options.fps)
        self._video = Mp4Writer(out / "video.mp4", options.fps or 24.0)

    def add(self, chunk: Chunk) -> None:
        if chunk.stats.world is not None:
            self._world = chunk.stats.world
            self._video.fps = self._options.fps or self._world.native_fps
        self._sampler.add(chunk.stats.first_frame, chunk.frames)
        self._video.write(chunk.frames)
        if self._events is not None:
            self._events.add(chunk)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        failures = [] if error is None else [error]
        for complete in (self._video.close, self._write_sheet):
            try:
                complete()
            except OutputError as failure:
                failures.append(failure)
        if failures:
            self.ended, self._error = "error", str(failures[0]) or type(failures[0]).__name__
        try:
            self._write_timings()
        except OutputError as failure:
            failures.append(failure)
        if failures and error is None:
            raise failures[0]

    def summary(self) -> str:
        metrics = self.log.metrics()
        if not metrics["frames"]:
            return f"no frames ({self.ended}); {self.out / 'timings.json'}"
        fps = metrics["steady_fps"] or metrics["mean_fps"]
        first = metrics["time_to_first_frame_seconds"]
        ended = "" if self.ended == "frames" else f", ended by {self.ended}"
        return f"{metrics['frames']} frames at {fps:.1f} FPS, the first after {first:.2f} s{ended}: {self._video.path}"

    def _write_sheet(self) -> None:
        if self._sampler.frames:
            write_bytes(self.out / "contact.png", contact_sheet(self._sampler.frames))

    def _write_timings(self) -> None:
        options = self._options
        asked = {
            "prompt": options.prompt,
            "frames": options.frames,
            "fps": options.fps,
            **json.loads(options.as_json()),
        }
        world = None if self._world is None else vars(self._world)
        result = {"ended": self.ended, "error": self._error, "options": asked, "world": world, **self.log.as_json()}
        write_json(self.out / "timings.json", result)


async def record(
    connection: Connection, options: StreamOptions, script: Actions, recording: Recording, max_seconds: float | None
) -> None:
    """Plays a stream into `recording`. Ctrl-C, SIGTERM and `max_seconds` end it in order; a second Ctrl-C kills."""
    loop = asyncio.get_running_loop()
    console = Console()
    columns = (TextColumn("frame {task.completed:.0f}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    async with connection:
        stream = connection.open(options, script)

        def stop(ended: str, exit_code: int) -> None:
            recording.ended, recording.exit_code = ended, exit_code
            closing.append(loop.create_task(stream.close()))
            with contextlib.suppress(NotImplementedError):  # on Windows, see below
                for number in caught:
                    loop.remove_signal_handler(number)

        closing: list[asyncio.Task[None]] = []
        caught = (signal.SIGINT, signal.SIGTERM)
        with contextlib.suppress(NotImplementedError):  # on Windows, where asyncio.run turns Ctrl-C into a cancellation
            for number in caught:
                loop.add_signal_handler(number, stop, "interrupted", 128 + number)
        timer = None if max_seconds is None else loop.call_later(max_seconds, stop, "max_seconds", 0)
        try:
            with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
                task = progress.add_task("", total=options.frames, figures="waiting for the first frame")
                async for chunk in stream:
                    assert stream.opened_at is not None
                    recording.log.opened_at = stream.opened_at
                    recording.log.add(chunk)
                    progress.update(task, advance=len(chunk.frames), figures=figures(recording.log, chunk))
                    await asyncio.to_thread(recording.add, chunk)  # encoding must not delay the clock of arrivals
        finally:
            if timer is not None:
                timer.cancel()
            await asyncio.gather(*closing)


def figures(log: ArrivalLog, chunk: Chunk) -> str:
    fps, stats = log.recent_fps(), chunk.stats
    return "  ".join(
        (
            "" if fps is None else f"{fps:.1f} FPS",
            f"first frame {log.arrivals[0].received:.2f} s",
            f"cache {stats.cache_tokens:.0f} tokens",
            f"density {stats.density:.2f}",
            f"server {stats.process_bytes / 2**30:.2f} GiB",
        )
    )


def json_object(field: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise invalid(field, text, 'a JSON object such as {"kind": "dense"}')
    return values


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
    print(f"fastar-client: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
