"""Controls of a running stream, and what becomes of them: received, refused, applied.

A control's id is its place among the stream's controls: 1, 2, 3, ... The server consumes each id once, so a control
that may have been lost is sent again under its own id. Ids are kept for ever: where a stream is replayed, those of
controls that must not take effect again (refused ones, and what a rewind has undone) are consumed by `filler`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import deque
from collections.abc import Mapping
from typing import Any

from fastar_client.errors import FastarError, ResourceExhausted, ServerError, StreamLost, from_server
from fastar_client.protocol import ControlReply

REPLAYED = ("prompt", "density", "seed")  # kinds that change what is generated from then on
NOT_KEPT = ("snapshot", "rewind", "pause")  # kinds that a snapshot does not hold, if they were taken before it


class Receipt:
    """Of one control, or of what was changed before the stream began (id 0). Its errors never end the stream."""

    def __init__(self, id: int = 0) -> None:
        self.id = id
        # In the loop of the stream. Errors count as retrieved: who never asks is not to be bothered with them.
        self._received: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._applied: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def received(self) -> None:
        """Returns when the server has the control. Raises what it was refused with (InvalidArgument,
        ResourceExhausted, ...), or StreamLost when the stream ended first."""
        await asyncio.shield(self._received)

    async def applied(self) -> int:
        """The number of the first chunk that obeys, when that chunk has come. Raises as `received`."""
        return await asyncio.shield(self._applied)

    def _resolve(self, chunk: int | None = None) -> None:
        if not self._received.done():
            self._received.set_result(None)
        if chunk is not None and not self._applied.done():
            self._applied.set_result(chunk)

    def _fail(self, error: FastarError) -> None:
        for future in (self._received, self._applied):
            if not future.done():
                future.set_exception(error)
                future.exception()


@dataclasses.dataclass(eq=False)
class Control:
    """kind: as on the wire; value, blend_chunks: likewise."""

    id: int
    kind: str
    value: Any
    blend_chunks: int | None
    receipt: Receipt
    chunk: int | None = None  # that it was applied with

    def as_dict(self) -> dict[str, Any]:
        blend = {} if self.blend_chunks is None else {"blend_chunks": self.blend_chunks}
        return {"id": self.id, self.kind: self.value} | blend


class Controls:
    """All controls of one stream that are not yet forgotten, by id."""

    def __init__(self) -> None:
        self.last = 0  # highest id given
        self._by_id: dict[int, Control] = {}
        self._early: list[Receipt] = []  # of changes that the start carries
        self._ended: FastarError | None = None  # what becomes of a control from now on
        self._unanswered: deque[int | None] = deque()  # ids sent in this call, oldest first; None: a keepalive

    @property
    def answered(self) -> bool:
        """Whether nothing that was sent in this call waits for its reply."""
        return not self._unanswered

    def early(self) -> Receipt:
        receipt = Receipt()
        self._early.append(receipt)
        if self._ended is not None:
            receipt._fail(self._ended)
        return receipt

    def add(self, kind: str, value: Any, blend_chunks: int | None = None) -> Control:
        self.last += 1
        control = self._by_id[self.last] = Control(self.last, kind, value, blend_chunks, Receipt(self.last))
        if self._ended is not None:
            control.receipt._fail(self._ended)
        return control

    def get(self, id: int) -> Control | None:
        return self._by_id.get(id)

    def sent(self, id: int | None) -> None:
        self._unanswered.append(id)

    def new_call(self) -> None:
        self._unanswered.clear()

    def take_receipt(self, reply: ControlReply) -> FastarError | None:
        """Resolves the oldest unanswered control; returns what it was refused with. Raises ServerError."""
        if not self._unanswered or self._unanswered[0] != reply.id:
            due = self._unanswered[0] if self._unanswered else "none"
            raise ServerError(f"stream: the receipt of control {reply.id} came where that of {due} was due")
        self._unanswered.popleft()
        control = None if reply.id is None else self._by_id.get(reply.id)
        error = from_server(reply.error) if reply.error is not None else None
        if control is None or control.chunk is not None:  # a keepalive or filler; or one that is replayed
            return error
        if error is None:
            control.receipt._resolve()
        else:
            del self._by_id[control.id]
            control.receipt._fail(error)
        return error

    def apply(self, ids: tuple[int, ...], chunk: int) -> list[Control]:
        """Those of `ids` that took effect with `chunk` for the first time. Resolves their receipts."""
        while self._early:
            self._early.pop()._resolve(chunk)
        applied = [c for id in ids if (c := self._by_id.get(id)) is not None and c.chunk is None]
        for control in applied:
            control.chunk = chunk
            control.receipt._resolve(chunk)
        return applied

    def begin_at(self, received: int) -> None:
        """Of a stream that goes on from another life: ids up to `received` are taken. Shifts those given already."""
        if received:
            waiting, self._by_id = list(self._by_id.values()), {}
            self.last = received
            self.requeue(waiting)

    def open(self, received: int) -> list[Control]:
        """Those up to `received` of which no chunk has told that they took effect."""
        return [c for c in self._by_id.values() if c.chunk is None and c.id <= received]

    def rewind(self) -> Control | None:
        """The newest rewind that has not taken effect yet."""
        return next((c for c in reversed(self._by_id.values()) if c.chunk is None and c.kind == "rewind"), None)

    def requeue(self, controls: list[Control]) -> None:
        """Gives `controls` the next ids."""
        for control in controls:
            self._by_id.pop(control.id, None)
            self.last += 1
            control.id = control.receipt.id = self.last
            self._by_id[self.last] = control

    def to_replay(self, ids: tuple[int, ...], received: int) -> list[int]:
        """Those of a chunk's applied controls that must precede it again, after a server that took `received`. What
        the others did is in the chunk's own request, in the options of the resume, or undone."""
        return [id for id in ids if id > received and (c := self._by_id.get(id)) and c.kind in REPLAYED]

    def message(self, id: int, again: bool = False) -> str:
        """CONTROL of `id`; a filler where it was refused, or applied and is not to be `again`."""
        control = self._by_id.get(id)
        if control is None or (control.chunk is not None and not again):
            return filler(id)
        return json.dumps(control.as_dict(), allow_nan=False)

    def forget(self, id: int) -> None:
        """Drops what was applied, up to `id`."""
        for number in [n for n, c in self._by_id.items() if n <= id and c.chunk is not None]:
            del self._by_id[number]

    def end(self, error: BaseException | None) -> None:
        """The stream is over: what is open will not happen."""
        ended = StreamLost("control: the stream ended before it took effect")
        told = self._ended = error if isinstance(error, FastarError) else ended
        for receipt in [*self._early, *(control.receipt for control in self._by_id.values())]:
            receipt._fail(told)


def filler(id: int) -> str:
    """A control that consumes its id and nothing else, as it is refused for its value."""
    return json.dumps({"id": id, "snapshot": False})


def is_busy(error: FastarError | None) -> bool:
    """Whether a control was refused only because there were too many at once."""
    return isinstance(error, ResourceExhausted)


def described(controls: list[Control]) -> tuple[Mapping[str, Any], ...]:
    return tuple(control.as_dict() for control in controls)
