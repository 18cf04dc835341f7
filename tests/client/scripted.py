"""A scripted server of the wire protocol, in memory or behind real gRPC, that records what it was asked."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator

import grpc
import numpy as np
import pytest
import trustme
from fastar_client.errors import FastarError, from_server
from fastar_client.protocol import MODEL, ChunkRequest, Reply
from fastar_client.session import Connection, connect
from fastar_client.transport import MockTransport
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor

# Rates that a busy machine misses: a fault in the code misses them every time.
BUSY = pytest.mark.flaky(reruns=3, reruns_delay=1)


class Died(Exception):
    """The server's end of the connection breaks."""


@dataclasses.dataclass
class ScriptedServer:
    """Every pixel of frame f of a stream is f mod 256. `faults` maps a chunk number to what happens in its place:
    a string is an error message, a Reply a (wrong) reply, an exception breaks the connection, a function is called
    and returns one of these; `hang` waits for ever, `finish` ends the call."""

    chunk_frames: int = 4
    latent_frames: int = 2
    height: int = 16
    width: int = 24
    step_seconds: float = 0.0
    delays: dict[int, float] = dataclasses.field(default_factory=dict)  # chunk number -> further seconds before it
    faults: dict[int, object] = dataclasses.field(default_factory=dict)
    extra_stats: dict[str, object] = dataclasses.field(default_factory=dict)
    ready: bool = True
    gate: asyncio.Semaphore | None = None  # one permit per reply
    requests: list[ChunkRequest] = dataclasses.field(default_factory=list)
    most_unanswered: int = 0
    token: str | None = None  # without one, no stream can be resumed
    pod: str | None = None  # what a gateway in front of it would call it
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)  # of each gRPC call, ours only

    hang = "hang"
    finish = "finish"

    @property
    def chunks(self) -> list[ChunkRequest]:
        """The requests that asked for a chunk."""
        return [r for r in self.requests if r.actions not in (("end",), ("control",))]

    @property
    def controls(self) -> list[dict]:
        return [json.loads(r.control) for r in self.requests if r.control is not None]

    @property
    def ends(self) -> list[ChunkRequest]:
        """The requests that ended a stream which generated something."""
        return [r for r in self.requests if r.end and not r.start]

    async def serve(self, requests: AsyncIterator[ChunkRequest]) -> AsyncIterator[Reply | str]:
        queue: asyncio.Queue[ChunkRequest | None] = asyncio.Queue()
        unanswered = 0

        async def read() -> None:
            nonlocal unanswered
            async for request in requests:
                self.requests.append(request)
                unanswered += not request.end
                self.most_unanswered = max(self.most_unanswered, unanswered)
                queue.put_nowait(request)
            queue.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            chunk = 0
            while (request := await queue.get()) is not None:
                if request.actions == ("end",):
                    yield self.reply(-1 if chunk else 0, 0, world=request.start)
                    continue
                if self.gate:
                    await self.gate.acquire()
                await asyncio.sleep(self.step_seconds + self.delays.get(chunk, 0.0))
                fault = self.faults.get(chunk)
                if callable(fault):
                    fault = fault()
                if fault == self.hang:
                    await asyncio.Event().wait()
                if fault == self.finish:
                    return
                if isinstance(fault, Exception):
                    raise fault
                unanswered -= 1
                yield fault or self.reply(chunk, self.chunk_frames, world=chunk == 0, prompt=bool(request.prompt))
                chunk += 1
        finally:
            reader.cancel()
            await asyncio.wait({reader})

    def reply(self, chunk: int, frames: int, world: bool = False, prompt: bool = False, **changed: object) -> Reply:
        first = chunk * self.chunk_frames
        stats = {
            "chunk": chunk,
            "first_frame": first,
            "frames": frames,
            "cache_tokens": min(chunk + 1, 4) * 100.0,
            "cache_bytes": 1000,
            "density": 0.5,
            "recall": None,
            "merged_tokens": 0.0,
            "text_tokens": 5.0,
            "step_seconds": 0.01,
            "batch": 1,
            "prompt_applied": prompt,
            "process_bytes": 2**30,
        }
        if world:
            stats["token"] = self.token
            stats["world"] = {
                "name": "test",
                "height": self.height,
                "width": self.width,
                "chunk_frames": self.chunk_frames,
                "latent_frames_per_chunk": self.latent_frames,
                "buttons": ["forward", "turn_left"],
                "starts": ["hall"],
                "scenarios": {"hall": "a stone hall"},
                "native_fps": 20.0,
                "unknown_to_this_client": 1,
            }
        stats |= self.extra_stats | changed
        stats |= {"encoding": "raw", "packets": []} | stats
        numbers = (np.arange(first, first + frames) % 256).astype(np.uint8)
        pixels = np.broadcast_to(numbers[:, None, None, None], (frames, self.height, self.width, 3))
        return Reply(np.ascontiguousarray(pixels)[None], np.frombuffer(json.dumps(stats).encode(), np.uint8)[None])


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """`ScriptedServer` behind KServe v2 gRPC. The status that breaks a connection is `status`."""

    def __init__(self, server: ScriptedServer, status: grpc.StatusCode) -> None:
        self.server, self.status = server, status

    async def ServerLive(self, request, context):
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request, context):
        return pb.ServerReadyResponse(ready=True)

    async def ModelReady(self, request, context):
        return pb.ModelReadyResponse(ready=self.server.ready and request.name == MODEL)

    async def ModelStreamInfer(self, request_iterator, context):
        headers = {key: value for key, value in context.invocation_metadata() if key.startswith("x-fastar-")}
        self.server.headers.append(headers)
        if self.server.pod not in (None, headers.get("x-fastar-pod")):
            await context.send_initial_metadata([("x-fastar-pod", self.server.pod)])

        async def requests() -> AsyncIterator[ChunkRequest]:
            async for message in request_iterator:
                yield decode_request(message)

        try:
            async with contextlib.aclosing(self.server.serve(requests())) as replies:
                async for reply in replies:
                    yield encode_reply(reply)
        except Died as death:
            await context.abort(self.status, str(death))


def decode_request(message: pb.ModelInferRequest) -> ChunkRequest:
    assert message.model_name == MODEL
    names = ("ACTIONS", "PROMPT", "OPTIONS", "CONTROL")[: len(message.inputs)]
    assert [(i.name, i.datatype) for i in message.inputs] == [(name, "BYTES") for name in names]
    texts = []
    for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True):
        texts.append(tuple(text.decode() for text in deserialize_bytes_tensor(raw)))
        assert list(tensor.shape) == [1, len(texts[-1])]
    flags = message.parameters
    return ChunkRequest(
        flags["sequence_id"].int64_param,
        texts[0],
        texts[1][0],
        texts[2][0],
        start=flags["sequence_start"].bool_param,
        end=flags["sequence_end"].bool_param,
        queue_seconds=flags["timeout"].int64_param / 1e6 if "timeout" in flags else None,
        control=texts[3][0] if len(texts) > 3 else None,
    )


def encode_reply(reply: Reply | str) -> pb.ModelStreamInferResponse:
    if isinstance(reply, str):
        return pb.ModelStreamInferResponse(error_message=reply)
    response = pb.ModelInferResponse(model_name=MODEL)
    for name, array in (("FRAMES", reply.frames), ("VIDEO", reply.video), ("STATS", reply.stats)):
        if array is not None:
            response.outputs.add(name=name, datatype="UINT8", shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
    return pb.ModelStreamInferResponse(infer_response=response)


@contextlib.asynccontextmanager
async def grpc_server(
    server: ScriptedServer, status: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE, authority: trustme.CA | None = None
) -> AsyncIterator[str]:
    """Yields its host:port. authority: who signed its certificate and must have signed the client's; None: no TLS."""
    listener = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(server, status), listener)
    if authority is None:
        port = listener.add_insecure_port("127.0.0.1:0")
    else:
        ours = authority.issue_cert("localhost")
        pair = (ours.private_key_pem.bytes(), ours.cert_chain_pems[0].bytes())
        credentials = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), require_client_auth=True)
        port = listener.add_secure_port("127.0.0.1:0", credentials)
    await listener.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await listener.stop(0)


@contextlib.asynccontextmanager
async def connected(kind: str, server: ScriptedServer, timeout: float = 5.0, **options) -> AsyncIterator[Connection]:
    """A client of `server` over `kind` ("mock" or "grpc")."""
    if kind == "mock":

        async def serve(requests: AsyncIterator[ChunkRequest]) -> AsyncIterator[Reply | FastarError]:
            async with contextlib.aclosing(server.serve(requests)) as replies:
                async for reply in replies:
                    yield from_server(reply) if isinstance(reply, str) else reply

        async with connect(timeout=timeout, transport=MockTransport(serve), **options) as connection:
            yield connection
    else:
        async with grpc_server(server) as url, connect(url, timeout=timeout, **options) as connection:
            yield connection


@contextlib.contextmanager
def threaded_server(server: ScriptedServer, **options) -> Iterator[str]:
    """`grpc_server` (with its options) in a thread of its own, for callers that block. Yields its host:port."""
    url: list[str] = []
    started, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with grpc_server(server, **options) as at:
            url.append(at)
            started.set()
            while not stop.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(10)
    try:
        yield url[0]
    finally:
        stop.set()
        thread.join()


async def until(condition, seconds: float = 3.0) -> None:
    """Waits for `condition()`, and fails where it does not come true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def serve_until_chunk_8() -> None:
    crash = {8: lambda: os.kill(os.getpid(), signal.SIGKILL)}
    async with grpc_server(ScriptedServer(step_seconds=0.02, faults=crash)) as url:
        print(url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":  # a process of its own, that dies
    asyncio.run(serve_until_chunk_8())
