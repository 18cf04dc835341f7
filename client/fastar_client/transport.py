"""How requests and replies travel: over gRPC to Triton, or in memory to a scripted server (for tests).

A transport opens one `Call` per video stream: a bidirectional stream of requests and replies, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Protocol

import grpc
import numpy as np
from tritonclient.grpc import InferInput, InferResult, KeepAliveOptions
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from fastar_client.errors import (
    FastarError,
    ServerError,
    ServerUnavailable,
    StreamLost,
    from_grpc,
    from_server,
    invalid,
)
from fastar_client.protocol import ACTIONS, FRAMES, MODEL, OPTIONS, PROMPT, STATS, ChunkRequest, Reply


class Call(Protocol):
    """One bidirectional stream. Everything but `receive` returns at once."""

    def send(self, request: ChunkRequest) -> None: ...

    def half_close(self) -> None:
        """No more requests will follow. May be called again."""

    async def receive(self) -> Reply | FastarError | None:
        """The next reply, or the error that answers one request, or None when the server has finished.

        Raises a FastarError when the call itself is lost. Must not be cancelled while the call is wanted.
        """

    def cancel(self) -> None:
        """Drop the call at once."""


class Transport(Protocol):
    url: str

    async def connect(self, timeout: float) -> None:
        """Raises ServerUnavailable when no live Triton server answers within `timeout` seconds."""

    async def ready(self, timeout: float) -> bool:
        """Whether server and model are ready for streams. Raises ServerUnavailable, TimedOut."""

    def open(self) -> Call: ...

    async def close(self) -> None: ...


class GrpcTransport:
    """Triton's KServe v2 gRPC, model `fastar`, RPC ModelStreamInfer."""

    def __init__(self, url: str) -> None:
        self.url = url.removeprefix("grpc://")
        if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d{1,5}", self.url):
            raise invalid("url", url, "host:port of Triton's gRPC port, e.g. localhost:8001")
        self._client: InferenceServerClient | None = None

    async def connect(self, timeout: float) -> None:
        # Pings keep an idle stream's connection open through load balancers. gRPC servers, Triton's among them, drop a
        # client that pings more often than every 300 s on an idle stream; a vanished server is found by our own
        # response time-out. Message sizes need no option: tritonclient's defaults are gRPC's maximum.
        self._client = InferenceServerClient(
            self.url,
            keepalive_options=KeepAliveOptions(keepalive_time_ms=305_000, keepalive_timeout_ms=20_000),
        )
        try:
            await self._ask(self._client.is_server_live, timeout)
        except FastarError:
            await self.close()
            raise

    async def ready(self, timeout: float) -> bool:
        client = self._connected()
        server = await self._ask(client.is_server_ready, timeout)
        return server and await self._ask(lambda **options: client.is_model_ready(MODEL, **options), timeout)

    def open(self) -> Call:
        return GrpcCall(self._connected(), self.url)

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    def _connected(self) -> InferenceServerClient:
        if self._client is None:
            raise ServerUnavailable(f"not connected to {self.url}: use `async with connect(url) as c:`")
        return self._client

    async def _ask(self, question: Callable[..., Awaitable[object]], timeout: float) -> bool:
        try:
            return bool(await question(client_timeout=timeout))
        except InferenceServerException as error:
            code, details = str(error.status()).rpartition(".")[2], str(error.message())
            if code == "NOT_FOUND":
                return False
            if code == "DEADLINE_EXCEEDED":
                raise ServerUnavailable(f"{self.url}: no Triton server answered within {timeout:g} s") from None
            failure = from_grpc(code, details, self.url)
            if isinstance(failure, StreamLost):  # nothing was streaming yet
                failure = ServerUnavailable(f"no Triton server answers at {self.url} ({code}: {details})")
            raise failure from None


class GrpcCall:
    def __init__(self, client: InferenceServerClient, url: str) -> None:
        self._url = url
        self._outbox: asyncio.Queue[ChunkRequest | None] = asyncio.Queue()
        self._cancelled = False
        self._streaming = False
        self._replies = client.stream_infer(self._requests())

    def send(self, request: ChunkRequest) -> None:
        self._outbox.put_nowait(request)

    def half_close(self) -> None:
        self._outbox.put_nowait(None)

    async def receive(self) -> Reply | FastarError | None:
        try:
            result, error = await anext(self._replies)
        except StopAsyncIteration:
            return None
        except grpc.aio.AioRpcError as error:
            code, details = error.code().name, error.details() or "no details"
            raise from_grpc(code, details, self._url, self._streaming) from None
        except asyncio.CancelledError:
            # grpc.aio raises this also in a task that nobody cancelled, when the connection is closed under the call.
            task = asyncio.current_task()
            if self._cancelled or (task is not None and task.cancelling()):
                raise
            raise from_grpc("CANCELLED", "the call was cancelled", self._url, self._streaming) from None
        self._streaming = True
        return from_server(error.message()) if error is not None else decode(result)

    def cancel(self) -> None:
        self._cancelled = True
        self._replies.cancel()

    async def _requests(self) -> AsyncIterator[dict[str, object]]:
        while (request := await self._outbox.get()) is not None:
            yield encode(request)


def encode(request: ChunkRequest) -> dict[str, object]:
    """`request` as the arguments of tritonclient's stream_infer."""
    inputs = []
    for name, values in ((ACTIONS, request.actions), (PROMPT, (request.prompt,)), (OPTIONS, (request.options,))):
        tensor = InferInput(name, [1, len(values)], "BYTES")
        tensor.set_data_from_numpy(np.array([[value.encode() for value in values]], dtype=np.object_))
        inputs.append(tensor)
    arguments: dict[str, object] = {
        "model_name": MODEL,
        "inputs": inputs,
        "sequence_id": request.sequence_id,
        "sequence_start": request.start,
        "sequence_end": request.end,
    }
    if request.queue_seconds is not None:
        arguments["timeout"] = int(request.queue_seconds * 1e6)  # microseconds
    return arguments


def decode(result: InferResult) -> Reply | ServerError:
    """The two outputs; a ServerError (as a value: the call itself goes on) where they are absent or truncated."""
    arrays = {}
    for name in (FRAMES, STATS):
        try:
            arrays[name] = result.as_numpy(name)
        except ValueError as error:  # fewer bytes than the shape says
            return ServerError(f"{name}: the reply's bytes do not fit its shape ({error})")
        if arrays[name] is None:
            return ServerError(f"{name}: missing from the server's reply")
    return Reply(arrays[FRAMES], arrays[STATS])


# A scripted server: gets the requests of one stream, yields its replies; what it raises breaks the connection.
Script = Callable[[AsyncIterator[ChunkRequest]], AsyncGenerator[Reply | FastarError, None]]


class MockTransport:
    """A server in memory, for tests: `serve` is called once per stream, with the requests as they come."""

    def __init__(self, serve: Script, url: str = "mock:0", live: bool = True, ready: bool = True) -> None:
        self.url, self._serve, self._live, self._ready = url, serve, live, ready

    async def connect(self, timeout: float) -> None:
        if not self._live:
            raise ServerUnavailable(f"no Triton server at {self.url}; start one with `fastar serve`")

    async def ready(self, timeout: float) -> bool:
        return self._ready

    def open(self) -> Call:
        return MockCall(self._serve)

    async def close(self) -> None:
        pass


class MockCall:
    def __init__(self, serve: Script) -> None:
        self._inbox: asyncio.Queue[ChunkRequest | None] = asyncio.Queue()
        self._outbox: asyncio.Queue[Reply | FastarError | None] = asyncio.Queue()
        self._lost: StreamLost | None = None
        self._server = asyncio.ensure_future(self._run(serve))

    def send(self, request: ChunkRequest) -> None:
        self._inbox.put_nowait(request)

    def half_close(self) -> None:
        self._inbox.put_nowait(None)

    async def receive(self) -> Reply | FastarError | None:
        item = await self._outbox.get()
        if item is None and self._lost is not None:
            raise self._lost
        return item

    def cancel(self) -> None:
        self._server.cancel()

    async def _run(self, serve: Script) -> None:
        try:
            async with contextlib.aclosing(serve(self._requests())) as replies:
                async for reply in replies:
                    self._outbox.put_nowait(reply)
        except Exception as error:
            self._lost = StreamLost(f"connection to the scripted server lost ({error!r})")
        self._outbox.put_nowait(None)

    async def _requests(self) -> AsyncIterator[ChunkRequest]:
        while (request := await self._inbox.get()) is not None:
            yield request
