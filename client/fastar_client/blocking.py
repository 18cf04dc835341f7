"""The blocking twin: the same streams for code without asyncio. The async client runs in a background thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, Self, TypeVar

from fastar_client.actions import Actions
from fastar_client.protocol import Chunk, World
from fastar_client.session import Connection, Stream, connect
from fastar_client.transport import Transport

T = TypeVar("T")


def connect_blocking(
    url: str = "localhost:8001",
    *,
    timeout: float = 60.0,
    connect_timeout: float = 5.0,
    transport: Transport | None = None,
) -> BlockingConnection:
    """As `connect`, to be entered with `with`."""
    return BlockingConnection(connect(url, timeout=timeout, connect_timeout=connect_timeout, transport=transport))


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

    def act(self, action: str) -> int:
        return self._connection._run(self._stream.act(action))

    def prompt(self, prompt: str) -> int:
        return self._connection._run(self._stream.prompt(prompt))

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
