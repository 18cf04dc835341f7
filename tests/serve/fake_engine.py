"""A stand-in engine, for failures that the real one does not have: it crashes, stalls and grows on demand.

`install()` puts it where model.py imports the engine from; it is called inside Triton's model process only.
"""

from __future__ import annotations

import sys
import time
import types

import numpy as np

from fastar_backend.engine.stream import Chunk, ChunkStats
from fastar_backend.errors import AtCapacity, InvalidInput, UnknownStream, WeightsError

HEIGHT, WIDTH, FRAMES = 64, 96, 4


class StreamEngine:
    def __init__(self, max_streams: int) -> None:
        self.max_streams = max_streams
        self.streams: dict[int, list] = {}

    @classmethod
    def load(cls, world="doom", device="cpu", attention=None, max_streams=8):
        if world != "doom":
            raise WeightsError(f"{world}: no checkpoint here")
        return cls(max_streams)

    def world_info(self) -> dict:
        return {
            "name": "fake",
            "height": HEIGHT,
            "width": WIDTH,
            "chunk_frames": FRAMES,
            "latent_frames_per_chunk": 1,
            "buttons": ["forward", "crash", "stall"],
            "starts": ["nothing"],
            "scenarios": [],
            "native_fps": 8.0,
        }

    def open(self, stream_id, prompt, options) -> None:
        if not prompt:
            raise InvalidInput("PROMPT", "is empty", "text")
        if len(self.streams) >= self.max_streams:
            raise AtCapacity(f"streams: {self.max_streams} are open; allowed: {self.max_streams}")
        self.streams[stream_id] = [options.seed, 0, time.monotonic(), np.ones(64 << 20, np.uint8), prompt]

    def step(self, requests):
        return [self._one(request, len(requests)) for request in requests]

    def _one(self, request, batch):
        state = self.streams.get(request.stream_id)
        if state is None:
            return UnknownStream("stream: never opened, ended or idle; allowed: an open stream")
        if "crash" in request.actions:
            raise ZeroDivisionError(f"cannot divide {state[4]}")
        if "stall" in request.actions:
            time.sleep(3)
        seed, chunk = state[:2]
        state[1], state[2] = chunk + 1, time.monotonic()
        frames = np.random.default_rng([seed, chunk]).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), np.uint8)
        stats = ChunkStats(chunk, chunk * FRAMES, FRAMES, 0.0, 64 << 20, 1.0, None, 0.0, 0.0, 0.0, batch, False)
        return Chunk(request.stream_id, frames, stats)

    def close(self, stream_id) -> bool:
        return self.streams.pop(stream_id, None) is not None

    def sweep(self, idle_seconds) -> list[int]:
        old = [key for key, state in self.streams.items() if time.monotonic() - state[2] > idle_seconds]
        return [key for key in old if self.close(key)]

    @property
    def stream_ids(self) -> tuple[int, ...]:
        return tuple(self.streams)

    def warm_up(self) -> float:
        return 0.0


def install() -> None:
    module = types.ModuleType("fastar_backend.engine.engine")
    module.StreamEngine = StreamEngine
    sys.modules[module.__name__] = module
