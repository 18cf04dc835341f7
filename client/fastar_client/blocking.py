"""The blocking twin: the same streams for code without asyncio. The async client runs in a background thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, Self, TypeVar

from fastar_client.actions import Actions
from fastar_client.controls import Receipt
from fastar_client.protocol import Chunk, World
from fastar_client.session import Connection, connect
from fastar_client.stream import Stream
from fastar_client.transport import TlsFiles, Transport

T = TypeVar("T")


def connect_blocking(
    url: str = "localhost:8001",
    *,
    timeout: float = 60.0,
    connect_timeout: float = 5.0,
    reconnect_seconds: float = 30.0,
    tenant: str | None = None,
    tls: bool | TlsFiles = False,
    shared_memory: bool = False,
    transport: Transport | None = None,
) -> BlockingConnection:
    """As `connect`, to be entered with `with`."""
    connection = connect(
        url,
        timeout=timeout,
        connect_timeout=connect_timeout,
        reconnect_seconds=reconnect_seconds,
        tenant=tenant,
        tls=tls,
        shared_memory=shared_memory,
        transport=transport,
    )
    return BlockingConnection(connection)


class BlockingConnection:
    """As `Connection`. Iterables of actions are read in the background thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._runner: asyncio.Runner | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        started = threading.Event()

        def run() -> None:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()
                self._stop = asyncio.Event()
                started.set()
                runner.run(self._stop.wait())

        self._thread = threading.Thread(target=run, name="fastar-client", daemon=True)
        self._thread.start()
        started.wait()
        try:
            self._run(self._connection.__aenter__())
        except BaseException:
            self._halt()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def ready(self) -> bool:
        return self._run(self._connection.ready())

    def world(self) -> World:
        return self._run(self._connection.world())

    def stream(self, prompt: str, **options: Any) -> BlockingStream:
        """Parameters as `Connection.stream`."""
        return BlockingStream(self, self._connection.stream(prompt, **options))

    def resume(self, token: str, chunk: int | None = None, **options: Any) -> BlockingStream:
        """Parameters as `Connection.resume`."""
        return BlockingStream(self, self._connection.resume(token, chunk, **options))

    def fork(self, token: str, chunk: int | None = None, **options: Any) -> BlockingStream:
        """Parameters as `Connection.fork`."""
        return BlockingStream(self, self._connection.fork(token, chunk, **options))

    def close(self) -> None:
        """Ends all streams, then the connection. May be called again."""
        if self._loop is not None:
            try:
                self._run(self._connection.close())
            finally:
                self._halt()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            coroutine.close()
            raise RuntimeError("not connected: use `with connect_blocking(url) as c:`")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # of use where this thread was interrupted (Ctrl-C) while it waited
            raise

    def _halt(self) -> None:
        assert self._loop is not None
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop = None


class BlockingReceipt:
    """As `Receipt`."""

    def __init__(self, connection: BlockingConnection, receipt: Receipt) -> None:
        self._connection = connection
        self._receipt = receipt

    @property
    def id(self) -> int:
        return self._receipt.id

    def received(self) -> None:
        self._connection._run(self._receipt.received())

    def applied(self) -> int:
        """Waits for a chunk that another thread, or the two requests in flight, must bring."""
        return self._connection._run(self._receipt.applied())


class BlockingStream:
    """As `Stream`: an iterator of `Chunk`. Leaving a `for` over it, for whatever reason, ends it."""

    def __init__(self, connection: BlockingConnection, stream: Stream) -> None:
        self._connection = connection
        self._stream = stream

    @property
    def world(self) -> World | None:
        return self._stream.world

    @property
    def actions(self) -> Actions:
        return self._stream.actions

    @actions.setter
    def actions(self, actions: Actions) -> None:
        self._stream.actions = actions

    @property
    def token(self) -> str | None:
        return self._stream.token

    @property
    def reconnects(self) -> int:
        return self._stream.reconnects

    def act(self, action: str) -> BlockingReceipt:
        return self._steer(self._stream.act(action))

    def prompt(self, prompt: str, blend_chunks: int | None = None) -> BlockingReceipt:
        return self._steer(self._stream.prompt(prompt, blend_chunks))

    def set_fps(self, fps: float | None) -> BlockingReceipt:
        return self._steer(self._stream.set_fps(fps))

    def set_density(self, density: float) -> BlockingReceipt:
        return self._steer(self._stream.set_density(density))

    def set_seed(self, seed: int) -> BlockingReceipt:
        return self._steer(self._stream.set_seed(seed))

    def set_encoding(self, encoding: str) -> BlockingReceipt:
        return self._steer(self._stream.set_encoding(encoding))

    def pause(self) -> BlockingReceipt:
        return self._steer(self._stream.pause())

    def play(self) -> BlockingReceipt:
        return self._steer(self._stream.play())

    def snapshot(self) -> BlockingReceipt:
        return self._steer(self._stream.snapshot())

    def rewind(self, chunk: int) -> BlockingReceipt:
        return self._steer(self._stream.rewind(chunk))

    def _steer(self, change: Coroutine[Any, Any, Receipt]) -> BlockingReceipt:
        return BlockingReceipt(self._connection, self._connection._run(change))

    def __iter__(self) -> Iterator[Chunk]:
        try:
            while (chunk := self._next()) is not None:
                yield chunk
        finally:
            self.close()

    def __next__(self) -> Chunk:
        chunk = self._next()
        if chunk is None:
            raise StopIteration
        return chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection._loop is not None:  # else the connection has ended it already
            self._connection._run(self._stream.close())

    def _next(self) -> Chunk | None:
        async def following() -> Chunk | None:
            return await anext(self._stream, None)

        return self._connection._run(following())
