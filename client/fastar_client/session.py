"""Streams of live video: `async with connect(url) as c: async for chunk in c.stream(prompt=..., actions=...)`."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Mapping
from typing import Any, Self

from fastar_client.actions import Actions
from fastar_client.errors import FastarError, ServerError, TimedOut, invalid
from fastar_client.link import Settings
from fastar_client.protocol import (
    END_ACTION,
    IN_FLIGHT,
    MIGRATE_HEADER,
    STATS,
    TENANT_HEADER,
    ChunkRequest,
    Origin,
    StreamOptions,
    World,
    parse_json,
    parse_world,
)
from fastar_client.stream import Stream
from fastar_client.transport import GrpcTransport, TlsFiles, Transport


def connect(
    url: str = "localhost:8001",
    *,
    timeout: float = 60.0,
    connect_timeout: float = 5.0,
    reconnect_seconds: float = 30.0,
    tenant: str | None = None,
    tls: bool | TlsFiles = False,
    shared_memory: bool = False,
    transport: Transport | None = None,
) -> Connection:
    """A connection to a Triton server's gRPC port, to be entered with `async with`.

    url: host:port; or several joined by commas, of servers with the same snapshots: the first that answers is used, and
    streams go on at the next one where theirs drains or is gone.
    timeout: seconds without any answer after which a stream raises TimedOut.
    connect_timeout: seconds for connecting and for health checks.
    reconnect_seconds: for so long a stream that was lost tries to be taken up again; 0: not at all.
    tenant: in whose name streams are opened, 1..64 of A-Z a-z 0-9 . _ -; None: the server's default.
    tls: True, or the files of a connection with TLS.
    shared_memory: raw frames come through system shared memory; the server must be on this host.

    Raises InvalidArgument here, and ServerUnavailable on entering, when no Triton server answers at `url`.
    """
    for name, value in (("timeout", timeout), ("connect_timeout", connect_timeout)):
        if not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise invalid(name, value, "a finite number of seconds > 0")
    if not (isinstance(reconnect_seconds, int | float) and 0 <= reconnect_seconds < float("inf")):
        raise invalid("reconnect_seconds", reconnect_seconds, "a finite number of seconds >= 0")
    if tenant is not None and not (isinstance(tenant, str) and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", tenant)):
        raise invalid("tenant", tenant, "1..64 of A-Z a-z 0-9 . _ -")
    headers = {MIGRATE_HEADER: "1"} | ({} if tenant is None else {TENANT_HEADER: tenant})
    settings = Settings(timeout, connect_timeout, reconnect_seconds, headers)
    return Connection(transport or GrpcTransport(url, tls, shared_memory), settings)


class Connection:
    """Any number of concurrent streams to one server. Leaving `async with` ends those that still run."""

    def __init__(self, transport: Transport, settings: Settings) -> None:
        self._transport = transport
        self._settings = settings
        self._streams: set[Stream] = set()
        self._world: World | None = None

    @property
    def url(self) -> str:
        return self._transport.url

    async def __aenter__(self) -> Self:
        await self._transport.connect(self._settings.connect_timeout)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def ready(self) -> bool:
        """Whether server and model are ready for streams. Raises ServerUnavailable, TimedOut."""
        return await self._transport.ready(self._settings.connect_timeout)

    async def world(self) -> World:
        """What the server generates: known from any stream's first chunk, else asked by a stream that starts and ends
        in one request and generates nothing. Raises as a stream does."""
        if self._world is None:
            self._world = await ask_world(self._transport, self._settings)
        return self._world

    def stream(
        self,
        prompt: str,
        *,
        actions: Actions = None,
        frames: int | None = None,
        seed: int | None = None,
        start: str | None = None,
        attention: Mapping[str, Any] | None = None,
        measure_recall: bool = False,
        fps: float | None = None,
        encoding: str = "raw",
    ) -> Stream:
        """A new stream, opened when it is first read; parameters as in `StreamOptions`.

        actions: a string is held; an iterable or async iterable gives one action per latent frame and its last is
        held; None is no button. Raises InvalidArgument before anything is sent.
        """
        return self.open(StreamOptions(prompt, frames, seed, start, attention, measure_recall, fps, encoding), actions)

    def resume(
        self,
        token: str,
        chunk: int | None = None,
        *,
        actions: Actions = None,
        frames: int | None = None,
        fps: float | None = None,
        encoding: str = "raw",
    ) -> Stream:
        """Goes on with the stream of `token`, from its newest state whose next chunk is not later than `chunk` (None:
        the newest at all); whoever holds it loses it. The number of its first chunk is in that chunk's stats. Raises as
        `stream`; reading raises NotFound where the server no longer has it."""
        return self.open(StreamOptions("", frames, fps=fps, encoding=encoding, origin=Origin(token, chunk)), actions)

    def fork(
        self,
        token: str,
        chunk: int | None = None,
        *,
        seed: int | None = None,
        actions: Actions = None,
        frames: int | None = None,
        fps: float | None = None,
        encoding: str = "raw",
    ) -> Stream:
        """As `resume`, but a new stream that begins as a copy, with a token of its own. seed: of its noise from there;
        None: that of the original."""
        origin = Origin(token, chunk, fork=True)
        return self.open(StreamOptions("", frames, seed, fps=fps, encoding=encoding, origin=origin), actions)

    def open(self, options: StreamOptions, actions: Actions = None, in_flight: int = IN_FLIGHT) -> Stream:
        """`stream` with its parameters already checked. in_flight: requests under way; with 1 every chunk has been
        taken before the next one is asked for."""
        return Stream(self, options, actions, in_flight)

    async def close(self) -> None:
        """Ends all streams, then the connection."""
        try:
            await asyncio.gather(*(stream.close() for stream in list(self._streams)))
        finally:
            await self._transport.close()


async def ask_world(transport: Transport, settings: Settings) -> World:
    """The world, from a stream that starts and ends in one request and generates nothing."""
    timeout = settings.timeout
    call = transport.open(settings.headers)
    try:
        sequence_id = secrets.randbelow(2**63 - 1) + 1
        call.send(ChunkRequest(sequence_id, (END_ACTION,), "world", start=True, end=True, queue_seconds=0.9 * timeout))
        call.half_close()
        async with asyncio.timeout(timeout):
            reply = await call.receive()
            if isinstance(reply, FastarError):
                raise reply
            world = parse_world(parse_json(reply.stats.tobytes())) if reply is not None else None
            while reply is not None:
                reply = await call.receive()
    except TimeoutError:
        raise TimedOut(f"{transport.url}: no answer for {timeout:g} s; is the server overloaded or hung?") from None
    except (TypeError, AttributeError) as error:
        raise ServerError(f"{STATS}: not the JSON of a world ({error})") from None
    finally:
        call.cancel()
    if world is None:
        raise ServerError(f"{transport.url}: the server does not say what world it runs")
    return world
