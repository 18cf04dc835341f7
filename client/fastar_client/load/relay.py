"""A TCP relay in front of the server, for what gRPC is too polite for: to break a connection unannounced.

Closing a call or a channel sends HTTP/2 frames that tell the server. A viewer who is cut off sends none, so a stream
that is to disconnect runs through a relay of its own, whose sockets are reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Self


class Relay:
    """Passes bytes between connections to `url` (on 127.0.0.1) and a server, until `drop`. Use with `async with`;
    leaving drops what is left.

    targets: "host:port", or several joined by commas: of them the first that takes the connection.
    """

    def __init__(self, targets: str) -> None:
        self._targets = [target.strip().removeprefix("grpc://") for target in targets.split(",")]
        self.target = self._targets[0]  # whose name certificates are checked against
        self.host = split(self.target)[0]
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: set[asyncio.Task[None]] = set()
        self._dropped = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.drop()

    async def drop(self) -> None:
        """Resets all connections (TCP RST): neither end is told anything else. May be called again."""
        self._dropped = True
        self._server.close()
        for writer in self._writers:
            reset(writer)
        for pump in self._pumps:
            pump.cancel()
        if self._pumps:
            await asyncio.wait(self._pumps)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        for target in self._targets:
            with contextlib.suppress(OSError):
                there, out = await asyncio.open_connection(*split(target))
                break
        else:  # the client sees its connection closed, and says that no server is there
            writer.close()
            return
        self._writers.append(out)
        if self._dropped:
            reset(out)
            return
        for source, sink in ((reader, out), (there, writer)):
            pump = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(2**18):
                sink.write(data)
                await sink.drain()
            sink.write_eof()


def split(target: str) -> tuple[str, int]:
    host, _, port = target.rpartition(":")
    return host.strip("[]"), int(port)


def reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
