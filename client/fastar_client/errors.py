"""Every exception of this package. `str(error)` is one line: what went wrong, where, and what is allowed or to be done.

FastarError
├── InvalidArgument     a value of yours is out of range; `error.field` names it (also raised before anything is sent)
├── NotFound            the server does not know this model, or no longer knows this stream (idle too long)
├── ResourceExhausted   no slot or memory is left for another stream
├── ServerUnavailable   nothing listens there, it is not (yet) a ready Triton server, or it broke before it answered
├── StreamLost          the connection broke, or the server died, while the stream was running, and it did not come back
│   └── TakenOver       another connection has resumed this stream
├── ServerError         the server failed, or broke the protocol
├── TimedOut            the server did not answer in time
└── OutputError         a file cannot be written (disk full, no permission)
"""

from __future__ import annotations

import re


class FastarError(Exception):
    """Base of every error raised on purpose by this package."""

    token: str | None = None  # of the stream that it ended, where the stream may be resumed later,
    chunk: int | None = None  # and the number of the chunk that would have been next
    broke_off = False  # the connection broke before an answer: that alone does not say that the server is gone

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class InvalidArgument(FastarError):
    @property
    def field(self) -> str:
        """The offending argument, e.g. "prompt" or "attention.kind"."""
        return str(self).partition(":")[0]


class NotFound(FastarError):
    pass


class ResourceExhausted(FastarError):
    pass


class ServerUnavailable(FastarError):
    pass


class StreamLost(FastarError):
    pass


class TakenOver(StreamLost):
    pass


class ServerError(FastarError):
    pass


class TimedOut(FastarError):
    pass


class OutputError(FastarError):
    pass


def invalid(field: str, got: object, allowed: str) -> InvalidArgument:
    """The one form of every argument error. `got` is shown shortened."""
    shown = repr(got)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return InvalidArgument(f"{field}: got {shown}; allowed: {allowed}")


BY_CODE: dict[str, type[FastarError]] = {
    "INVALID_ARGUMENT": InvalidArgument,
    "NOT_FOUND": NotFound,
    "RESOURCE_EXHAUSTED": ResourceExhausted,
    "UNAVAILABLE": ServerUnavailable,
    "DEADLINE_EXCEEDED": TimedOut,
    "FAILED_PRECONDITION": ServerError,
    "CANCELLED": TakenOver,
    "INTERNAL": ServerError,
}
# Anywhere in the message, as Triton puts words of its own before a model's.
CODED = re.compile(rf"\b({'|'.join(BY_CODE)}): (.+)", re.DOTALL)

# What Triton itself says, before the model sees the request; the first pattern that matches decides.
TRITON: list[tuple[str, type[FastarError], str]] = [
    (
        r"must specify the START flag",
        NotFound,
        "stream: the server does not know this stream (never started, idle too long, or the server restarted); "
        "open a new one",
    ),
    (
        r"unknown model|model .{1,80} (is not found|not found|is not ready)|no version is available",
        NotFound,
        "model: this Triton server has no ready model of that name; start one with `fastar serve`",
    ),
    (
        r"timeout expired|maximum queue size",
        ResourceExhausted,
        "stream: no free slot on the server in time; try again later, or raise max_streams on the server",
    ),
    (
        r"stub process .* (not healthy|failed)",
        StreamLost,
        "stream: the server's model process died; open a new stream",
    ),
    (
        r"server is stopping|stopped accepting|is shutting down|is being unloaded",
        ServerUnavailable,
        "server: shutting down, takes no new streams; try again later",
    ),
    (
        r"data-?type|unexpected (shape|input)|shape|expected \d+ inputs|batch-size|must specify a non-zero",
        InvalidArgument,
        "request: refused by Triton; client and server speak different versions of the protocol",
    ),
]


def from_server(message: str) -> FastarError:
    """The exception for a reply's error message: the model's `CODE: field: what`, or Triton's own words."""
    if coded := CODED.search(message):
        return BY_CODE[coded[1]](coded[2])
    message = re.sub(r"^\[request id: [^]]*\] |[.]? NOTE: .*|[.]$", "", message, flags=re.DOTALL)
    for pattern, kind, meaning in TRITON:
        if re.search(pattern, message, re.IGNORECASE | re.DOTALL):
            return kind(f"{meaning} (Triton: {message})")
    return ServerError(f"server: {message}; its log tells more")


# A call that breaks: which of these it gets is a matter of where and when the break is noticed.
BROKEN = ("UNAVAILABLE", "CANCELLED", "INTERNAL", "UNKNOWN", "ABORTED")
# What gRPC says of its own connection; what a gateway says of a server behind it has other words.
BROKE_OFF = r"stream removed|socket closed|connection reset by peer|broken pipe|goaway"


def from_grpc(code: str, details: str, url: str, streaming: bool = False) -> FastarError:
    """The exception for a failed gRPC call. code: name of a grpc.StatusCode; streaming: replies had come already.
    Of `details` the words may depend, never the class."""
    if code == "UNIMPLEMENTED":
        return ServerUnavailable(f"{url}: speaks gRPC, but is no Triton server; give Triton's gRPC port, usually 8001")
    if code == "DEADLINE_EXCEEDED":
        return TimedOut(f"{url}: no answer in time; is the server overloaded or hung?")
    if code not in BROKEN:
        return BY_CODE.get(code, ServerError)(f"{url}: {details}")
    cause = f"gRPC: {'cancelled by the server' if code == 'CANCELLED' else code}: {details}"
    if streaming:
        what = f"stream from {url} lost: the server or the connection broke it off"
        return StreamLost(f"{what}; the frames received so far are complete, open a new stream ({cause})")
    if re.search(r"http1\.x|http/1|HTTP2 status|Expected SETTINGS", details, re.IGNORECASE):
        return ServerUnavailable(f"{url}: does not speak gRPC; give Triton's gRPC port, usually 8001")
    if re.search(r"handshak|certificate|SSL|TLS", details):
        return ServerUnavailable(f"{url}: no TLS with this server ({details}); check both ends' certificates")
    if re.search(r"failed to connect|refused|DNS|resol|no route|unreachable|timed out", details, re.IGNORECASE):
        return ServerUnavailable(f"no Triton server at {url}; start one with `fastar serve`")
    what = f"no answer from a Triton server at {url}"
    error = ServerUnavailable(f"{what}; start one with `fastar serve`, or see its log ({cause})")
    error.broke_off = re.search(BROKE_OFF, details, re.IGNORECASE) is not None
    return error
