"""`fastar-controller`: one of two or more; who holds the Lease acts."""

from __future__ import annotations

import secrets
import signal
import socket
import threading
from pathlib import Path
from typing import Annotated

import typer
from kubernetes.config import ConfigException

from fastar_controller.api import Pods, connect, reason
from fastar_controller.controller import Controller, Settings
from fastar_controller.health import Limits
from fastar_controller.lease import Leader
from fastar_controller.status import Status

HERE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def control(
    namespace: Annotated[str | None, typer.Option(help="Of the pods and the Lease. Default: the pod's own.")] = None,
    selector: Annotated[str, typer.Option(help="Labels of the servers.")] = "app.kubernetes.io/name=triton",
    target: Annotated[float, typer.Option(help="Frames per second that viewers were promised.", min=0.1)] = 16.0,
    room: Annotated[int, typer.Option(help="Free slots to keep open, at least.", min=1)] = 8,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.05, max=30)] = 5.0,
    timeout: Annotated[float, typer.Option(help="Seconds that a server may take to answer.", min=0.05)] = 2.0,
    window: Annotated[float, typer.Option(help="Seconds over which frame rates are looked at.", min=0.1)] = 60.0,
    hold: Annotated[float, typer.Option(help="Seconds below the target until it closes a pod.", min=0)] = 30.0,
    move_every: Annotated[
        float, typer.Option(help="Seconds between two streams that a slow pod sends on; 0: none.", min=0)
    ] = 120.0,
    misses: Annotated[int, typer.Option(help="Scrapes without an answer until a pod is closed.", min=1)] = 3,
    lease: Annotated[str, typer.Option(help="Name of the Lease.")] = "stream-controller",
    lease_seconds: Annotated[int, typer.Option(help="Until another may lead.", min=1)] = 15,
    host: Annotated[str, typer.Option(help="Of /metrics and /healthz.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Of /metrics and /healthz.", min=0, max=65535)] = 8080,
    api: Annotated[str | None, typer.Option(help="Address of the API server, outside a cluster.")] = None,
) -> None:
    """Until SIGTERM: keeps the pods' deletion cost up to date, and tells them when new streams should go elsewhere, and
    slow ones to send some on."""
    try:
        client = connect(api)
        namespace = namespace or HERE.read_text().strip()
    except (ConfigException, OSError) as error:
        raise typer.BadParameter(f"not in a cluster ({error}): give --api and --namespace") from None
    status = Status()
    server = status.serve(host, port)
    leader = Leader(
        client, namespace, lease, f"{socket.gethostname()}-{secrets.token_hex(4)}", lease_seconds,
        lambda error: status.error("lease", reason(error)),
    )  # fmt: skip
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    limits = Limits(target, window, hold, misses)
    pods = Pods(client, namespace, selector, max(2 * timeout, 5.0))
    leader.start()
    print(f"controls {selector} in {namespace}; /metrics on port {server.server_address[1]}", flush=True)
    Controller(pods, leader, status, Settings(interval, timeout, room, move_every, limits)).run(stop)
    leader.stop()
    server.shutdown()


def main() -> None:
    app()
