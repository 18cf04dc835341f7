"""The `fastar` command."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fastar_backend.config import parse
from fastar_backend.errors import FastarError, InvalidInput
from fastar_backend.evaluation.cli import app as evaluation
from plugins.cli import app as engine

app = typer.Typer(
    help="FAST-AR Serve: live autoregressive video from NVIDIA Triton.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(evaluation, name="eval")
app.add_typer(engine, name="engine")


@app.callback()
def fastar(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    pass  # main() looks at --debug; the callback also keeps `serve` a subcommand


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 opens the server to the network: it has no passwords.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="What clients connect to; 0 picks a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics; 0 picks a free one.")] = 8002,
    admin_port: Annotated[
        int | None,
        typer.Option(
            envvar="FASTAR_ADMIN_PORT",
            help="For a cluster's controller and gateways: moves, room for streams. No passwords.",
            show_default="none",
        ),
    ] = None,
    world: Annotated[
        str, typer.Option(envvar="FASTAR_WORLD", help="A built-in world, or a folder with a world.json.")
    ] = "doom",
    device: Annotated[str, typer.Option(envvar="FASTAR_DEVICE", help="auto, cpu or cuda.")] = "auto",
    attention: Annotated[
        str, typer.Option(envvar="FASTAR_ATTENTION", help="dense, window, fastar, or JSON of all its settings.")
    ] = "fastar",
    precision: Annotated[
        str, typer.Option(envvar="FASTAR_PRECISION", help="auto, or fp8: the blocks' linear layers in 8 bits.")
    ] = "auto",
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="On a GPU: compiled decoder, CUDA graphs; a slower start, faster chunks.",
            show_default="on a GPU, for worlds in bfloat16",
        ),
    ] = None,
    runtime: Annotated[
        str, typer.Option(envvar="FASTAR_RUNTIME", help="What computes the transformer: torch, or tensorrt.")
    ] = "torch",
    engine_dir: Annotated[
        Path | None,
        typer.Option(
            "--engine", envvar="FASTAR_ENGINE_DIR", help="Folder of `fastar engine build`, for --runtime tensorrt."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file of limits (ServiceConfig); the options beside it win.")
    ] = None,
    max_streams: Annotated[
        int | None,
        typer.Option(envvar="FASTAR_MAX_STREAMS", help="Streams at a time; more are refused.", show_default="8"),
    ] = None,
    idle_seconds: Annotated[
        float | None, typer.Option(help="A stream without requests for so long is dropped.", show_default="60")
    ] = None,
    snapshots: Annotated[
        str | None,
        typer.Option(
            envvar="FASTAR_SNAPSHOTS",
            help="Where streams are stored: a folder, any fsspec URL, or redis://[user:password@]host:port.",
            show_default="a private folder, gone with the server",
        ),
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic", help="Compute streams one by one: no bit depends on neighbours."),
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file; gRPC then speaks TLS, and HTTP listens on 127.0.0.1 only.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM file: clients need a certificate that this CA signed (mutual TLS).")
    ] = None,
    tls_name: Annotated[
        str, typer.Option(help="Name in the certificate by which the health check calls.")
    ] = "localhost",
    trace_rate: Annotated[
        int, typer.Option(help="Triton's own trace of one request in so many, beside the streams' (OTEL_* variables).")
    ] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the model.", show_default="all cores")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    model_repository: Annotated[Path | None, typer.Option(help="Folder that holds fastar/config.pbtxt.")] = None,
    exit_timeout: Annotated[float, typer.Option(help="Seconds that live streams get to end at Ctrl-C.")] = 30.0,
) -> None:
    """Serve live video streams. Ctrl-C drains and stops; a second one stops at once."""
    from fastar_backend.serve import Server, ServeSettings  # gRPC takes a second to import: not for --help
    from fastar_backend.service.config import ServiceConfig

    fields = ServeSettings.model_fields | ServiceConfig.model_fields
    given = {name: value for name, value in locals().items() if name in fields and value is not None}
    settings = parse(ServeSettings, given | ({"service": read_json(config)} if config else {}), "serve")
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"
    )
    server = Server(settings)
    on_signal(server.stopping, server.kill)
    say = Console(highlight=False).print
    say(
        f"[bold]FAST-AR Serve[/]: loading {escape(settings.world)} on {settings.device}, {settings.threads} CPU threads"
    )
    try:
        server.start()
        if not server.stopping.is_set():
            say(f"  gRPC     {server.grpc_url}")
            say(f"  HTTP     {server.http_url}")
            say(f"  metrics  {server.metrics_url}")
            local = settings.host in ("127.0.0.1", "localhost", "::1")
            say("  Only this machine can connect; --host 0.0.0.0 opens it." if local else "  Open to the network.")
            say(f"[bold green]Ready[/] for {settings.service.max_streams} streams. Ctrl-C stops.")
        server.wait()
    finally:
        server.stop()
    say("Stopped.")


def read_json(path: Path) -> Any:
    """Raises InvalidInput."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else "not JSON"
        raise InvalidInput("--config", f"{path}: {what}", "a JSON object of ServiceConfig's fields") from None


def on_signal(stopping: threading.Event, kill: Callable[[], None]) -> None:
    """SIGINT and SIGTERM set `stopping`; a second SIGINT calls `kill`."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stopping.is_set() and number == signal.SIGINT:
            threading.Thread(target=kill).start()
        stopping.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def main() -> None:
    """Errors made for users end in one line on standard error: status 2 for what the caller gave, 1 for the rest."""
    try:
        app()
    except FastarError as error:
        if "--debug" in sys.argv:
            raise
        print(f"fastar: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidInput) else 1)


if __name__ == "__main__":
    main()
