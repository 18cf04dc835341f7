"""How requests and replies travel: over gRPC to Triton, or in memory to a scripted server (for tests).

A transport opens one `Call` per video stream: a bidirectional stream of requests and replies, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
from tritonclient.grpc import InferInput, InferResult
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
from fastar_client.protocol import (
    ACTIONS,
    CONTROL,
    CONTROL_ACTION,
    END_ACTION,
    FRAMES,
    MODEL,
    OPTIONS,
    PROMPT,
    STATS,
    VIDEO,
    ChunkRequest,
    Reply,
)
from fastar_client.rpc import Ending, named_pod
from fastar_client.shared import Ring, check_same_host

# Pings keep an idle stream's connection open through load balancers. gRPC servers, Triton's among them, drop a client
# that pings more often than every 300 s on an idle stream; a vanished server is found by our own response time-out.
# No pool of subchannels: the back-off of a connection that failed must not delay a stream that connects anew.
CHANNEL = [
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.keepalive_time_ms", 305_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclasses.dataclass(frozen=True)
class TlsFiles:
    """PEM files of a TLS connection. What is None: the system's authorities; no certificate of our own."""

    ca: str | Path | None = None  # authorities that the server's certificate is checked against
    certificate: str | Path | None = None  # our own, with its chain,
    key: str | Path | None = None  # and its key

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises InvalidArgument where a file cannot be read or is no PEM."""
        if (self.certificate is None) != (self.key is None):
            raise invalid("tls.key", self.key, "certificate and key together, or neither")
        return grpc.ssl_channel_credentials(
            *(read_pem(f"tls.{name}", getattr(self, name)) for name in ("ca", "key", "certificate"))
        )


def read_pem(field: str, path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise invalid(field, str(path), f"a readable PEM file ({error.strerror})") from None
    if b"-----BEGIN " not in content:
        raise invalid(field, str(path), "a PEM file (this one has no -----BEGIN line)")
    return content


class Call(Protocol):
    """One bidirectional stream. Everything but `receive`, `share` and `close` returns at once."""

    url: str  # of the server it goes to
    pod: str | None  # how a gateway names the server behind it, where it does: from the first reply on

    def send(self, request: ChunkRequest) -> None: ...

    def half_close(self) -> None:
        """No more requests will follow. May be called again."""

    async def receive(self) -> Reply | FastarError | None:
        """The next reply, or the error that answers one request, or None when the server has finished.

        Raises a FastarError when the call itself is lost. Must not be cancelled while the call is wanted.
        """

    def cancel(self) -> None:
        """Drop the call at once."""

    async def share(self, size: int) -> None:
        """Lets chunks' frames (at most `size` bytes each) come through shared memory, where the transport is meant to.
        Raises InvalidArgument where that is impossible."""

    async def close(self) -> None:
        """Cancels the call and releases what it holds. May be called again."""


class Transport(Protocol):
    url: str  # of the server that the next call goes to
    shares_memory: bool

    async def connect(self, timeout: float) -> None:
        """Raises ServerUnavailable when no live Triton server answers within `timeout` seconds."""

    async def ready(self, timeout: float) -> bool:
        """Whether server and model are ready for streams. Raises ServerUnavailable, TimedOut."""

    def open(self, metadata: Mapping[str, str] | None = None, fresh: bool = False) -> Call:
        """A call with these headers. fresh: over a connection of its own, as the common one may be broken."""

    def leave(self, call: Call) -> None:
        """The server of `call` drains, is gone or refuses: the next call goes to another one, where one is known."""

    async def close(self) -> None: ...


class GrpcTransport:
    """Triton's KServe v2 gRPC, model `fastar`, RPC ModelStreamInfer. Raises InvalidArgument.

    url: host:port, or several joined by commas: servers that share their snapshots, so that a stream may go on at any.
    """

    def __init__(self, url: str, tls: bool | TlsFiles = False, shared_memory: bool = False) -> None:
        self._urls = [part.strip().removeprefix("grpc://") for part in url.split(",")]
        if not all(re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d{1,5}", part) for part in self._urls):
            raise invalid("url", url, "host:port of Triton's gRPC port, e.g. localhost:8001; several joined by commas")
        self.url = self._urls[0]
        if not isinstance(tls, bool | TlsFiles):
            raise invalid("tls", tls, "True, False or TlsFiles(ca=..., certificate=..., key=...)")
        self._credentials = (TlsFiles() if tls is True else tls).credentials() if tls else None
        self.shares_memory = shared_memory
        if shared_memory:
            for part in self._urls:
                check_same_host(part)
        self._client: InferenceServerClient | None = None  # the common one, to
        self._client_url = self.url
        self._left: list[InferenceServerClient] = []  # of servers that were left: their calls may still run

    async def connect(self, timeout: float) -> None:
        for last in [False] * (len(self._urls) - 1) + [True]:
            self._client, self._client_url = self._new_client(), self.url
            try:
                await self._ask(self._client.is_server_live, timeout)
                return
            except FastarError:
                await self.close()
                if last:
                    raise
                self._next()

    async def ready(self, timeout: float) -> bool:
        client = self._connected()
        server = await self._ask(client.is_server_ready, timeout)
        return server and await self._ask(lambda **options: client.is_model_ready(MODEL, **options), timeout)

    def open(self, metadata: Mapping[str, str] | None = None, fresh: bool = False) -> Call:
        client = self._connected()
        return GrpcCall(self._new_client() if fresh else client, self, metadata or {}, own=fresh)

    def leave(self, call: Call) -> None:
        if call.url == self.url:
            self._next()

    def _next(self) -> None:
        self.url = self._urls[(self._urls.index(self.url) + 1) % len(self._urls)]

    def _new_client(self) -> InferenceServerClient:
        return InferenceServerClient(self.url, creds=self._credentials, channel_args=CHANNEL)

    async def close(self) -> None:
        if self._client is not None:
            clients, self._client, self._left = [self._client, *self._left], None, []
            for client in clients:
                await client.close()

    def _connected(self) -> InferenceServerClient:
        if self._client is None:
            raise ServerUnavailable(f"not connected to {self.url}: use `async with connect(url) as c:`")
        if self._client_url != self.url:
            self._left.append(self._client)
            self._client, self._client_url = self._new_client(), self.url
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
            raise from_grpc(code, details, self.url) from None


class GrpcCall:
    """own: `client` is this call's, and closed with it."""

    def __init__(
        self, client: InferenceServerClient, transport: GrpcTransport, metadata: Mapping[str, str], own: bool
    ) -> None:
        self._client, self._transport, self._own = client, transport, own
        self.url = transport.url
        self.pod: str | None = None
        self._ring: Ring | None = None
        self._outbox: asyncio.Queue[ChunkRequest | None] = asyncio.Queue()
        self._cancelled = False
        self._streaming = False
        self._replies: Any = client.stream_infer(self._requests(), headers=dict(metadata))
        self._ending = Ending(self._replies)

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
            code, details = await self._ending.status(self._replies, error)
            if code == "OK":  # it had finished when we wrote a request more
                return None
            raise from_grpc(code, details or "no details", self.url, self._streaming) from None
        except asyncio.CancelledError:
            # grpc.aio raises this also in a task that nobody cancelled, when the connection is closed under the call.
            task = asyncio.current_task()
            if self._cancelled or (task is not None and task.cancelling()):
                raise
            what = f"stream from {self.url} lost: the connection was closed on this side"
            raise StreamLost(f"{what}; the frames received so far are complete, open a new stream") from None
        if not self._streaming:
            self._streaming, self.pod = True, await named_pod(self._replies)
        return from_server(error.message()) if error is not None else decode(result, self._ring)

    def cancel(self) -> None:
        self._cancelled = True
        self._replies.cancel()

    async def share(self, size: int) -> None:
        if self._transport.shares_memory and self._ring is None:
            ring = Ring(self._client, size)
            await ring.open()
            self._ring = ring

    async def close(self) -> None:
        self.half_close()  # lets gRPC's reader of our requests end
        self.cancel()
        # gRPC keeps the TCP connection while its call lives; and a stream and its call refer to each other, so it would
        # live on until Python collects its garbage.
        self._replies = Closed()
        if self._ring is not None:
            ring, self._ring = self._ring, None
            await ring.close()
        if self._own:
            self._own = False
            await self._client.close()

    async def _requests(self) -> AsyncIterator[dict[str, object]]:
        while (request := await self._outbox.get()) is not None:
            yield encode(request, self._ring)


class Closed:
    """The replies of a call that was closed."""

    def cancel(self) -> None:
        pass

    async def __anext__(self) -> tuple[None, None]:
        raise StopAsyncIteration


def encode(request: ChunkRequest, ring: Ring | None = None) -> dict[str, object]:
    """`request` as the arguments of tritonclient's stream_infer."""
    inputs = []
    tensors = [(ACTIONS, request.actions), (PROMPT, (request.prompt,)), (OPTIONS, (request.options,))]
    if request.control is not None:
        tensors.append((CONTROL, (request.control,)))
    for name, values in tensors:
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
    generates = request.actions not in ((END_ACTION,), (CONTROL_ACTION,))
    if ring is not None and generates and (shared := ring.outputs()) is not None:
        arguments["request_id"], arguments["outputs"] = shared
    return arguments


def decode(result: InferResult, ring: Ring | None = None) -> Reply | ServerError:
    """The outputs; a ServerError (as a value: the call itself goes on) where they are absent or truncated."""
    arrays = {}
    try:
        shared = None if ring is None else ring.frames(result)
    except ServerError as error:
        return error
    for name in (FRAMES, VIDEO, STATS):
        try:
            arrays[name] = shared if name == FRAMES and shared is not None else result.as_numpy(name)
        except ValueError as error:  # fewer bytes than the shape says
            return ServerError(f"{name}: the reply's bytes do not fit its shape ({error})")
        if arrays[name] is None:
            return ServerError(f"{name}: missing from the server's reply")
    return Reply(arrays[FRAMES], arrays[STATS], arrays[VIDEO])


# A scripted server: gets the requests of one stream, yields its replies; what it raises breaks the connection.
Script = Callable[[AsyncIterator[ChunkRequest]], AsyncGenerator[Reply | FastarError, None]]


class MockTransport:
    """A server in memory, for tests: `serve` is called once per call, with the requests as they come."""

    shares_memory = False

    def __init__(self, serve: Script, url: str = "mock:0", live: bool = True, ready: bool = True) -> None:
        self.url, self._serve, self._live, self._ready = url, serve, live, ready
        self.opened: list[dict[str, str]] = []  # the headers of each call
        self.left: list[str] = []  # by `leave`

    async def connect(self, timeout: float) -> None:
        if not self._live:
            raise ServerUnavailable(f"no Triton server at {self.url}; start one with `fastar serve`")

    async def ready(self, timeout: float) -> bool:
        return self._ready

    def open(self, metadata: Mapping[str, str] | None = None, fresh: bool = False) -> Call:
        self.opened.append(dict(metadata or {}))
        return MockCall(self._serve, self.url)

    def leave(self, call: Call) -> None:
        self.left.append(call.url)

    async def close(self) -> None:
        pass


class MockCall:
    def __init__(self, serve: Script, url: str) -> None:
        self.url = url
        self.pod: str | None = None
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

    async def share(self, size: int) -> None:
        pass

    async def close(self) -> None:
        self.cancel()
        await asyncio.wait({self._server})

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
