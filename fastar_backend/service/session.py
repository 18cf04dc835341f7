"""What a client asks, what it gets, and what the service knows of one stream beside the engine's state of it."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from fastar_backend.config import Config, parse
from fastar_backend.engine.stream import StreamOptions
from fastar_backend.errors import FastarError, InvalidInput
from fastar_backend.service.admission import Booking
from fastar_backend.service.schedule import Playout
from fastar_backend.service.store import FIRST_EPOCH

Encoding = Literal["raw", "jpeg", "h264"]
KINDS = ("action", "prompt", "fps", "density", "seed", "encoding", "pause", "snapshot", "rewind")
MOST_BLEND_CHUNKS = 64
TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


class At(Config):
    """A state of the stream that has this token: the newest whose next chunk is not later than `chunk`."""

    token: str = Field(min_length=16, max_length=128)
    chunk: int | None = Field(None, ge=0, lt=2**53)


class StartOptions(StreamOptions):
    """The OPTIONS tensor: docs/structure.md."""

    fps: float | None = Field(None, gt=0, allow_inf_nan=False)
    encoding: Encoding = "raw"
    resume: At | None = None
    fork: At | None = None

    @model_validator(mode="after")
    def _own_state(self) -> StartOptions:
        if self.resume and self.fork:
            raise ValueError("resume and fork exclude each other")
        fixed = {"start", "attention", "measure_recall"} | ({"seed"} if self.resume else set())
        if (self.resume or self.fork) and (given := fixed & self.model_fields_set):
            raise ValueError(f"{', '.join(sorted(given))}: the stream's own, not to be given with resume or fork")
        return self

    @property
    def source(self) -> At | None:
        return self.resume or self.fork


@dataclasses.dataclass(frozen=True)
class Reply:
    """To one request: an error, or STATS with the frames of a chunk (raw) or their packets."""

    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    frames: np.ndarray | None = None  # uint8 [frames, height, width, 3]
    video: bytes = b""
    error: FastarError | None = None


@dataclasses.dataclass
class Request:
    """One request as it arrived. Exactly one `reply` answers it."""

    stream_id: int
    answer: Callable[[Reply], None]
    actions: tuple[str, ...] = ("",)
    prompt: str = ""
    options: str = ""
    control: str | None = None
    starts: bool = False
    ends: bool = False
    tenant: str = "default"
    traceparent: str | None = None
    cancelled: Callable[[], bool] = lambda: False
    migrates: bool = False  # the client knows what STATS.migrate asks of it
    arrived: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def generates(self) -> bool:
        return self.actions != ("end",) and self.control is None


@dataclasses.dataclass(frozen=True)
class Control:
    """A control that was taken and waits for its chunk. value: for `rewind`, a future of the snapshot's bytes."""

    id: int
    kind: str
    value: Any
    blend_chunks: int = 0

    @property
    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, self.kind: self.value} | (
            {"blend_chunks": self.blend_chunks} if self.blend_chunks else {}
        )


class Session:
    """One stream. Guarded by the service's lock."""

    def __init__(
        self, request: Request, stream: int, token: str | None, options: StartOptions, booking: Booking
    ) -> None:
        self.id, self.tenant, self.stream = request.stream_id, request.tenant, stream
        self.token = token or secrets.token_urlsafe(32)
        self.booking = booking
        self.snapshots_allowed = not options.measure_recall
        self.opened = self.seen = time.monotonic()
        self.pending: deque[Request] = deque()
        self.running: Request | None = None  # its chunk is being made
        self.playout = Playout(options.fps)
        self.encoding: str = options.encoding
        self.encoder: Any = None
        self.next_control = 1
        self.controls: deque[Control] = deque()  # taken, not yet in effect
        self.allowance = 1.0  # of controls, as a share of a second's worth
        self.paused_at: float | None = None
        self.stored: set[int] = set()  # chunks before which a snapshot was taken that is safely stored
        self.saving = 0  # snapshots on their way to the store
        self.epoch: int | None = FIRST_EPOCH  # of us as its owner, in the store; None: still to be claimed,
        self.taken_at = 0  # from the state before this chunk
        self.fenced = False  # a snapshot was refused: another server has taken the stream over
        self.migrates = request.migrates
        self.resumed = options.resume is not None
        self.trace: Any = None
        self.began = self.due = 0.0  # of the running chunk
        self.applied: list[int] = []  # controls that took effect with the next chunk, or the running one
        self.window = (self.opened, 0)  # start and frames of the current measurement of FPS

    @property
    def fps(self) -> float | None:
        return self.booking.fps

    @property
    def waits(self) -> bool:
        """Something is to be done for it: a chunk request is there, and nothing holds it back."""
        if self.running or not self.pending or self.paused_at is not None:
            return False
        first = next((control for control in self.controls if control.kind == "rewind"), None)
        return first is None or first.value.done()

    @property
    def deadline(self) -> float:
        return self.playout.deadline(self.pending[0].arrived)

    def extra(self) -> dict[str, Any]:
        """What a snapshot holds of it, beside the engine's state."""
        return {
            "tenant": self.tenant, "fps": self.fps, "encoding": self.encoding, "next_control": self.next_control,
            "applied": self.applied,
            "controls": [c.as_json for c in self.controls if c.kind not in ("rewind", "snapshot", "pause")],
        }  # fmt: skip

    def adopt(self, extra: dict[str, Any]) -> None:
        """Takes over what `extra` says, from a snapshot of this stream."""
        self.next_control, self.applied = extra["next_control"], list(extra["applied"])
        self.controls = deque(control for values in extra["controls"] if (control := read_control(values)))


def read_control(values: dict[str, Any]) -> Control | None:
    """A CONTROL object; None for a keepalive. Raises InvalidInput. What its value may be, the service checks."""
    if not values:
        return None
    number, blend = values.get("id"), values.get("blend_chunks", 0)
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 2**53:
        raise InvalidInput("CONTROL.id", f"got {number!r:.40}", "1, 2, 3, ... in order")
    kinds = [key for key in values if key not in ("id", "blend_chunks")]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise InvalidInput(
            "CONTROL", f"has {', '.join(f'{k:.20}' for k in kinds[:4]) or 'nothing'}", f"one of {', '.join(KINDS)}"
        )
    if not isinstance(blend, int) or isinstance(blend, bool) or not 0 <= blend <= MOST_BLEND_CHUNKS:
        raise InvalidInput("CONTROL.blend_chunks", f"got {blend!r:.40}", f"1..{MOST_BLEND_CHUNKS}")
    if blend and kinds[0] != "prompt":
        raise InvalidInput("CONTROL.blend_chunks", f"stands beside {kinds[0]}", "beside prompt only")
    return Control(number, kinds[0], values[kinds[0]], blend)


def json_object(text: str, field: str) -> dict[str, Any]:
    """`text` as a JSON object ("" = {}); raises InvalidInput."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise InvalidInput(field, "not JSON", "a JSON object, or an empty string for the defaults") from None
    if not isinstance(values, dict):
        raise InvalidInput(field, f"JSON {type(values).__name__}", "a JSON object") from None
    return values


def read_options(text: str) -> StartOptions:
    return parse(StartOptions, json_object(text, "OPTIONS"), "OPTIONS")


def check_tenant(tenant: str) -> None:
    if not TENANT.fullmatch(tenant):
        raise InvalidInput("x-fastar-tenant", f"got {tenant!r:.40}", "1..64 of A-Z a-z 0-9 . _ -")
