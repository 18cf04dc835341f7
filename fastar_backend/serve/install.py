"""Finds what a server is made of: tritonserver, its Python backend, the stub for this Python, libpython."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from fastar_backend.serve.settings import ServerError

STUB = "triton_python_backend_stub"


@dataclasses.dataclass(frozen=True)
class Installation:
    server: Path
    backend: Path  # the folder of the Python backend
    stub: Path  # built for this interpreter's minor version
    library: Path | None  # folder of the libpython that the stub is linked to; None: it brings its own
    numpy1: bool  # the stub was built for numpy 1


def find() -> Installation:
    """The first usable tritonserver; raises ServerError that says what is missing and how to get it."""
    for server in _servers():
        root = server.parent.parent
        backend = root / "backends" / "python"
        own = backend / STUB  # NVIDIA's container: one stub, for the container's Python
        stub = own if own.exists() else root / "python_backend_stubs" / _python() / STUB
        if not stub.exists():
            raise ServerError(f"{server} has no Python backend for Python {_python()} (looked for {stub})")
        return Installation(server, backend, stub, _libpython(stub), numpy1=stub != own)
    raise ServerError(
        "tritonserver not found: pip install 'fastar-serve[server]' (x86-64 Linux), "
        "or use NVIDIA's Triton container, or name the binary in FASTAR_TRITONSERVER"
    )


def model_repository(chosen: Path | None) -> Path:
    """The folder that holds fastar/config.pbtxt; raises ServerError."""
    named = chosen or os.environ.get("FASTAR_MODEL_REPOSITORY")
    folder = Path(named) if named else Path(__file__).parents[2] / "model_repository"
    if not (folder / "fastar" / "config.pbtxt").is_file():
        raise ServerError(f"no fastar/config.pbtxt in {folder}: name the folder by --model-repository")
    return folder.resolve()


def _servers() -> Iterator[Path]:
    if named := os.environ.get("FASTAR_TRITONSERVER"):
        if not os.access(named, os.X_OK):
            raise ServerError(f"FASTAR_TRITONSERVER={named} is not an executable file")
        yield Path(named).resolve()
    on_path = shutil.which("tritonserver", path=os.pathsep.join([os.environ.get("PATH", ""), "/opt/tritonserver/bin"]))
    if on_path:
        yield Path(on_path).resolve()
    wheel = importlib.util.find_spec("pytriton")
    if wheel and wheel.submodule_search_locations:
        binary = Path(wheel.submodule_search_locations[0]) / "tritonserver" / "bin" / "tritonserver"
        if binary.exists():
            yield binary


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _libpython(stub: Path) -> Path | None:
    name = f"libpython{_python()}.so.1.0"
    if name.encode() not in stub.read_bytes():
        return None
    lib = [sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix, "lib")]
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    folders = [*filter(None, lib), Path("/usr/lib", multiarch), Path("/usr/lib64"), Path("/usr/local/lib")]
    for folder in map(Path, folders):
        if (folder / name).exists():
            return folder
    package = name.removesuffix(".so.1.0")
    raise ServerError(f"{name} not found: Triton's Python backend needs it (Debian, Ubuntu: apt install {package})")
