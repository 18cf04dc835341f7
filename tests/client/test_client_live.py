"""Controls, receipts, rewinds, pauses, encodings, and streams that survive their connection."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import time
from pathlib import Path

import numpy as np
import pytest
from fastar_client import InvalidArgument, NotFound, ServerError, StreamLost, TakenOver, connect, eventlog
from fastar_client import link as link_module
from fastar_client.protocol import Origin
from live import LiveServer
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from scripted import connected, grpc_server, until
from test_client_session import both, run

ALL = 20  # chunks


async def play(server: LiveServer, kind: str = "mock", steer=None, chunks: int = ALL, **options) -> list:
    """The chunks of a stream, whose reader calls steer(stream, number of chunks taken) between them."""
    taken = []
    async with connected(kind, server, **options) as c:
        stream = c.stream("a hall", actions="forward", seed=3, encoding=server_encoding(server))
        async for chunk in stream:
            taken.append(chunk)
            if steer is not None:
                await steer(stream, len(taken))
            if len(taken) == chunks:
                break
        server.reconnects = stream.reconnects
    return taken


def server_encoding(server) -> str:
    return getattr(server, "asked_encoding", "raw")


def same(ours: list, theirs: list) -> None:
    assert [chunk.stats.chunk for chunk in ours] == [chunk.stats.chunk for chunk in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.frames == other.frames).all(), mine.stats.chunk
        assert mine.actions == other.actions


def lock_step(server: LiveServer, steer=None, **options):
    """As `play`, one request at a time: controls take effect with the next chunk, whatever the timing."""

    async def stepped() -> list:
        taken = []
        async with connected("mock", server, **options) as c:
            stream = c.open(c.stream("a hall", seed=3).options, "forward", in_flight=1)
            async for chunk in stream:
                taken.append(chunk)
                if steer is not None:
                    # Before the sender, whom this chunk has woken, asks for the next one.
                    await steer(stream, len(taken))
                if len(taken) == ALL:
                    break
            server.reconnects = stream.reconnects
        return taken

    return stepped


async def steer_a_lot(stream, taken: int) -> None:
    if taken == 2:
        await stream.prompt("a swamp", blend_chunks=2)
    if taken == 5:
        refused = await stream.set_density(0.123)
        await stream.set_density(0.5)
        with pytest.raises(InvalidArgument, match="^CONTROL.density"):
            await refused.received()
    if taken == 7:
        await stream.act("turn_left")
    if taken == 9:
        await stream.set_seed(11)
        await stream.prompt("a cave")
    if taken == 12:
        await stream.act("")


@pytest.mark.parametrize("mode", ["before", "after", "restart", "drain", "migrate"])
@pytest.mark.parametrize("every", [2, 4, 5])
def test_lost_at_every_chunk_and_replayed(mode, every):
    async def test():
        reference = await lock_step(LiveServer(snapshot_every=every), steer_a_lot)()
        assert len({chunk.frames[0, -1].tobytes() for chunk in reference}) == ALL
        for cut in range(1, ALL):
            server = LiveServer(snapshot_every=every, cuts={cut: mode})
            # Else no state is left that is not later than what the client has seen.
            can = mode in ("before", "drain", "migrate") or cut > every or (mode, cut) == ("after", every)
            if not can:
                with pytest.raises(StreamLost, match="cannot be resumed") as caught:
                    await lock_step(server, steer_a_lot)()
                assert (caught.value.token, caught.value.chunk) == ("token-0", cut)
                continue
            same(await lock_step(server, steer_a_lot)(), reference)
            assert server.reconnects == 1

    run(test)


def test_lost_again_and_again_also_during_replay():
    async def test():
        reference = await lock_step(LiveServer(), steer_a_lot)()
        server = LiveServer(cuts={6: "restart", 7: "after", 10: "after", 11: "drain", 13: "before", 15: "restart"})
        original = server.make

        def make(session, request):
            if session.state.chunk == 5 and server.reconnects_seen == 1:
                server.cuts[5] = "before"  # is met by the replay
            return original(session, request)

        server.reconnects_seen = 0
        server.make = make
        same(await lock_step(server, steer_a_lot)(), reference)
        assert server.reconnects >= 6

    run(test)


@both
@pytest.mark.parametrize("mode", ["before", "after", "restart", "drain", "migrate"])
def test_two_in_flight_survive(kind, mode):
    async def test():
        async def steer(stream, taken):
            if taken % 3 == 0:
                await stream.act(f"a{taken}")
            if taken % 4 == 0:
                await stream.prompt(f"p{taken}")

        server = LiveServer(cuts={9: mode, 14: mode})
        chunks = await play(server, kind, steer)
        assert [chunk.stats.chunk for chunk in chunks] == list(range(ALL))
        assert server.reconnects == 2
        pixels = np.concatenate([chunk.frames for chunk in chunks])
        assert (pixels[:, 0, 0, 0] == np.arange(4 * ALL) % 256).all()
        # The same again from what was executed: nothing was lost, doubled or reordered.
        ids = [control["id"] for chunk in chunks for control in chunk.controls]
        assert ids == list(range(1, len(ids) + 1))
        again = LiveServer()

        async def repeat(stream, taken):
            for control in chunks[taken].controls if taken < ALL else ():
                if "prompt" in control:
                    await stream.prompt(control["prompt"])
            if taken < ALL:
                stream.actions = chunks[taken].actions[0]

        same(await lock_step(again, repeat)(), chunks)

    run(test)


def test_resume_is_refused_or_too_late():
    async def test():
        refusal = "FAILED_PRECONDITION: snapshot: torn; allowed: a whole one"
        server = LiveServer(cuts={6: "restart"}, refuse_resume=refusal)
        with pytest.raises(StreamLost, match="cannot be resumed .snapshot: torn") as caught:
            await play(server)
        assert (caught.value.token, caught.value.chunk) == ("token-0", 6)
        server = LiveServer(cuts={6: "before"}, down=10**6)
        with pytest.raises(StreamLost, match=r"not resumed within 0.3 s .*still down") as caught:
            await play(server, reconnect_seconds=0.3)
        assert caught.value.chunk == 6
        assert len(server.resumed) >= 2
        server = LiveServer(cuts={6: "before"})
        with pytest.raises(StreamLost, match="gone") as caught:
            await play(server, reconnect_seconds=0)
        assert caught.value.token == "token-0"
        assert not server.resumed
        server = LiveServer(cuts={6: "before"}, down=3)
        assert len(await play(server)) == ALL
        assert len(server.resumed) == 4

    run(test)


def test_taken_over_is_left_alone():
    async def test():
        server = LiveServer()
        async with connected("mock", server) as c:
            first = c.stream("a hall")
            await anext(first)
            second = c.resume(first.token, actions="turn_left")
            taken = await anext(second)
            assert taken.stats.chunk >= 1
            assert taken.actions == ("turn_left",)
            with pytest.raises(TakenOver):
                async for _ in first:
                    pass
            assert (await anext(second)).stats.chunk == taken.stats.chunk + 1
            assert len(server.resumed) == 1

    run(test)


def test_resume_and_fork_by_token():
    async def early(stream) -> int:
        receipts = [await stream.set_density(0.5), await stream.prompt("a pond")]
        chunk = await anext(stream)
        assert [receipt.id for receipt in receipts] == [chunk.stats.received + 1, chunk.stats.received + 2]
        for _ in range(3):
            await anext(stream)
        return (await receipts[1].applied() > 4) and chunk.stats.chunk

    async def test():
        server = LiveServer()
        async with connected("mock", server) as c:
            stream = c.stream("a hall")
            async for chunk in stream:
                if chunk.stats.chunk == 9:
                    break
            async with c.resume(stream.token, 6) as resumed:
                assert await early(resumed) == 4
            async with c.fork(stream.token, 4, seed=9, encoding="jpeg", fps=1000) as fork:
                first = await anext(fork)
                assert first.packets
                assert first.stats.chunk == 4
                assert fork.token != stream.token
            starts = [json.loads(r.options) for r in server.requests if r.start]
            asked = {"seed": 9, "fps": 1000, "encoding": "jpeg", "fork": {"token": stream.token, "chunk": 4}}
            assert starts[-1] == asked
            with pytest.raises(NotFound, match="token"):
                await anext(c.resume("unknown"))
            with pytest.raises(InvalidArgument, match="^token: got '.hidden.'"):
                c.resume("")
            with pytest.raises(InvalidArgument, match="^chunk"):
                c.fork("t", -1)

    run(test)


@both
def test_receipts(kind):
    async def test():
        server = LiveServer(step_seconds=0.01)
        async with connected(kind, server) as c:
            stream = c.stream("a hall")
            early = [await stream.act("turn_left"), await stream.prompt("a swamp"), await stream.set_seed(5)]
            early += [await stream.set_encoding("jpeg"), await stream.set_fps(900)]
            late = await stream.set_density(0.5)  # the start has no place for it
            assert [receipt.id for receipt in (*early, late)] == [0, 0, 0, 0, 0, 1]
            first = await anext(stream)
            start = server.requests[0]
            assert (start.actions, start.prompt) == (("turn_left",), "a swamp")
            assert json.loads(start.options) == {"seed": 5, "encoding": "jpeg", "fps": 900}
            assert [await receipt.applied() for receipt in early] == [0] * 5
            assert first.stats.encoding == "jpeg"
            receipts = [await stream.act("forward"), await stream.set_seed(6), await stream.set_fps(None)]
            refused = [await stream.act("fly"), await stream.rewind(77)]
            assert [receipt.id for receipt in (*receipts, *refused)] == [2, 3, 4, 5, 6]
            for receipt in receipts:
                await receipt.received()
            for receipt in refused:
                with pytest.raises(InvalidArgument, match="^CONTROL"):
                    await receipt.received()
                with pytest.raises(InvalidArgument, match="^CONTROL"):
                    await receipt.applied()
            for _ in range(4):
                await anext(stream)
            assert [1 <= await receipt.applied() <= 3 for receipt in receipts] == [True] * 3
            for bad in (stream.set_density(0), stream.set_fps(-1), stream.rewind(-1), stream.prompt("x", 65)):
                with pytest.raises(InvalidArgument, match="; allowed: "):
                    await bad
            stream._link._controls_flow = False  # one that never leaves
            open_ended = await stream.set_density(0.9)
            await stream.close()
            for ended in (open_ended, await stream.act("forward")):
                with pytest.raises(StreamLost, match="ended before"):
                    await ended.applied()

    run(test)


def test_receipts_that_nobody_asks(caplog):
    async def test():
        complaints = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        async with connected("mock", LiveServer()) as c:
            async for chunk in c.stream("a hall"):
                if chunk.stats.chunk == 3:
                    break
            stream = c.stream("a hall")
            await anext(stream)
            await stream.rewind(77)
            waiting = asyncio.create_task((await stream.rewind(78)).applied())
            await asyncio.sleep(0)
            waiting.cancel()
            for _ in range(3):
                await anext(stream)
            await stream.close()
            del stream, waiting
            gc.collect()
            await asyncio.sleep(0.01)
        assert not complaints
        assert not caplog.records

    run(test)


@both
def test_rewind(kind):
    async def test():
        server = LiveServer(step_seconds=0.005)
        async with connected(kind, server) as c:
            numbers, receipt = [], None
            async for chunk in (stream := c.stream("a hall")):
                numbers.append(chunk.stats.chunk)
                if len(numbers) == 10:
                    receipt = await stream.rewind(4)
                if len(numbers) == 20:
                    break
            back = numbers.index(4, 6)
            assert numbers[:back] == list(range(back))
            assert back <= 12
            assert numbers[back:] == list(range(4, 4 + len(numbers) - back))
            assert await receipt.applied() == 4

    run(test)


@pytest.mark.parametrize("cut", [5, 6, 8, 9, 12])
@pytest.mark.parametrize("mode", ["before", "after", "restart", "drain", "migrate"])
def test_rewound_and_lost(cut, mode):
    async def steer(stream, taken):
        if taken == 3:
            await stream.set_density(0.4)
        if taken == 10:
            await stream.prompt("undone by the rewind")
        if taken == 11:
            await stream.rewind(4)
            await stream.prompt("with the rewind")
        if taken == 14:
            await stream.set_density(0.6)

    async def test():
        reference = await lock_step(LiveServer(), steer)()
        server = LiveServer()

        async def steer_and_cut(stream, taken):
            await steer(stream, taken)
            if taken == 11:
                server.cuts[cut] = mode  # in the second life

        same(await lock_step(server, steer_and_cut)(), reference)
        assert server.reconnects == 1

    run(test)


@pytest.mark.parametrize("mode", ["before", "after", "restart", "drain", "migrate"])
def test_lost_with_a_rewind_under_way(mode):
    async def test():
        server, receipts = LiveServer(), []

        async def steer(stream, taken):
            if taken == 11:
                server.cuts[11] = mode
                await stream.prompt("before it")
                receipts.extend([await stream.rewind(8), await stream.prompt("after it")])

        chunks = await lock_step(server, steer)()
        assert [chunk.stats.chunk for chunk in chunks] == [*range(11), *range(8, 17)]
        assert await receipts[0].applied() == 8
        assert await receipts[1].applied() in (8, 9)
        assert server.reconnects == 1

    run(test)


@both
def test_pause(kind, monkeypatch):
    monkeypatch.setattr(link_module, "KEEPALIVE_SECONDS", 0.05)

    async def test():
        server = LiveServer()
        async with connected(kind, server, timeout=0.4) as c, c.stream("a hall") as stream:
            for _ in range(3):
                await anext(stream)
            await (await stream.pause()).received()
            assert stream.paused
            reader = asyncio.create_task(drain(stream))
            await until(lambda: len(server.made) == len(reader_taken) + 3)
            asked = len(server.chunks)
            await asyncio.sleep(0.7)  # longer than the time-out for answers
            assert len(server.chunks) <= asked + 2
            asked = len(server.chunks)
            assert server.controls.count({}) >= 5
            receipt = await stream.play()
            await until(lambda: len(server.chunks) > asked + 4)
            assert await receipt.applied() >= 3
            beats = server.controls.count({})
            await asyncio.sleep(0.12)
            assert server.controls.count({}) == beats
            await stream.close()
            await reader

    reader_taken = []

    async def drain(stream):
        async for chunk in stream:
            reader_taken.append(chunk)

    run(test)


def test_lost_while_paused_is_taken_up_when_it_plays():
    async def test():
        server = LiveServer()
        async with connected("mock", server) as c, c.stream("a hall") as stream:
            for _ in range(6):
                await anext(stream)
            await stream.pause()
            await asyncio.sleep(0.02)
            stream._link._call._server.cancel()
            stream._link._call._outbox.put_nowait(None)
            await asyncio.sleep(0.1)
            assert not server.resumed
            await stream.act("turn_left")
            await stream.play()
            numbers = [(await anext(stream)).stats.chunk for _ in range(8)]
            assert numbers == list(range(6, 14))
            assert stream.reconnects == 1

    run(test)


@both
@pytest.mark.parametrize("encoding", ["jpeg", "h264"])
@pytest.mark.parametrize("size", [(16, 24), (16, 23), (240, 320)])
def test_encodings(kind, encoding, size):
    async def test():
        height, width = size
        server = LiveServer(height=height, width=width)
        server.asked_encoding = encoding
        if encoding == "h264" and width % 2:
            server.width += 1  # an encoder of 4:2:0 has grown it
        chunks = await play(server, kind, chunks=6)
        assert [chunk.stats.chunk for chunk in chunks] == list(range(6))
        for chunk in chunks:
            assert chunk.frames.shape[0] == len(chunk.packets) == 4
            assert chunk.frames.dtype == np.uint8
            assert not chunk.frames.flags.writeable
            expected = np.arange(chunk.stats.first_frame, chunk.stats.first_frame + 4)
            assert abs(chunk.frames[:, 3, 5].astype(int) - expected[:, None]).max() <= 3

    run(test)


def test_encodings_change_rewind_and_reconnect():
    async def test():
        async def steer(stream, taken):
            if taken == 3:
                await stream.set_encoding("h264")
            if taken == 9:
                await stream.rewind(4)
            if taken == 18:
                await stream.set_encoding("raw")

        server = LiveServer(cuts={7: "after"})
        chunks = await play(server, "mock", steer, chunks=24)
        assert {chunk.stats.encoding for chunk in chunks} == {"raw", "h264"}
        assert server.reconnects == 1
        for chunk in chunks:
            expected = np.arange(chunk.stats.first_frame, chunk.stats.first_frame + 4)
            assert abs(chunk.frames[:, 3, 5].astype(int) - expected[:, None]).max() <= 3
        after = next(i for i in range(1, 24) if chunks[i].stats.chunk < chunks[i - 1].stats.chunk)
        assert chunks[after].packets[0][:64].find(b"\x00\x00\x01\x67") >= 0

    run(test)


def test_packets_that_do_not_fit():
    async def test():
        for changed, says in (
            ({"packets": [1, 2]}, "VIDEO: .* bytes arrived"),
            ({"packets": [], "encoding": "jpeg"}, "VIDEO|frames arrived"),
            ({"frames": 3}, "frames arrived"),
        ):
            server = LiveServer(extra_stats={})
            server.asked_encoding = "jpeg"
            original = server.make

            def make(session, request, original=original, changed=changed):
                reply = original(session, request)
                stats = json.loads(reply.stats.tobytes())
                stats |= changed if stats["chunk"] == 1 else {}
                return dataclasses.replace(reply, stats=np.frombuffer(json.dumps(stats).encode(), np.uint8)[None])

            server.make = make
            with pytest.raises(ServerError, match=says):
                await play(server)

    run(test)


def test_tenant_and_other_arguments():
    async def test():
        server = LiveServer()
        async with connected("mock", server, tenant="acme") as c:
            await anext(c.stream("a hall"))
            assert c._transport.opened == [{"x-fastar-migrate": "1", "x-fastar-tenant": "acme"}]

    run(test)
    for options, field in (
        ({"tenant": ""}, "tenant"),
        ({"tenant": "a b"}, "tenant"),
        ({"reconnect_seconds": -1}, "reconnect_seconds"),
        ({"tls": "yes"}, "tls"),
        ({"url": "example.com:8001", "shared_memory": True}, "shared_memory"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{field}: got "):
            connect(**options)


def test_the_rate_may_change():
    async def test():
        server = LiveServer()
        async with connected("mock", server) as c, c.stream("a hall", fps=40) as stream:  # 0.1 s a chunk
            began = time.monotonic()
            for _ in range(5):
                await anext(stream)
            assert time.monotonic() - began > 0.15
            await stream.set_fps(None)
            await anext(stream)
            began = time.monotonic()
            for _ in range(10):
                await anext(stream)
            assert time.monotonic() - began < 0.2
            await stream.set_fps(20)
            began = time.monotonic()
            for _ in range(6):
                await anext(stream)
            assert time.monotonic() - began > 0.35

    run(test)


def test_memory_that_cannot_be_shared():
    def regions() -> list[Path]:
        return list(Path("/dev/shm").glob("fastarclient_*"))

    async def test():
        async with grpc_server(LiveServer()) as url, connect(url, shared_memory=True) as c:
            before = regions()
            with pytest.raises(InvalidArgument, match="^shared_memory: the server does not share .*; allowed: "):
                await anext(c.stream("a hall"))
            assert regions() == before

    run(test)


def test_a_log_with_controls_is_replayed(tmp_path):
    async def test():
        server = LiveServer(step_seconds=0.002, cuts={6: "after", 9: "restart"})
        async with connected("mock", server) as c:
            stream = c.stream("a hall", actions="forward")
            early = await stream.set_density(0.3)
            with eventlog.EventLog(tmp_path / "log", stream.options) as log:
                async for chunk in stream:
                    log.add(chunk)
                    await steer_a_lot(stream, chunk.stats.chunk)
                    if chunk.stats.chunk == 10 and stream.frames_received < 60:
                        await stream.rewind(8)
                        await stream.pause()
                        await stream.play()
                    if stream.frames_received > 90:
                        break
            assert await early.applied() <= 1
        options, recorded = eventlog.read(tmp_path / "log")
        assert [chunk.chunk for chunk in recorded] != list(range(len(recorded)))
        async with connected("mock", LiveServer(step_seconds=0.002)) as c:
            result = await eventlog.replay(c, options, recorded)
        assert result == eventlog.Comparison(len(recorded), identical=len(recorded))
        async with connected("mock", LiveServer(step_seconds=0.002)) as c:
            result = await eventlog.replay(c, dataclasses.replace(options, seed=99), recorded)
        assert (result.identical, result.first_difference) == (0, 0)
        with pytest.raises(InvalidArgument, match="event_log"):
            eventlog.EventLog(tmp_path / "log", dataclasses.replace(options, origin=Origin("t")))

    run(test)


def test_spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def test():
        for traced in (False, True):
            if traced:
                monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
            server = LiveServer(cuts={2: "before"})
            async with connected("mock", server) as c:
                async for _ in c.stream("a hall", frames=12):
                    pass
                headers = [opened.get("traceparent") for opened in c._transport.opened]
            if not traced:
                assert headers == [None, None]
        assert headers[0] == headers[1]
        return headers[0]

    run(test)
    *chunks, stream = exporter.get_finished_spans()
    assert [span.name for span in (*chunks, stream)] == ["fastar.chunk"] * 3 + ["fastar.stream"]
    assert {span.parent.span_id for span in chunks} == {stream.context.span_id}
    assert [span.attributes["fastar.chunk"] for span in chunks] == [0, 1, 2]
    assert dict(stream.attributes)["fastar.reconnects"] == 1
    assert all(stream.start_time - 10**7 <= span.start_time <= span.end_time <= stream.end_time for span in chunks)
