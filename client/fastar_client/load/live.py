"""How a running test stands: a line that is redrawn on a terminal, or one now and then where output goes elsewhere."""

from __future__ import annotations

from collections import deque
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fastar_client.load.plan import PlannedStream
from fastar_client.load.record import LOST, StreamRecord
from fastar_client.load.workers import Now

TIME = "{task.completed:.0f} of {task.total:.0f} s"
LINE_SECONDS = 10.0  # between lines where there is no terminal


class LiveView:
    """`show` as `workers.run` calls it. On stderr, so that stdout has the result alone."""

    def __init__(self, streams: list[PlannedStream]) -> None:
        self._planned = len(streams)
        self._seconds = max((stream.leaves for stream in streams), default=0.0)
        self._console = Console(stderr=True, highlight=False)
        columns = (TextColumn(TIME), BarColumn(20), TextColumn("{task.fields[now]}"))
        terminal = self._console.is_terminal
        self._progress = Progress(*columns, console=self._console, transient=True, disable=not terminal)
        self._task = self._progress.add_task("", total=self._seconds, now="load processes start")
        self._line_at = 0.0 if not terminal else float("inf")
        self._delivered = deque([(0.0, 0)], maxlen=10)  # (seconds, frames) as of the last few calls

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def show(self, seconds: float, processes: list[Now], records: list[StreamRecord]) -> None:
        """seconds: since the test began."""
        now = self._text(seconds, processes, records)
        self._progress.update(self._task, completed=max(0.0, min(seconds, self._seconds)), now=now)
        if seconds >= self._line_at:
            self._line_at = seconds + LINE_SECONDS
            self._console.print(f"{max(seconds, 0):.0f} of {self._seconds:.0f} s: {now}", soft_wrap=True)

    def _text(self, seconds: float, processes: list[Now], records: list[StreamRecord]) -> str:
        frames = sum(now.frames for now in processes)
        self._delivered.append((seconds, frames))
        then, before = self._delivered[0]
        delivered = (frames - before) / (seconds - then) if seconds > then else 0.0
        rates = [rate for now in processes for rate in now.fps]
        lost = sum(record.outcome in LOST for record in records)
        parts = [
            f"{sum(now.opened for now in processes)} of {self._planned} arrived",
            f"{sum(now.running for now in processes)} running",
            f"{delivered:.0f} frames/s",
            f"slowest {min(rates):.1f} FPS" if rates else "",
            f"{lost} lost" if lost else "",
        ]
        return "  ".join(part for part in parts if part)
