"""The client against a real server: shared memory, controls, and a stream that survives its model process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from fastar_client import InvalidArgument, ResourceExhausted, connect

from fastar_backend.serve import Server, ServeSettings

pytestmark = pytest.mark.server
PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
SMALL = {"kind": "fastar", "budget_frames": 4, "recent_frames": 2}


@pytest.fixture(scope="module")
def server(tiny_world):
    # Deterministic, as what is made again is compared with what was made before.
    service = {"max_streams": 3, "deterministic": True, "snapshot_chunks": 4, "snapshots_kept": 4}
    with Server(ServeSettings(**PORTS, world=str(tiny_world), device="cpu", attention=SMALL, **service)) as server:
        yield server


def run(test) -> None:
    async def limited() -> None:
        async with asyncio.timeout(120):
            await test()

    asyncio.run(limited())


def pixels(chunks) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in chunks])


def regions() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("fastarclient_*")}


async def take(stream, count: int) -> list:
    return [await anext(stream) for _ in range(count)]


def test_shared_memory(server):
    async def test():
        async with connect(server.grpc_url) as c, c.stream("a maze", actions="forward", seed=3) as stream:
            expected = pixels(await take(stream, 5))
        async with connect(server.grpc_url, shared_memory=True) as c:
            before = regions()
            async with c.stream("a maze", actions="forward", seed=3) as stream:
                chunks = await take(stream, 5)
                assert len(regions() - before) == 3
                assert stream._link._call._ring.used >= 5
                receipt = await stream.act("turn_left")
                await take(stream, 3)
                await receipt.applied()
            assert regions() == before
        assert (pixels(chunks) == expected).all()

    run(test)


def test_controls(server):
    async def test():
        async with connect(server.grpc_url) as c, c.stream("a maze", actions="forward", seed=3) as stream:
            await take(stream, 2)
            receipts = [await stream.act(""), await stream.prompt("a green cavern", 2), await stream.set_density(0.5)]
            receipts += [await stream.set_seed(9), await stream.snapshot()]
            refused = await stream.rewind(10**6)
            for receipt in receipts:
                await receipt.received()
            with pytest.raises(InvalidArgument, match="rewind"):
                await refused.received()
            ahead = await take(stream, 5)
            stored = await receipts[-1].applied()
            assert all([2 <= await receipt.applied() <= 4 for receipt in receipts])
            while ahead[-1].stats.snapshot_chunk is None or ahead[-1].stats.snapshot_chunk < stored:
                ahead += await take(stream, 1)
            back = await stream.rewind(stored)
            await back.received()
            behind = await take(stream, 6)
            assert await back.applied() == stored
            first = [chunk.stats.chunk for chunk in behind].index(stored)
            ours = next(i for i, chunk in enumerate(ahead) if chunk.stats.chunk == stored)
            assert (behind[first].frames == ahead[ours].frames).all()
            await (await stream.pause()).received()
            await (await stream.play()).received()
            await take(stream, 3)
            for encoding in ("jpeg", "h264", "raw"):
                applied = asyncio.create_task((await stream.set_encoding(encoding)).applied())
                chunks = await take(stream, 4)
                assert await applied
                assert chunks[-1].stats.encoding == encoding
                assert chunks[-1].frames.shape == chunks[0].frames.shape
            async with c.fork(stream.token) as fork:
                assert (await take(fork, 1))[0].stats.chunk > stored
                assert fork.token != stream.token

    run(test)


def test_a_stream_survives_its_model_process(server):
    async def steered(stream, kill_after: int) -> list:
        chunks = []
        async for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == 3:
                await (await stream.prompt("a green cavern")).received()
            if len(chunks) == 7:
                await (await stream.set_density(0.6)).received()
            if len(chunks) == kill_after:
                for process in server.model_processes:
                    process.kill()
            if len(chunks) == 14:
                return chunks
        return chunks

    async def test():
        async with connect(server.grpc_url, reconnect_seconds=90) as c:
            options = c.stream("a maze", seed=3).options
            expected = await steered(c.open(options, "forward", in_flight=1), 0)
            stream = c.open(options, "forward", in_flight=1)
            chunks = await steered(stream, 9)
            assert stream.reconnects == 1
        assert [chunk.stats.chunk for chunk in chunks] == list(range(14))
        assert [chunk.stats.applied for chunk in chunks] == [chunk.stats.applied for chunk in expected]
        assert (pixels(chunks) == pixels(expected)).all()

    run(test)


def test_a_full_server_says_when_to_retry(server):
    async def test():
        async with connect(server.grpc_url) as c:
            streams = [c.stream("a maze") for _ in range(3)]
            for stream in streams:
                await anext(stream)
            with pytest.raises(ResourceExhausted, match="retry in"):
                await anext(c.stream("a maze"))

    run(test)
