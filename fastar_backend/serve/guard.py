"""The process between the supervisor and tritonserver: whatever dies, nothing is left behind.

Run as `python guard.py FOLDER SHARED_MEMORY_PREFIX SNAPSHOTS COMMAND...`. It is tritonserver's parent. Standard input
comes from the supervisor: a byte `T` asks the server to drain, `K` kills it; end of file, which even a killed
supervisor causes, kills it, too, and then SNAPSHOTS (a folder, or "") is removed: nobody else would. When the server is
gone, however that came about, its orphaned model processes are killed, FOLDER and the shared memory are removed, and
the guard exits with the server's exit status.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def obey(child: subprocess.Popen[bytes], orphaned: threading.Event) -> None:
    while (order := os.read(0, 1)) == b"T":
        child.terminate()
    if not order:
        orphaned.set()
    child.kill()


def clean(folder: str | Path, shared_memory: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for file in Path("/dev/shm").glob(f"{shared_memory}*"):
        file.unlink(missing_ok=True)


def main(folder: str, shared_memory: str, snapshots: str, *command: str) -> int:
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphaned stubs become ours
    # Should the guard itself be killed, the server goes with it.
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    )
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    orphaned = threading.Event()
    threading.Thread(target=obey, args=(child, orphaned), daemon=True).start()
    status = child.wait()
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)
    clean(folder, shared_memory)
    if orphaned.is_set() and snapshots:
        shutil.rmtree(snapshots, ignore_errors=True)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
