"""The controller as a process of its own, beside the fake API server."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

from fake_api import CODE, NAMESPACE, Api

QUICK = {"interval": 0.1, "timeout": 0.5, "window": 0.5, "hold": 0.4, "misses": 3, "lease-seconds": 2, "room": 1}


class Process:
    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self.process, self.url = process, f"http://127.0.0.1:{port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=5) as reply:
            return reply.read().decode()

    def metric(self, name: str) -> float:
        return float(re.search(rf"^fastar_controller_{re.escape(name)} (\S+)$", self.get("/metrics"), re.MULTILINE)[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(5)

    def end(self) -> int:
        """SIGTERM; its exit status."""
        self.process.terminate()
        return self.process.wait(5)


@contextlib.contextmanager
def controller(api: Api, **options: float) -> Iterator[Process]:
    command = [sys.executable, "-m", "fastar_controller", "--namespace", NAMESPACE, "--api", api.url]
    command += ["--host", "127.0.0.1", "--port", "0"]
    for name, value in (QUICK | {name.replace("_", "-"): value for name, value in options.items()}).items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"PYTHONPATH": str(CODE)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        said = process.stdout.readline()
        yield Process(process, int(re.search(r"port (\d+)", said)[1]))
    finally:
        process.kill()
        process.communicate()
