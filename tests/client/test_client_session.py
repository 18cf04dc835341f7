"""The session against a scripted server, in memory and over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import fastar_client
import grpc
import numpy as np
import pytest
from fastar_client import (
    FastarError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServerError,
    ServerUnavailable,
    StreamLost,
    TimedOut,
    connect,
)
from fastar_client.protocol import Reply
from fastar_client.transport import GrpcTransport
from live import LiveServer
from scripted import Died, ScriptedServer, connected, grpc_server, until

both = pytest.mark.parametrize("kind", ["mock", "grpc"])


def run(test):
    """Runs the coroutine function `test`; fails where it leaks a task."""

    async def checked():
        async with asyncio.timeout(20):
            await test()
        # gRPC's own tasks (of the server, too) may need a few turns of the loop to end.
        for _ in range(50):
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if not left:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"tasks left behind: {left}")

    asyncio.run(checked())


async def collect(stream, taken: list[int], pause: float = 0.0) -> None:
    """Numbers of the chunks that come; in `taken`, as `stream` may raise."""
    async for chunk in stream:
        await asyncio.sleep(pause)
        taken.append(chunk.stats.chunk)


@both
@pytest.mark.parametrize(("frames", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3]), (1, [1]), (12, [4, 4, 4])])
def test_exactly_n_frames_in_order(kind, frames, sizes):
    server = ScriptedServer()

    async def test():
        async with connected(kind, server) as c:
            chunks = [chunk async for chunk in c.stream("a hall", frames=frames)]
            assert [len(chunk.frames) for chunk in chunks] == sizes
            pixels = np.concatenate([chunk.frames for chunk in chunks])
            assert pixels.shape == (frames, 16, 24, 3)
            assert pixels.dtype == np.uint8
            assert (pixels[:, 5, 7, 1] == np.arange(frames)).all()
            assert [chunk.stats.chunk for chunk in chunks] == list(range(len(sizes)))
            assert chunks[0].stats.world.buttons == ("forward", "turn_left")
            assert all(chunk.sent_at <= chunk.received_at for chunk in chunks)

    run(test)
    # Nothing is generated in vain, but for the second chunk, asked before the first has told how long chunks are.
    assert len(server.chunks) == max(2, len(sizes))
    assert len(server.ends) == 1


@both
def test_requests_carry_the_contract(kind):
    server = ScriptedServer()

    async def test():
        async with connected(kind, server) as c:
            options = {"seed": 7, "start": "hall", "attention": {"kind": "dense"}, "measure_recall": True}
            async for _ in c.stream("a hall, café", actions="forward", frames=12, **options):
                pass
            first, *rest, end = server.requests
            assert first.start
            assert first.prompt == "a hall, café"
            assert json.loads(first.options) == options
            assert first.queue_seconds == pytest.approx(4.5)
            assert [r.actions for r in (first, *rest)] == [("forward",)] * 3
            assert all((r.prompt, r.options, r.start, r.end) == ("", "", False, False) for r in rest)
            assert (end.actions, end.start, end.end) == (("end",), False, True)
            assert 0 < first.sequence_id < 2**63
            assert {r.sequence_id for r in server.requests} == {first.sequence_id}

    run(test)


@both
def test_two_requests_in_flight_and_never_more(kind):
    async def test():
        server = ScriptedServer(gate=asyncio.Semaphore(0))
        async with connected(kind, server) as c, c.stream("a hall") as stream:
            waiting = asyncio.create_task(anext(stream))
            for taken in range(5):
                await until(lambda taken=taken: len(server.requests) == taken + 2)
                await asyncio.sleep(0.03)  # time enough for one too many
                assert len(server.requests) == taken + 2
                server.gate.release()
                assert (await waiting).stats.chunk == taken
                waiting = asyncio.create_task(anext(stream))
            assert server.most_unanswered == 2
            waiting.cancel()
            await asyncio.wait({waiting})
            server.gate.release()
            server.gate.release()

    run(test)


@both
def test_a_slow_reader_holds_the_server_back(kind):
    async def test():
        server = ScriptedServer()  # answers at once
        async with connected(kind, server) as c, c.stream("a hall") as stream:
            for taken in range(1, 5):
                await anext(stream)
                await asyncio.sleep(0.05)
                assert len(server.requests) == taken + 2

    run(test)


@both
def test_actions_and_prompt_apply_to_the_chunk_they_say(kind):
    async def test():
        server = LiveServer()
        executed, applied, said = [], {}, {}
        async with connected(kind, server) as c:
            stream = c.stream("a hall", actions="forward")
            async for chunk in stream:
                executed.append(chunk.actions)
                for control in chunk.controls:
                    applied[chunk.stats.chunk] = control
                if chunk.stats.chunk == 1:
                    said["act"] = await stream.act("turn_left")
                if chunk.stats.chunk == 4:
                    said["prompt"] = await stream.prompt("a swamp", blend_chunks=3)
                if chunk.stats.chunk == 6:
                    stream.actions = ""
                if chunk.stats.chunk == 12:
                    break
            turned, swamp = [await receipt.applied() for receipt in said.values()]
        assert 1 < turned <= 4
        assert 4 < swamp <= 7
        assert executed[:turned] == [("forward",)] * turned
        assert executed[turned] == ("turn_left",)
        assert executed[-1] == ("",)
        assert applied[turned] == {"id": 1, "action": "turn_left"}
        assert applied[swamp] == {"id": 2, "prompt": "a swamp", "blend_chunks": 3}
        assert [r.prompt for r in server.chunks if r.prompt] == ["a hall"]

    run(test)


@both
def test_a_script_is_played_one_action_per_latent_frame(kind):
    async def endless():
        for action in ["a", "b", "c"]:
            yield action
            await asyncio.sleep(0)

    async def test():
        for script in (["a", "b", "c"], iter("abc"), endless()):
            server = ScriptedServer(latent_frames=2)
            async with connected(kind, server) as c:
                async for _ in c.stream("a hall", actions=script, frames=16):
                    pass
                assert [r.actions for r in server.chunks] == [("a", "b"), ("c", "c"), ("c",), ("c",)]
                # Asked beforehand, by a stream that generates nothing, how many actions make a chunk:
                assert (server.requests[0].start, server.requests[0].end) == (True, True)
                assert server.requests[0].sequence_id != server.requests[1].sequence_id
                # ... but once per connection.
                asked = len(server.requests)
                async for _ in c.stream("a hall", actions=["a", "b"], frames=4):
                    pass
                assert not server.requests[asked].end

    run(test)


@both
def test_actions_may_depend_on_the_frames(kind):
    async def test():
        server = ScriptedServer(latent_frames=1)
        seen: asyncio.Queue[int] = asyncio.Queue()

        async def player():
            yield "first"
            while True:
                yield f"saw {await seen.get()}"

        async with connected(kind, server) as c:
            async for chunk in c.stream("a hall", actions=player(), frames=20):
                seen.put_nowait(chunk.stats.chunk)
        assert [r.actions[0] for r in server.chunks] == ["first", "saw 0", "saw 1", "saw 2", "saw 3"]

    run(test)


@both
def test_a_script_replaced_while_it_is_waited_for(kind):
    async def test():
        server = ScriptedServer(latent_frames=1)
        more = asyncio.Event()

        async def player():
            yield "first"
            await more.wait()
            yield "late"

        async with connected(kind, server) as c, c.stream("a hall", actions=player()) as stream:
            assert (await anext(stream)).actions == ("first",)
            await stream.act("turn_left")
            more.set()
            assert (await anext(stream)).actions == ("turn_left",)

    run(test)


@both
def test_what_actions_raise_reaches_the_caller(kind):
    def player():
        yield "a"
        yield "b"
        raise ZeroDivisionError("of the caller")

    async def test():
        server = ScriptedServer(latent_frames=2)
        async with connected(kind, server) as c:
            with pytest.raises(ZeroDivisionError, match="of the caller"):
                async for _ in c.stream("a hall", actions=player()):
                    pass
            with pytest.raises(InvalidArgument, match="^actions: got 7; allowed"):
                async for _ in c.stream("a hall", actions=iter([7])):
                    pass
        assert len(server.ends) == 1  # the other never started

    run(test)


@both
@pytest.mark.parametrize(
    "way", ["break", "exception", "cancel", "cancel twice", "close", "context", "connection", "abandon"]
)
def test_every_way_out_ends_the_sequence(kind, way):
    async def test():
        server = ScriptedServer()

        async def consume(c):
            if way == "break":
                async for _ in c.stream("a hall"):
                    break
            elif way == "exception":
                async for _ in c.stream("a hall"):
                    raise ZeroDivisionError
            elif way == "cancel twice":
                async with c.stream("a hall") as stream:
                    while True:
                        await anext(stream)
            elif way == "context":
                async with c.stream("a hall") as stream:
                    await anext(stream)
            elif way == "connection":
                await anext(c.stream("a hall"))
            elif way == "close":
                stream = c.stream("a hall")
                async for chunk in stream:
                    if chunk.stats.chunk == 2:
                        asyncio.get_running_loop().call_soon(asyncio.ensure_future, stream.close())
            elif way == "abandon":
                chunks = aiter(c.stream("a hall"))
                await anext(chunks)
                del chunks
            else:
                async for _ in c.stream("a hall"):
                    await asyncio.sleep(0.01)

        async with connected(kind, server) as c:
            task = asyncio.create_task(consume(c))
            if way.startswith("cancel"):
                await until(lambda: len(server.chunks) > 3)
                task.cancel()
            if way == "cancel twice":
                await asyncio.sleep(0)
                task.cancel()
            with contextlib.suppress(ZeroDivisionError, asyncio.CancelledError):
                await task
            if way != "connection":
                await until(lambda: server.ends)
        assert [end.actions for end in server.ends] == [("end",)]
        assert server.requests[-1].end

    run(test)


@both
def test_a_cancelled_wait_loses_nothing(kind):
    async def test():
        server = ScriptedServer(step_seconds=0.05)
        async with connected(kind, server) as c, c.stream("a hall") as stream:
            chunks = []
            while len(chunks) < 4:
                with contextlib.suppress(TimeoutError):
                    chunks.append((await asyncio.wait_for(anext(stream), 0.01)).stats.chunk)
            assert chunks == [0, 1, 2, 3]
        assert len(server.ends) == 1

    run(test)


MESSAGES = [
    ("INVALID_ARGUMENT: actions: got 'fly'; allowed: forward, turn_left", InvalidArgument, "^actions: got 'fly'"),
    ("in model 'fastar', INVALID_ARGUMENT: options.seed: got -1; allowed: 0..9", InvalidArgument, "^options.seed"),
    ("NOT_FOUND: stream: unknown 5; allowed: open streams", NotFound, "^stream: unknown 5"),
    ("RESOURCE_EXHAUSTED: streams: 8 are open; allowed: 8", ResourceExhausted, "^streams: 8 are open"),
    ("INTERNAL: server: RuntimeError; allowed: a new stream", ServerError, "RuntimeError"),
    ("FAILED_PRECONDITION: weights: missing", ServerError, "weights: missing"),
    (
        "inference request for sequence 5 to model 'fastar' must specify the START flag on the first request",
        NotFound,
        "open a new one",
    ),
    ("Request for unknown model: 'fastar' is not found", NotFound, "fastar serve"),
    (
        "[request id: <id_unknown>] inference input 'ACTIONS' data-type is 'FP32', but model 'fastar' expects 'BYTES'",
        InvalidArgument,
        "[(]Triton: inference input 'ACTIONS' data-type",
    ),
    (
        "[request id: <id_unknown>] unexpected shape for input 'PROMPT' for model 'fastar'. Expected [-1,1], "
        "got [1,2]. NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension",
        InvalidArgument,
        r"input 'PROMPT' .* got \[1,2\][)]$",
    ),
    ("expected 3 inputs but got 2 inputs for model 'fastar'. Got input(s) ['PROMPT']", InvalidArgument, "PROMPT"),
    ("Server is stopping, scheduler for model has stopped accepting new", ServerUnavailable, "try again later"),
    ("Request timeout expired", ResourceExhausted, "no free slot"),
    ("Stub process 'fastar_0_0' is not healthy.", StreamLost, "model process died"),
    ("something\nnew", ServerError, "something new"),
]


@both
@pytest.mark.parametrize(("message", "error", "says"), MESSAGES)
def test_server_errors_are_typed_and_come_after_the_frames(kind, message, error, says):
    async def test():
        server = ScriptedServer(faults={2: message})
        taken = []
        async with connected(kind, server) as c:
            with pytest.raises(error, match=says) as caught:
                await collect(c.stream("a hall"), taken, 0.02)  # the error is there before the second chunk is taken
            assert type(caught.value) is error
            assert "\n" not in str(caught.value)
            assert taken == [0, 1]
            assert len(server.ends) == 1
            assert len([chunk async for chunk in c.stream("a hall", frames=4)]) == 1  # the connection lives on

    run(test)


@both
def test_the_error_comes_once(kind):
    async def test():
        server = ScriptedServer(faults={0: "NOT_FOUND: stream: gone", 1: "NOT_FOUND: stream: gone"})
        async with connected(kind, server) as c, c.stream("a hall") as stream:
            with pytest.raises(NotFound):
                await anext(stream)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            assert [chunk async for chunk in stream] == []

    run(test)


@both
@pytest.mark.parametrize("fault", [Died("gone"), ScriptedServer.finish])
def test_a_lost_connection(kind, fault):
    async def test():
        server = ScriptedServer(faults={3: fault})
        taken = []
        async with connected(kind, server) as c:
            with pytest.raises(StreamLost, match="open a new one|open a new stream|lost"):
                await collect(c.stream("a hall"), taken)
        assert taken == [0, 1, 2]

    run(test)


@pytest.mark.parametrize("status", [grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
@pytest.mark.parametrize("chunk", [0, 2])
def test_a_call_broken_by_the_server(status, chunk):
    async def test():
        server = ScriptedServer(faults={chunk: Died("going down")})
        async with grpc_server(server, status) as url, connect(url) as c:
            taken = []
            kind, says = (StreamLost, "open a new stream") if chunk else (ServerUnavailable, "fastar serve")
            with pytest.raises(kind, match=f"{url}.*{says}.*going down"):
                await collect(c.stream("a hall"), taken)
            assert taken == list(range(chunk))

    run(test)


def test_a_killed_server_process():
    command = [sys.executable, str(Path(__file__).with_name("scripted.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()

        async def test():
            async with connect(url) as c:
                taken = []
                with pytest.raises(StreamLost, match="frames received so far are complete"):
                    await collect(c.stream("a hall"), taken)
                assert taken == list(range(8))
                with pytest.raises(ServerUnavailable, match="fastar serve"):
                    await c.ready()
                with pytest.raises(ServerUnavailable, match="fastar serve"):
                    await anext(c.stream("a hall"))

        run(test)


@both
@pytest.mark.parametrize("chunk", [0, 2])
def test_a_silent_server_times_out(kind, chunk):
    async def test():
        server = ScriptedServer(faults={chunk: ScriptedServer.hang})
        async with connected(kind, server, timeout=0.3) as c:
            taken, began = [], time.monotonic()
            with pytest.raises(TimedOut, match=f"no answer for 0.3 s, at chunk {chunk}"):
                await collect(c.stream("a hall"), taken)
            assert taken == list(range(chunk))
            assert 0.3 <= time.monotonic() - began < 2
        assert len(server.ends) == 1

    run(test)


@both
def test_slow_is_not_silent(kind):
    async def test():
        server = ScriptedServer(step_seconds=0.2)
        async with connected(kind, server, timeout=0.3) as c:
            async for chunk in c.stream("a hall", frames=12):
                if chunk.stats.chunk == 0:
                    await asyncio.sleep(0.5)  # the reader's own pauses do not count, either
        assert len(server.ends) == 1

    run(test)


def broken_replies():
    good = ScriptedServer()
    reply = good.reply(1, 4)
    return {
        "another chunk's number": good.reply(5, 4),
        "fewer frames than stats say": Reply(reply.frames[:, :2], reply.stats),
        "not RGB": Reply(reply.frames[..., :2], reply.stats),
        "not JSON": Reply(reply.frames, np.frombuffer(b"{", np.uint8)[None]),
        "no object": Reply(reply.frames, np.frombuffer(b"[1]", np.uint8)[None]),
        "a field missing": Reply(reply.frames, np.frombuffer(b'{"chunk": 1}', np.uint8)[None]),
    }


@both
@pytest.mark.parametrize("fault", broken_replies().values(), ids=broken_replies().keys())
def test_broken_replies(kind, fault):
    async def test():
        server = ScriptedServer(faults={1: fault})
        async with connected(kind, server) as c:
            with pytest.raises(ServerError):
                async for _ in c.stream("a hall"):
                    pass
        assert len(server.ends) == 1

    run(test)


def test_outputs_missing_or_empty_on_the_wire():
    class Empty:
        """An array whose bytes were lost on the way."""

        shape = (1, 4, 16, 24, 3)

        def tobytes(self):
            return b""

    async def test():
        reply = ScriptedServer().reply(0, 4, world=True)
        for fault, says in ((Reply(Empty(), reply.stats), "do not fit"), (Reply(None, reply.stats), "FRAMES: missing")):
            server = ScriptedServer(faults={0: fault})
            async with connected("grpc", server) as c:
                with pytest.raises(ServerError, match=says):
                    await anext(c.stream("a hall"))
            assert len(server.ends) == 1

    run(test)


@both
def test_a_first_chunk_without_world(kind):
    async def test():
        server = ScriptedServer(faults={0: ScriptedServer().reply(0, 4)})
        async with connected(kind, server) as c:
            with pytest.raises(ServerError, match="does not name its world"):
                await anext(c.stream("a hall"))

    run(test)


@both
def test_unknown_stats_are_ignored(kind):
    async def test():
        async with connected(kind, ScriptedServer(extra_stats={"new_in_2031": [1, {}]})) as c:
            assert (await anext(c.stream("a hall"))).stats.cache_tokens == 100.0

    run(test)


@both
def test_world(kind):
    async def test():
        server = ScriptedServer(latent_frames=3)
        async with connected(kind, server) as c:
            world = await c.world()
            assert (world.latent_frames_per_chunk, world.starts, world.native_fps) == (3, ("hall",), 20.0)
            await c.world()
        assert len(server.requests) == 1
        server = ScriptedServer()
        async with connected(kind, server) as c:
            stream = c.stream("a hall", frames=1)
            assert stream.world is None
            async for _ in stream:
                pass
            assert stream.world == await c.world()
        assert not any(r.start and r.end for r in server.requests)

    run(test)


def test_asking_for_the_world_may_fail():
    async def hung(requests):
        await asyncio.Event().wait()
        yield

    async def refusing(requests):
        yield ResourceExhausted("streams: 8 are open; allowed: 8")

    async def silent(requests):
        return
        yield

    async def test():
        for serve, error in ((hung, TimedOut), (refusing, ResourceExhausted), (silent, ServerError)):
            transport = fastar_client.transport.MockTransport(serve)
            async with connect(timeout=0.1, transport=transport) as c:
                with pytest.raises(error):
                    await c.world()
                if serve is not silent:  # it closes the stream itself, too
                    with pytest.raises(error):
                        await anext(c.stream("a hall", actions=["a", "b"]))

    run(test)


@both
def test_streams_of_one_connection_do_not_mix(kind):
    async def test():
        server = ScriptedServer(step_seconds=0.002)

        async def consume(c, action, frames):
            chunks = [chunk async for chunk in c.stream("a hall", actions=action, frames=frames)]
            assert sum(len(chunk.frames) for chunk in chunks) == frames
            assert {chunk.actions for chunk in chunks} == {(action,)}

        async with connected(kind, server) as c:
            await asyncio.gather(*(consume(c, f"a{i}", 10 + 3 * i) for i in range(6)))
        assert len({r.sequence_id for r in server.requests}) == 6
        assert len({(r.sequence_id, r.actions) for r in server.chunks}) == 6
        assert len(server.ends) == 6

    run(test)


@both
def test_pacing(kind):
    async def test():
        server = ScriptedServer()
        async with connected(kind, server) as c:
            chunks = [chunk async for chunk in c.stream("a hall", frames=24, fps=40)]  # 0.1 s a chunk
            sent = np.array([chunk.sent_at for chunk in chunks]) - chunks[0].received_at
            # Two at the start, the third when the first begins to play, then each when the one two before begins.
            assert sent[2] < 0.09
            assert (sent[3:] >= 0.1 * np.arange(1, 4) - 0.01).all()
            assert (sent[3:] < 0.1 * np.arange(1, 4) + 0.15).all()

    run(test)


def test_480p_chunks_pass():
    async def test():
        server = ScriptedServer(chunk_frames=12, height=480, width=832)  # 14 MB each; gRPC's own limit is 4
        async with connected("grpc", server) as c:
            async for chunk in c.stream("a hall", frames=24):
                assert chunk.frames.shape == (12, 480, 832, 3)

    run(test)


def test_a_connection_closed_under_a_call():
    async def test():
        async with grpc_server(ScriptedServer()) as url:
            transport = GrpcTransport(url)
            await transport.connect(5)
            call = transport.open()
            waiting = asyncio.create_task(call.receive())
            await asyncio.sleep(0.05)
            await transport.close()
            with pytest.raises(StreamLost, match="closed on this side"):
                await waiting
            call.half_close()

    run(test)


def test_health():
    async def test():
        for ready in (True, False):
            async with connected("grpc", ScriptedServer(ready=ready)) as c:
                assert await c.ready() is ready

    run(test)


def test_nothing_listens():
    async def test():
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"127.0.0.1:{unused.getsockname()[1]}"
            began = time.monotonic()
            with pytest.raises(ServerUnavailable, match=f"^no Triton server at {url}; start one with `fastar serve`$"):
                async with connect(url):
                    pass
            assert time.monotonic() - began < 2
        with pytest.raises(ServerUnavailable, match="no Triton server"):
            async with connect("no-such-host.invalid:8001"):
                pass

    run(test)


def test_something_else_listens():
    async def answer(reader, writer):
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def say_nothing(reader, writer):
        silent.append(writer)

    silent = []

    async def test():
        for talk in (answer, say_nothing):
            listener = await asyncio.start_server(talk, "127.0.0.1", 0)
            url = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            with pytest.raises(ServerUnavailable, match=url):
                async with connect(url, connect_timeout=0.5):
                    pass
            for writer in silent:
                writer.close()
                await writer.wait_closed()
            listener.close()
            await listener.wait_closed()
        bare = grpc.aio.server()
        url = f"127.0.0.1:{bare.add_insecure_port('127.0.0.1:0')}"
        await bare.start()
        with pytest.raises(ServerUnavailable, match="is no Triton server"):
            async with connect(url):
                pass
        await bare.stop(0)

    run(test)


def test_not_entered():
    async def test():
        with pytest.raises(ServerUnavailable, match="async with"):
            await anext(connect("localhost:1").stream("a hall"))

    run(test)


INVALID = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": "  "}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "é" * 2049}, "prompt"),
    ({"prompt": "\udc80"}, "prompt"),
    ({"frames": 0}, "frames"),
    ({"frames": -5}, "frames"),
    ({"frames": 1.5}, "frames"),
    ({"frames": True}, "frames"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "7"}, "seed"),
    ({"start": ""}, "start"),
    ({"fps": 0}, "fps"),
    ({"fps": float("nan")}, "fps"),
    ({"attention": "dense"}, "attention"),
    ({"attention": {"x": {1}}}, "attention"),
    ({"attention": {"x": float("nan")}}, "attention"),
    ({"actions": "x" * 257}, "actions"),
    ({"actions": ["forward", 3]}, "actions"),
    ({"actions": 3}, "actions"),
    ({"actions": b"forward"}, "actions"),
]


@pytest.mark.parametrize(("options", "field"), INVALID)
def test_invalid_arguments_are_named_before_anything_is_sent(options, field):
    async def test():
        server = ScriptedServer()
        async with connected("mock", server) as c:
            with pytest.raises(InvalidArgument, match="; allowed: ") as caught:
                c.stream(**{"prompt": "a hall"} | options)
            assert caught.value.field == field
            assert len(str(caught.value)) < 250
        assert not server.requests

    run(test)


@pytest.mark.parametrize("url", ["", "localhost", "http://localhost:8001", "localhost:port", "a b:1"])
def test_invalid_urls(url):
    with pytest.raises(InvalidArgument, match="^url: got .*; allowed: host:port"):
        connect(url)


def test_invalid_while_streaming_changes_nothing():
    async def test():
        server = ScriptedServer()
        async with connected("mock", server) as c, c.stream("a hall", actions="forward", frames=16) as stream:
            await anext(stream)
            for change in (stream.act("x" * 300), stream.prompt(""), stream.prompt("x" * 5000)):
                with pytest.raises(InvalidArgument):
                    await change
            async for _ in stream:
                pass
        assert {r.actions for r in server.chunks} == {("forward",)}

    run(test)


def test_the_limits_themselves_are_allowed():
    async def test():
        server = ScriptedServer()
        async with connected("grpc", server) as c:
            stream = c.stream("é" * 2048, actions="x" * 256, seed=np.int64(2**63 - 1), frames=1)
            assert [len(chunk.frames) async for chunk in stream] == [1]
        assert json.loads(server.requests[0].options) == {"seed": 2**63 - 1}

    run(test)


def test_public_names_and_imports():
    assert issubclass(TimedOut, FastarError)
    assert all(hasattr(fastar_client, name) for name in fastar_client.__all__)
    code = "import fastar_client, fastar_client.cli, sys; print({'torch', 'fastar_backend'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
