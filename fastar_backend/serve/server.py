"""One watched server: started, proved to answer, restarted when it dies, drained when it is to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from types import TracebackType

import psutil

from fastar_backend.errors import InvalidInput
from fastar_backend.serve import guard, install, runtime
from fastar_backend.serve.admin import Admin
from fastar_backend.serve.logs import ServerLog
from fastar_backend.serve.placement import NOT_READY, Placement
from fastar_backend.serve.probe import Probe
from fastar_backend.serve.settings import ServerError, ServeSettings

logger = logging.getLogger("fastar.serve")

POLL = 0.25  # seconds between looks at the processes
DRAIN_POLL = 0.05  # of a server that drains
FAREWELL = 0.5  # seconds for the last replies, which are already Triton's, to reach their clients
FORGIVEN = 60.0  # seconds of health after which earlier restarts no longer count
BACKOFF = (0.5, 10.0)  # seconds before the first restart; at most
CHOSEN_PORTS = range(20000, 32768)  # below those that Linux gives to outgoing connections


class Server:
    """Use as a context manager, or start() and stop(). Thread-safe: stop() and kill() may come from anywhere.

    Raises InvalidInput for a port in use, ServerError where the server cannot be started.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.restarts = 0
        self.failure: ServerError | None = None  # why it gave up
        self.stopping = threading.Event()
        self.stopped = threading.Event()
        self.ports: dict[str, int] = {}
        self._snapshots = ""  # a private folder for snapshots, where none is configured
        self._attempt: Attempt | None = None
        self._watcher: threading.Thread | None = None
        self._admin: Admin | None = None
        self._placement = Placement()

    @property
    def grpc_url(self) -> str:
        return f"{self._reachable}:{self.ports['grpc']}"

    @property
    def http_url(self) -> str:
        return f"http://{reachable(self.settings.http_host)}:{self.ports['http']}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._reachable}:{self.ports['metrics']}/metrics"

    @property
    def admin_url(self) -> str | None:
        """None where there is no such port."""
        return f"http://{self._reachable}:{self._admin.port}" if self._admin else None

    @property
    def model_processes(self) -> list[psutil.Process]:
        """The processes that run the model (Triton's stubs); the engine lives in them."""
        return self._attempt.stubs() if self._attempt else []

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when a canary has been answered, or when stop() was called meanwhile."""
        self._installation = install.find()
        self._repository = install.model_repository(self.settings.model_repository)
        readable(self.settings)
        self.ports = free_ports(self.settings)
        if self.settings.service.snapshots is None:
            self._snapshots = tempfile.mkdtemp(prefix="fastar-snapshots-")  # outlives the model process, not us
            service = self.settings.service.model_copy(update={"snapshots": self._snapshots})
            self.settings = self.settings.model_copy(update={"service": service})
        try:
            if self.settings.admin_port is not None:
                self._admin = Admin(self.settings.host, self.settings.admin_port, self)
            self._launch()
        except BaseException:
            self.kill()
            raise
        self._watcher = threading.Thread(target=self._watch, name="fastar-watch", daemon=True)
        self._watcher.start()

    def wait(self) -> None:
        """Until the server has stopped; raises ServerError if it gave up."""
        while not self.stopped.wait(1.0):  # in pieces, so that Python handles signals meanwhile
            pass
        if self.failure:
            raise self.failure

    def stop(self) -> None:
        """Drains: live streams are stored and sent on, or get to end, in `exit_timeout` seconds; then all is killed."""
        self.stopping.set()
        if self._watcher:
            self._watcher.join()
        self._let_go()
        self.stopped.set()

    def move(self, streams: int) -> None:
        """So many live streams are stored and sent on to other servers; this one goes on. Asked anew before that has
        begun, the last number counts. Raises ServerError where they have nowhere to go on, or nobody runs."""
        attempt = self._attempt
        if attempt is None or self.stopping.is_set() or attempt.guard.poll() is not None:
            raise ServerError("server: it is not running; allowed: one that is")
        if not attempt.moves:
            raise ServerError("streams: nowhere to go on; allowed: with --snapshots that other servers share")
        temporary = attempt.launch.move.with_suffix(".new")
        temporary.write_text(str(streams))
        temporary.replace(attempt.launch.move)

    def close(self, seconds: float) -> None:
        """For so long, new streams should rather go elsewhere; 0: no longer. Those that come are taken."""
        self._placement.close(seconds)

    def placement(self) -> str:
        """One of placement.py's states: whether new streams should come here."""
        if self._attempt is None or self.stopping.is_set():
            return NOT_READY
        return self._placement.look(self.http_url, self.metrics_url)

    def kill(self) -> None:
        """Ends everything at once."""
        self.stopping.set()
        if self._attempt:
            self._attempt.kill()
        self._let_go()
        self.stopped.set()

    def _let_go(self) -> None:
        if self._admin:
            self._admin.stop()
            self._admin = None
        if self._snapshots:
            shutil.rmtree(self._snapshots, ignore_errors=True)

    @property
    def _reachable(self) -> str:
        return reachable(self.settings.host)

    def _launch(self) -> None:
        launch = runtime.prepare(self.settings, self.ports, self._installation, self._repository)
        urls = [self.grpc_url, *(urllib.parse.urlsplit(url).netloc for url in (self.http_url, self.metrics_url))]
        self._attempt = Attempt(launch, urls, self.settings, self._snapshots)
        self._attempt.wait_until_ready(self.stopping)

    def _watch(self) -> None:
        in_a_row = 0
        while not self.stopping.is_set():
            healthy_since = time.monotonic()
            reason = self._attempt.watch(self.stopping)
            while reason and not self.stopping.is_set():
                in_a_row = 1 if time.monotonic() - healthy_since > FORGIVEN else in_a_row + 1
                self._attempt.kill()
                if in_a_row > self.settings.max_restarts:
                    self.failure = ServerError(f"gave up after {self.settings.max_restarts} restarts: {reason}")
                    self.stopping.set()
                    break
                delay = min(BACKOFF[0] * 2 ** (in_a_row - 1), BACKOFF[1])
                logger.error("%s; restarting in %.1f s", reason, delay)
                if self.stopping.wait(delay):
                    break
                try:
                    self.restarts += 1
                    self._launch()
                    reason = None
                    logger.info("answers again")
                except ServerError as error:
                    reason = str(error)
        self._attempt.drain(self.settings.exit_timeout)
        self.stopped.set()


class Attempt:
    """One life of tritonserver, from its launch to its death."""

    def __init__(self, launch: runtime.Launch, urls: list[str], settings: ServeSettings, snapshots: str) -> None:
        """urls: host:port of gRPC, which is probed, and of all else that must listen."""
        self.settings = settings
        self.launch = launch
        self.urls = urls
        self.moves = not snapshots  # streams can go on elsewhere: their store outlives this server
        self.log = ServerLog(logger)
        self.probe: Probe | None = None
        # Its own session: Ctrl-C at the terminal reaches only us, and the whole group can be killed.
        self.guard = subprocess.Popen(
            [sys.executable, guard.__file__, str(launch.folder), launch.shared_memory, snapshots, *launch.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=launch.environment,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, name="fastar-log", daemon=True)
        self.reader.start()

    def wait_until_ready(self, stopping: threading.Event) -> None:
        """Raises ServerError when the server exits, or does not answer within `startup_timeout`."""
        deadline = time.monotonic() + self.settings.startup_timeout
        problem = "its ports are closed"
        while not stopping.is_set():
            if self.guard.poll() is not None:
                self.reader.join(5)
                raise ServerError(self.log.failure or f"tritonserver exited with status {self.guard.returncode}")
            if time.monotonic() > deadline:
                raise ServerError(f"not ready after {self.settings.startup_timeout:g} s: {problem}")
            if all(listening(url) for url in self.urls):  # Triton opens the metrics' port last, well after gRPC's
                try:
                    self.probe = self.probe or Probe(self.urls[0], self.settings)
                    self.probe.check(min(30.0, self.settings.hang_seconds))
                    return
                except ServerError as error:
                    problem = str(error)
                    if "wrong bytes" in problem:
                        raise
            stopping.wait(POLL)

    def watch(self, stopping: threading.Event) -> str | None:
        """Blocks while the server is well. Returns what is wrong with it, or None when `stopping`."""
        stubs = self.stubs()
        period = min(self.settings.canary_seconds, self.settings.service.idle_seconds / 3)
        canary = Canary(self.probe, period, self.settings.hang_seconds)
        try:
            while not stopping.wait(POLL):
                if self.guard.poll() is not None:
                    return f"tritonserver died (status {self.guard.returncode})"
                # Triton neither restarts a dead model process nor says that it is not ready.
                if any(not alive(stub) for stub in stubs):
                    return "the model process died"
                if canary.failure:
                    return canary.failure
            return None
        finally:
            canary.stop()

    def stubs(self) -> list[psutil.Process]:
        try:
            children = psutil.Process(self.guard.pid).children(recursive=True)
            return [child for child in children if install.STUB in child.cmdline()[0]]
        except (psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
            return []

    def drain(self, timeout: float) -> None:
        """Has live streams stored and sent on, where they can go on elsewhere; else lets them end. In `timeout`
        seconds at most; then kills."""
        if self.guard.poll() is None and self.probe:
            self.probe.close()
            moving = self.moves
            if moving:
                try:
                    self.launch.drain.touch()
                except FileNotFoundError:  # tritonserver has just died, and its guard has cleared up
                    moving = False
            with contextlib.suppress(BrokenPipeError, ValueError):  # ValueError: `kill` from another thread was faster
                self.guard.stdin.write(b"T")
                self.guard.stdin.flush()
            deadline = time.monotonic() + timeout + 1
            while self.guard.poll() is None and time.monotonic() < deadline:
                if moving and not self.launch.drain.exists():  # all is done: Triton would wait for its idle sequences
                    moving, deadline = False, min(deadline, time.monotonic() + FAREWELL)
                time.sleep(DRAIN_POLL)
        self.kill()

    def kill(self) -> None:
        """Idempotent. The guard does it; the process group is for the case that the guard is dead."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.guard.stdin.write(b"K")
            self.guard.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.guard.wait(15)
        if self.guard.poll() is None or self.guard.returncode < 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.guard.pid, signal.SIGKILL)
        self.guard.wait()
        guard.clean(self.launch.folder, self.launch.shared_memory)
        self.reader.join(5)
        if self.probe:
            self.probe.client.close()

    def _read(self) -> None:
        with self.guard.stdout as output:
            for line in output:
                self.log.line(line.decode(errors="replace"))


class Canary:
    """Asks again and again in a thread of its own: an answer may take as long as the batch in front of it."""

    def __init__(self, probe: Probe, period: float, patience: float) -> None:
        self.failure: str | None = None
        self._probe, self._period, self._patience = probe, period, patience
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastar-canary", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        failures = 0
        while not self._stop.wait(self._period):
            try:
                self._probe.check(self._patience)
                failures = 0
            except ServerError as error:
                failures += 1
                if failures == 2 or "Deadline" in str(error):
                    self.failure = str(error)
                    return


def readable(settings: ServeSettings) -> None:
    """Raises InvalidInput naming the option of a file that cannot be read."""
    for name in ("tls_certificate", "tls_key", "tls_client_ca"):
        path = getattr(settings, name)
        if path and not os.access(path, os.R_OK):
            raise InvalidInput(f"--{name.replace('_', '-')}", f"cannot read {path}", "a PEM file")


def free_ports(settings: ServeSettings) -> dict[str, int]:
    """The three ports, 0 replaced by a free one; raises InvalidInput naming the option of a port in use."""
    with contextlib.ExitStack() as held:
        ports = {}
        for kind in ("http", "grpc", "metrics"):
            host, port = settings.http_host if kind == "http" else settings.host, getattr(settings, f"{kind}_port")
            probe = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                bind(probe, host, port)
                probe.listen()
            except OSError as error:
                where = f"port {port} of {host}: {error.strerror.lower()}"
                raise InvalidInput(f"--{kind}-port", where, "a free port, or 0 to have one chosen") from None
            ports[kind] = probe.getsockname()[1]
    return ports


def bind(probe: socket.socket, host: str, port: int) -> None:
    """0: a free port. Those that the system would choose go to outgoing connections, too, and one of them may take it
    in the seconds until the server listens: it is one of the others, if one is free. Raises OSError."""
    for choice in random.sample(CHOSEN_PORTS, 20) if port == 0 else ():
        with contextlib.suppress(OSError):
            probe.bind((host, choice))
            return
    probe.bind((host, port))


def reachable(host: str) -> str:
    """Where one that listens there is found, as in a URL."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)


def listening(url: str) -> bool:
    host, _, port = url.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=1):
        return True
    return False


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
