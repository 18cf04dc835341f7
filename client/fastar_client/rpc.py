"""What tritonclient does not tell of the gRPC call under a stream: its headers, and how it ended.

A server that breaks a call sends a status. A request that is just then written fails, and for that grpc.aio puts a
status of its own (`WRITE_FAILED`) in the place of the server's, be it before or after that has come
(https://github.com/grpc/grpc/issues/36066), and writes no more. So what a call says of its end depends on which was
noticed last; what an `Ending` says does not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import grpc

from fastar_client.protocol import POD_HEADER

Status = tuple[str, str]  # name of a grpc.StatusCode, details

WRITE_FAILED: Status = ("INTERNAL", "Internal error from Core")
# For so long the server's status is awaited once a write has failed and the replies have ended.
STATUS_SECONDS = 1.0


def call_of(replies: Any) -> Any:
    """The grpc.aio call behind the replies of tritonclient's stream_infer, which has no public way to it. None: not
    found; then streams are resumed wherever a gateway likes, and a failed write may hide what the server said."""
    return getattr(replies, "_grpc_call", None)


async def named_pod(replies: Any) -> str | None:
    """The pin that a gateway put into the headers of a call, once a reply has come."""
    call = call_of(replies)
    headers = dict(await call.initial_metadata()) if call is not None else {}
    return headers.get(POD_HEADER)


class Ending:
    """Watches how the call of `replies` ends. Keeps no reference to it, as gRPC keeps the TCP connection with it."""

    def __init__(self, replies: Any) -> None:
        self._first: Status | None = None
        if (call := call_of(replies)) is not None:
            call.add_done_callback(self._note)

    async def status(self, replies: Any, raised: grpc.aio.AioRpcError) -> Status:
        """The server's status, or gRPC's own where the server has sent none. raised: by the end of the replies."""
        latest = (raised.code().name, raised.details() or "")
        call, deadline = call_of(replies), time.monotonic() + STATUS_SECONDS
        while self._first == WRITE_FAILED == latest and call is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
            latest = status_now(call)
        return latest if self._first in (None, WRITE_FAILED) else self._first

    def _note(self, call: Any) -> None:
        if self._first is None:
            self._first = status_now(call)


def status_now(call: Any) -> Status:
    """Of a call that has ended."""
    return at_once(call.code()).name, at_once(call.details()) or ""


def at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for, where we cannot wait: meanwhile it could change."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    raise RuntimeError("it waits")
