"""Taking a lost stream up again: where it may be, and what may come of it."""

from __future__ import annotations

from fastar_client.errors import (
    FastarError,
    NotFound,
    ResourceExhausted,
    ServerUnavailable,
    StreamLost,
    TakenOver,
    TimedOut,
)
from fastar_client.protocol import POD_HEADER


class Elsewhere(Exception):
    """The server went on from the state before `chunk`, which took `received` controls; our request did not fit it."""

    def __init__(self, chunk: int, received: int | None) -> None:
        self.chunk, self.received = chunk, received  # received: None where it is not known


class Diverged(StreamLost):
    """The chunks made again are not those that were lost."""


class Pin:
    """The server behind a gateway that has the stream, once it is known. A new stream names none, and so goes where
    there is room; one that was lost goes back to its server, and from one that is gone, full or drains, to any."""

    def __init__(self) -> None:
        self._pod: str | None = None

    def note(self, pod: str | None) -> None:
        """pod: of a reply; a gateway that took us where we wanted says nothing."""
        self._pod = pod or self._pod

    def leave(self) -> None:
        self._pod = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self._pod is None else {POD_HEADER: self._pod}


def may_pass(error: FastarError) -> bool:
    """Whether what keeps a stream from being resumed may be over soon."""
    if isinstance(error, NotFound):  # of the model while the server starts; or of the stream, for good
        return str(error).startswith("model:")
    transient = (StreamLost, ServerUnavailable, TimedOut, ResourceExhausted)
    return isinstance(error, transient) and not isinstance(error, TakenOver | Diverged)
