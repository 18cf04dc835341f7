"""Streams of a load test that end badly, on purpose or not: lost, broken off, slow, taken up again, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator

import pytest
import trustme
from fastar_client.load.measure import totals
from fastar_client.load.record import StreamRecord
from fastar_client.load.relay import Relay
from fastar_client.load.run import Runner, Target
from fastar_client.transport import TlsFiles
from live import LiveServer
from scripted import ScriptedServer, grpc_server, until
from test_client_addresses import closed_port
from test_client_load_run import PACED, PERIOD, near, play, viewer


def test_lost_streams():
    refused = "RESOURCE_EXHAUSTED: streams: 8 are open; allowed: 8; retry in 3 s"
    for faults, outcome, says in (
        ({0: refused}, "rejected", "streams: 8 are open"),
        ({3: "INTERNAL: engine: broken; allowed: nothing"}, "failed", "engine: broken"),
        ({3: ScriptedServer.finish}, "failed", "closed the stream"),
        ({0: ScriptedServer.hang}, "starved", None),
    ):
        (record,), (found,) = play(ScriptedServer(faults=faults), viewer(seconds=0.8), timeout=1.0)
        assert record.outcome == outcome
        assert says is None if record.error is None else says in record.error
        assert (found.lost, found.fps) == (True, 0.0)
        assert (found.ttfc is None) is (outcome != "failed")
    (record,), _ = play(ScriptedServer(faults={2: ScriptedServer.hang}), viewer(seconds=1.5), timeout=0.4)
    assert (record.outcome, "no answer for 0.4 s" in record.error) == ("failed", True)


def test_nobody_there():
    async def run() -> list[StreamRecord]:
        runner = Runner(Target("127.0.0.1:9"), PACED, time.monotonic())
        await runner.run([viewer(0), viewer(1, disconnects=True)])
        return runner.records

    for record in asyncio.run(run()):
        assert record.outcome == "rejected"
        assert "no Triton server" in record.error


def test_a_stream_that_is_taken_up_again_goes_on():
    (record,), (found,) = play(LiveServer(step_seconds=0.02, cuts={5: "before"}), viewer(seconds=1.5))
    assert (record.outcome, record.reconnects, found.lost) == ("completed", 1, False)
    assert [c.frames for c in record.chunks] == [4] * len(record.chunks)
    (record,), _ = play(LiveServer(cuts={5: "before"}), viewer(seconds=1.5), reconnect_seconds=0)
    assert (record.outcome, record.reconnects) == ("failed", 0)


def test_slow_readers_slow_themselves_and_are_not_judged():
    server = ScriptedServer()
    (slow, quick), (theirs, ours) = play(server, viewer(0, slow_factor=3.0), viewer(1))
    # Of four chunks that it takes in 2 s; two more may be on their way.
    assert len(slow.chunks) == math.ceil((2.0 - slow.first) / (3 * PERIOD))
    assert len(quick.chunks) >= 10
    assert (theirs.judged, ours.judged) == (False, True)
    assert totals([slow, quick], [theirs, ours], 2).fps["min"] == pytest.approx(20, rel=0.05)


def test_a_stopped_test_keeps_what_ran():
    server = ScriptedServer(step_seconds=0.02)
    records, each = play(server, viewer(0), viewer(1, 0.2, 0.5), viewer(2, 3.0), stop=1.05)
    assert [(r.planned.number, r.outcome) for r in records] == [(0, "interrupted"), (1, "completed")]
    assert each[0].frames > 20
    assert each[0].judged
    assert not each[0].stalls
    assert len(server.ends) == 2  # the server was told of both


class Spy:
    """Between client and server: keeps what the client sends, and how its connections ended."""

    def __init__(self, target: str) -> None:
        self.host, self.port = target.split(":")
        self.sent: list[bytearray] = []
        self.ends: list[str] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, out = await asyncio.open_connection(self.host, int(self.port))
        back = asyncio.create_task(self.pump(there, writer))
        sent = bytearray()
        self.sent.append(sent)
        end = "closed"
        try:
            while data := await reader.read(65536):
                sent += data
                out.write(data)
        except ConnectionResetError:
            end = "reset"
        out.close()
        await back
        writer.close()
        self.ends.append(end)

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)


@contextlib.asynccontextmanager
async def spied(target: str) -> AsyncIterator[tuple[str, Spy]]:
    """Yields where it listens. Its connections must be over at the end."""
    spy = Spy(target)
    listener = await asyncio.start_server(spy.accept, "127.0.0.1", 0)
    async with listener:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}", spy
        await until(lambda: len(spy.ends) == len(spy.sent))


def frame_types(sent: bytearray) -> set[int]:
    """Of HTTP/2 (RFC 9113, section 4.1): a preface of 24 bytes, then length (3 bytes), type, flags, stream id (4)."""
    kinds, at = set(), 24
    while at + 9 <= len(sent):
        kinds.add(sent[at + 3])
        at += 9 + int.from_bytes(sent[at : at + 3])
    return kinds


RST_STREAM, GOAWAY = 3, 7


def test_abrupt_disconnects_tell_the_server_nothing():
    async def run(disconnects: bool) -> tuple[StreamRecord, Spy, ScriptedServer]:
        server = ScriptedServer(step_seconds=0.02)
        async with grpc_server(server) as url, spied(url) as (spied_url, spy):
            runner = Runner(Target(spied_url), PACED, time.monotonic())
            await runner.run([viewer(seconds=1.0, disconnects=disconnects)])
            return runner.records[0], spy, server

    record, spy, server = asyncio.run(run(disconnects=True))
    assert record.outcome == "disconnected"
    assert record.ended == near(1.0)
    assert len(record.chunks) >= 5
    assert spy.ends == ["reset"]
    assert not frame_types(spy.sent[0]) & {RST_STREAM, GOAWAY}
    assert server.ends == []
    record, spy, server = asyncio.run(run(disconnects=False))
    assert record.outcome == "completed"
    assert spy.ends == ["closed"]
    assert len(server.ends) == 1


def test_a_relay_changes_nothing_until_it_drops():
    async def run() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while data := await reader.read(1000):
                    writer.write(data)
                ended.set_result("closed")
            except ConnectionResetError:
                ended.set_result("reset")
            writer.close()

        sent = bytes(range(256)) * 4001
        listener = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with listener, asyncio.timeout(10):
            there = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            for drop, end, to in ((True, "reset", there), (False, "closed", f"{closed_port()}, {there}")):
                ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
                async with Relay(to) as relay:
                    reader, writer = await asyncio.open_connection(*relay.url.split(":"))
                    writer.write(sent)
                    assert await reader.readexactly(len(sent)) == sent
                    if drop:
                        await relay.drop()
                        with pytest.raises(ConnectionResetError):
                            await reader.read()
                    else:
                        writer.write_eof()
                        assert await reader.read() == b""
                    assert await ended == end
                    writer.close()

    asyncio.run(run())


def test_disconnects_behind_tls(tmp_path):
    """The relay stands between, and the server's certificate still has to be the server's."""
    authority, other = trustme.CA(), trustme.CA()
    ours = authority.issue_cert("viewer@example.org")
    ours.private_key_pem.write_to_path(tmp_path / "key.pem")
    ours.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    for name, ca in (("ca.pem", authority), ("other.pem", other)):
        ca.cert_pem.write_to_path(tmp_path / name)

    async def run() -> list[StreamRecord]:
        async with grpc_server(ScriptedServer(step_seconds=0.02), authority=authority) as url:
            records = []
            for name in ("ca.pem", "other.pem"):
                files = TlsFiles(tmp_path / name, tmp_path / "cert.pem", tmp_path / "key.pem")
                target = Target(url.replace("127.0.0.1", "localhost"), tls=files)
                runner = Runner(target, PACED, time.monotonic())
                await runner.run([viewer(seconds=0.6, disconnects=True)])
                records += runner.records
            return records

    good, bad = asyncio.run(run())
    assert (good.outcome, len(good.chunks) > 2) == ("disconnected", True)
    assert (bad.outcome, "TLS" in bad.error) == ("rejected", True)
