"""Every error a caller can meet. `code` is the KServe/gRPC status name that the edge puts before the message."""

from __future__ import annotations


class FastarError(Exception):
    """Base of all errors raised on purpose by this package. `str(error)` is one line, fit for a user."""

    code = "INTERNAL"


class InvalidInput(FastarError):
    """A value that the caller controls is out of what is allowed."""

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, problem: str, allowed: str) -> None:
        super().__init__(f"{field}: {problem}; allowed: {allowed}")
        self.field = field


class UnknownStream(FastarError):
    """The stream id was never opened, has ended, or idled out."""

    code = "NOT_FOUND"


class AtCapacity(FastarError):
    """No slot, memory or time is left for another stream. reason: one word, for metrics."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, reason: str = "streams") -> None:
        super().__init__(message)
        self.reason = reason


class Stopping(FastarError):
    """The server takes no new work."""

    code = "UNAVAILABLE"


class Superseded(FastarError):
    """Another sequence took the stream over."""

    code = "CANCELLED"


class WeightsError(FastarError):
    """A checkpoint is missing, corrupt, or does not fit its configuration."""

    code = "FAILED_PRECONDITION"


class SnapshotError(FastarError):
    """A snapshot is torn, of another version or of another world."""

    code = "FAILED_PRECONDITION"
