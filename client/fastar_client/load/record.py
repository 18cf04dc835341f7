"""What happened to one stream, unjudged: every time that later figures are made of. Seconds since the test began."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastar_client.load.plan import PlannedStream

# How a stream ended. `LOST` ones stay in every denominator, as streams that show nothing.
RUNNING = "running"  # it has not
COMPLETED = "completed"  # its viewer left when planned
DISCONNECTED = "disconnected"  # its connection was broken as planned
REJECTED = "rejected"  # refused, or unreachable, before its first chunk
FAILED = "failed"  # any error after its first chunk: evicted, broken, silent
STARVED = "starved"  # its viewer left when planned, having seen nothing
INTERRUPTED = "interrupted"  # the test was stopped
LOST = (REJECTED, FAILED, STARVED)


@dataclasses.dataclass(frozen=True)
class ChunkTime:
    sent: float  # its request
    received: float  # its last byte
    decoded: float  # its frames in the reader's hands
    frames: int
    cache_tokens: float
    step_seconds: float
    batch: int
    late: str | None  # the server's own reason for being late, if it says it was


@dataclasses.dataclass
class ControlTime:
    kind: str
    due: float
    sent: float
    applied: float | None = None  # received time of the first chunk that obeys; None: none has come
    chunk: int | None = None  # its number
    error: str | None = None  # what the server refused it with


@dataclasses.dataclass
class StreamRecord:
    planned: PlannedStream
    opened: float  # when its connection was begun; later than `planned.at` by the load generator's own lateness
    ended: float = 0.0
    outcome: str = RUNNING
    error: str | None = None
    reconnects: int = 0
    chunks: list[ChunkTime] = dataclasses.field(default_factory=list)
    controls: list[ControlTime] = dataclasses.field(default_factory=list)

    @property
    def first(self) -> float | None:
        """When its first chunk was there."""
        return self.chunks[0].received if self.chunks else None

    def as_json(self) -> dict[str, Any]:
        """Chunks as columns. Times to the microsecond."""
        names = [field.name for field in dataclasses.fields(ChunkTime)]
        columns = {name: [rounded(getattr(chunk, name)) for chunk in self.chunks] for name in names}
        planned = {key: rounded(value) for key, value in dataclasses.asdict(self.planned).items() if key != "controls"}
        controls = [{k: rounded(v) for k, v in dataclasses.asdict(control).items()} for control in self.controls]
        own = {name: rounded(getattr(self, name)) for name in ("opened", "ended", "outcome", "error", "reconnects")}
        return {"planned": planned, **own, "controls": controls, "chunks": columns}


def rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
