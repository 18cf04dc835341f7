"""A test's streams, dealt out to load processes. What they send back is raw records, so merging them loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from fastar_client.load.plan import PlannedStream, share
from fastar_client.load.record import StreamRecord
from fastar_client.load.run import Runner, Target
from fastar_client.load.scenario import Scenario

TELL_SECONDS = 0.5  # between two words of a load process on how it stands
RECENT_SECONDS = 5.0  # over which its streams' present frame rates are counted
READY_SECONDS = 60.0  # for a load process to start
HEAD_START = 0.2  # seconds from the last process's being ready to the test's begin


@dataclasses.dataclass(frozen=True)
class Now:
    """How a load process stands."""

    opened: int  # streams so far
    running: int
    frames: int  # delivered so far
    fps: tuple[float, ...]  # of running streams whose first chunk is older than RECENT_SECONDS


@dataclasses.dataclass
class Outcome:
    """Of the whole test."""

    records: list[StreamRecord] = dataclasses.field(default_factory=list)
    lags: list[float] = dataclasses.field(default_factory=list)
    died: list[str] = dataclasses.field(default_factory=list)  # load processes that did not finish, one line each
    interrupted: bool = False


@dataclasses.dataclass
class Worker:
    number: int
    process: Any
    pipe: Connection
    now: Now = Now(0, 0, 0, ())
    open: bool = True  # it may still send


def run(
    target: Target,
    scenario: Scenario,
    streams: list[PlannedStream],
    processes: int,
    shown: Callable[[float, list[Now], list[StreamRecord]], None],
) -> Outcome:
    """Plays `streams` from `processes` processes. shown: called about twice a second with the seconds since the test
    began, how each process stands, and the records so far.

    SIGINT and SIGTERM end the streams that run, and then the test: the outcome holds what ran. A second one raises
    KeyboardInterrupt. Must be called in the main thread.
    """
    outcome = Outcome()
    workers = [start(number, target, scenario, part) for number, part in enumerate(share(streams, processes))]

    def stop(number: int, frame: object) -> None:
        if outcome.interrupted:
            raise KeyboardInterrupt
        outcome.interrupted = True
        for worker in workers:
            tell(worker, "stop")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        began = begin(workers, outcome)
        show_at = 0.0
        while waiting := {worker.pipe: worker for worker in workers if worker.open}:
            for pipe in wait(list(waiting), TELL_SECONDS):
                take(waiting[pipe], outcome)
            if time.monotonic() >= show_at:
                show_at = time.monotonic() + TELL_SECONDS
                shown(time.monotonic() - began, [worker.now for worker in workers], outcome.records)
        for worker in workers:
            worker.process.join(5)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
    outcome.records.sort(key=lambda record: record.planned.number)
    return outcome


def start(number: int, target: Target, scenario: Scenario, streams: list[PlannedStream]) -> Worker:
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, target, scenario, streams), daemon=True)
    process.start()
    theirs.close()
    return Worker(number, process, ours)


def begin(workers: list[Worker], outcome: Outcome) -> float:
    """Waits until all are ready, and names the moment when the test begins (time.monotonic)."""
    for worker in workers:
        if worker.pipe.poll(READY_SECONDS):
            take(worker, outcome)
    began = time.monotonic() + HEAD_START
    for worker in workers:
        tell(worker, began)
    return began


def tell(worker: Worker, what: object) -> None:
    with contextlib.suppress(OSError):  # it died; `take` finds out
        worker.pipe.send(what)


def take(worker: Worker, outcome: Outcome) -> None:
    """One message of a load process."""
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(5)
        worker.open = False
        outcome.died.append(f"load process {worker.number} died (exit code {worker.process.exitcode})")
        return
    if isinstance(message, Now):
        worker.now = message
    elif isinstance(message, StreamRecord):
        outcome.records.append(message)
    elif isinstance(message, list):  # its lags, at its end
        outcome.lags += message
        worker.open = False


# In the load process


def work(pipe: Connection, target: Target, scenario: Scenario, streams: list[PlannedStream]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal sends to us, too; the parent decides
        signal.signal(number, signal.SIG_IGN)
    pipe.send("ready")
    began = pipe.recv()
    if not isinstance(began, float):  # stopped before it began
        pipe.send([])
        return
    asyncio.run(play(pipe, target, scenario, streams, began))


async def play(
    pipe: Connection, target: Target, scenario: Scenario, streams: list[PlannedStream], began: float
) -> None:
    def send(what: object) -> None:
        with contextlib.suppress(OSError):  # the parent is gone, and `listen` stops us
            pipe.send(what)

    runner = Runner(target, scenario, began, send)
    loop = asyncio.get_running_loop()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv()
        with contextlib.suppress(RuntimeError):  # the loop is over, too
            loop.call_soon_threadsafe(runner.stop)

    async def keep_telling() -> None:
        while True:
            await asyncio.sleep(TELL_SECONDS)
            send(standing(runner))

    threading.Thread(target=listen, daemon=True).start()
    telling = asyncio.create_task(keep_telling())
    try:
        await runner.run(streams)
    finally:
        telling.cancel()
    send(standing(runner))
    send(runner.lags)


def standing(runner: Runner) -> Now:
    running, since, fps = list(runner.running.values()), runner.now() - RECENT_SECONDS, []
    for record in running:
        if record.first is not None and record.first < since:
            last = itertools.takewhile(lambda chunk: chunk.received >= since, reversed(record.chunks))
            fps.append(sum(chunk.frames for chunk in last) / RECENT_SECONDS)
    return Now(len(running) + len(runner.records), len(running), runner.frames, tuple(fps))
