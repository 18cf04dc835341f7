"""What a step costs, measured before the first stream comes: kernels are compiled by it, graphs recorded."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from fastar_backend.attention import FrameCache
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import ChunkRequest, Stream, StreamOptions
from fastar_backend.errors import FastarError

FIRST = 3  # steps that are not counted: compilation; recording at each place of a cache's ring


@torch.inference_mode()
def costs(engine: StreamEngine, sizes: Sequence[int], steps: int = 3) -> dict[int, float]:
    """Seconds of a step by the number of streams in it, all caches full (median)."""
    prompt = next((scenario.prompt for scenario in engine.world.config.scenarios.values()), "a world")
    streams = {}
    for index in range(max(sizes)):
        options = StreamOptions(start="nothing", seed=index)
        stream = Stream(engine.world, engine.shape, prompt, options, engine.attention, engine.runtime)
        fill(engine, stream)
        streams[-1 - index] = stream
    engine.streams |= streams
    first = FIRST if engine.device.type == "cuda" else 1
    try:
        found = {}
        for size in sizes:
            seconds = []
            for _ in range(first + steps):
                began = time.perf_counter()
                for result in engine.step([ChunkRequest(number, ("",)) for number in list(streams)[:size]]):
                    if isinstance(result, FastarError):
                        raise result
                seconds.append(time.perf_counter() - began)
            found[size] = sorted(seconds[first:])[steps // 2]
        return found
    finally:
        for number in streams:
            engine.close(number)


def fill(engine: StreamEngine, stream: Stream) -> None:
    """Random history, as much as the budget holds and a little more."""
    for _ in range(stream.attention.budget_frames // engine.shape.chunk_frames + 2):
        fill_chunk(engine, stream)


@torch.inference_mode()
def fill_chunk(engine: StreamEngine, stream: Stream) -> None:
    """A chunk of random keys and values, as if it had been generated."""
    shape = engine.shape
    like = (shape.chunk_tokens, shape.heads, shape.head_dim)
    stream.begin_caches()
    for cache in stream.caches:
        query, key, value = (torch.randn(like, device=engine.device, dtype=engine.dtype) for _ in range(3))
        if isinstance(cache, FrameCache):
            cache.append(*(x.transpose(0, 1) for x in (query, key, value)))
        else:
            cache.attend(query, key, value, progress=1.0, write=True)
    stream.caches.commit()
    stream.latent_frame += shape.chunk_frames
