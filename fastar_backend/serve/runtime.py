"""One launch: a private folder with the backend and the rendered model, the command line, the environment."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fastar_backend.serve import numpy2
from fastar_backend.serve.install import STUB, Installation
from fastar_backend.serve.settings import ServeSettings

SUPPORT = "triton_python_backend_utils.py"  # of Triton's Python backend, imported by the stub
PARAMETERS = ("world", "device", "attention", "service", "precision", "compile", "runtime", "engine_dir")
# Seconds that Triton remembers an idle sequence longer than the service does: it counts from the last request, also
# while that is being computed; and who comes back too late is to hear it from the service.
TRITON_IDLE = 60.0
HEADERS = "(?i)^(x-fastar-tenant|x-fastar-migrate|traceparent)$"  # of a gRPC call, handed to the model


@dataclasses.dataclass(frozen=True)
class Launch:
    folder: Path  # removed by the guard
    shared_memory: str  # prefix of the names that Triton's Python backend uses in /dev/shm
    command: list[str]
    environment: dict[str, str]

    @property
    def move(self) -> Path:
        """A file that holds how many streams the model process is to send on to other servers."""
        return self.folder / "move"

    @property
    def drain(self) -> Path:
        """Where it is, the model stores its streams and sends them on; it removes the file when it is done."""
        return self.folder / "drain"


def prepare(settings: ServeSettings, ports: dict[str, int], installation: Installation, repository: Path) -> Launch:
    """Writes the folder. `ports` holds http, grpc, metrics, all free."""
    folder = Path(tempfile.mkdtemp(prefix=f"fastar-{os.getpid()}-"))
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for file in installation.backend.iterdir():
        if installation.numpy1 and file.name == SUPPORT and not np.__version__.startswith("1."):
            source = f"{file.read_text()}\n\n{Path(numpy2.__file__).read_text()}\n\nrepair()\n"
            (backend / file.name).write_text(source)
        elif file.name != STUB:
            (backend / file.name).symlink_to(file)
    # A link, not a copy: the stub finds its libraries relative to where it really lies.
    (backend / STUB).symlink_to(installation.stub)

    source, model = repository / "fastar", folder / "models" / "fastar"
    shutil.copytree(source, model, ignore=shutil.ignore_patterns("__pycache__"))
    (model / "config.pbtxt").write_text(render((source / "config.pbtxt").read_text(), settings))

    name = folder.name.replace("-", "_")
    return Launch(
        folder,
        name,
        _command(settings, ports, installation, folder, name),
        _environment(settings, installation, folder),
    )


def render(config: str, settings: ServeSettings) -> str:
    """The model's configuration with these settings in it."""
    message = text_format.Parse(config, model_config_pb2.ModelConfig())
    message.max_batch_size = settings.service.max_streams + 1
    batching = message.sequence_batching
    batching.max_sequence_idle_microseconds = int((settings.service.idle_seconds + TRITON_IDLE) * 1e6)
    values = {"world": settings.world, "device": settings.device, "precision": settings.precision}
    values["compile"] = "auto" if settings.compile is None else settings.compile
    values["runtime"] = settings.runtime
    values["engine_dir"] = settings.engine_dir.resolve() if settings.engine_dir else ""
    values["attention"] = settings.attention.model_dump_json()
    values["service"] = settings.service.model_dump_json(exclude={"snapshots"})  # may hold a password, and Triton tells
    for key in PARAMETERS:
        message.parameters[key].string_value = str(values[key])
    return text_format.MessageToString(message)


def _command(
    settings: ServeSettings, ports: dict[str, int], installation: Installation, folder: Path, shared_memory: str
) -> list[str]:
    flags = {
        "model-repository": folder / "models",
        "backend-directory": folder / "backends",
        "backend-config": f"python,shm-region-prefix-name={shared_memory}",
        "exit-timeout-secs": math.ceil(settings.exit_timeout),
        # A client that vanished without a word is found within 30 s, and its calls are cancelled.
        "grpc-keepalive-time": 20_000,
        "grpc-keepalive-timeout": 10_000,
        "grpc-keepalive-permit-without-calls": 1,
        "grpc-http2-max-pings-without-data": 0,
        "grpc-http2-min-recv-ping-interval-without-data": 5_000,
        "grpc-header-forward-pattern": HEADERS,
    }
    for kind, port in ports.items():
        host = settings.http_host if kind == "http" else settings.host
        flags |= {f"{kind}-address": host, f"{kind}-port": port}
    if settings.tls_key:
        flags |= {"grpc-server-cert": settings.tls_certificate, "grpc-server-key": settings.tls_key}
        flags |= {"grpc-use-ssl": "true"}
        if settings.tls_client_ca:
            flags |= {"grpc-use-ssl-mutual": "true", "grpc-root-cert": settings.tls_client_ca}
    values = [f"--{name}={value}" for name, value in flags.items()]
    if settings.trace_rate:
        trace = ("mode=opentelemetry", "level=TIMESTAMPS", f"rate={settings.trace_rate}")
        values += [f"--trace-config={value}" for value in (*trace, f"opentelemetry,url={settings.trace_url}")]
    return [str(installation.server), "--disable-auto-complete-config", *values]


def _environment(settings: ServeSettings, installation: Installation, folder: Path) -> dict[str, str]:
    # The rendered configuration holds the settings; the variables that would override it there are done with.
    environment = {k: v for k, v in os.environ.items() if k not in {f"FASTAR_{name.upper()}" for name in PARAMETERS}}
    # The stub embeds Python: it takes the first python3 on PATH for its home, and so this environment's packages.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment["FASTAR_DRAIN_FILE"] = str(folder / "drain")
    environment["FASTAR_MOVE_FILE"] = str(folder / "move")
    environment["FASTAR_SNAPSHOTS"] = settings.service.snapshots or ""
    if installation.library:
        libraries = [str(installation.library), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(settings.threads)
    # Threads that spin long at barriers starve each other when the client, or anything else, shares the cores; threads
    # that never spin lose half the speed on idle ones (docs/decisions.md).
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")
    return environment
