"""A stream's chunk as a CUDA graph: thousands of kernels by one call of the host, so that a slow host does not hold the
GPU up.

A stream whose caches are full does the same work every chunk on the same tensors; only the place of the chunk in the
caches' ring changes, and the layers that the quality guard looks at, so there is one recording for each. What does
change goes into tensors that stay: noise, actions, the prompt's keys and values (`TextCache.take`), temporal positions
and the guard's samples (`FlatCaches.prepare`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastar_backend.attention import guard
from fastar_backend.attention.cache import HALF
from fastar_backend.config import ExecutionConfig
from fastar_backend.engine.stream import Stream

Kind = tuple[int, float, int]  # of a chunk: its place in the ring, AnnSA's density, the guard's turn

MOST = 32  # recordings of a stream: a client may change the density with every chunk


class Recording(Protocol):
    outputs: tuple[Tensor, ...]  # written anew by every replay

    def replay(self) -> None: ...


class Recorder(Protocol):
    def record(self, act: Callable[[], tuple[Tensor, ...]]) -> Recording:
        """Calls `act` once; its work on the device is recorded, not done."""


class CudaRecording:
    def __init__(self, act: Callable[[], tuple[Tensor, ...]], pool: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile (snapshots on their way to the store).
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = act()

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """All recordings share one pool of memory: they never run side by side. The pool outlives them."""

    def __init__(self) -> None:
        self.pool = torch.cuda.MemPool()

    def record(self, act: Callable[[], tuple[Tensor, ...]]) -> CudaRecording:
        return CudaRecording(act, self.pool.id)


def recorder_for(weight: Tensor, execution: ExecutionConfig) -> CudaRecorder | None:
    """None where nothing can be recorded, or starting at once is preferred."""
    half = weight.is_cuda and weight.dtype in HALF
    return CudaRecorder() if half and execution.compile is not False else None


class StreamGraphs:
    """The recordings of one stream."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.inputs: tuple[Tensor, ...] = ()
        self.seen: set[Kind] = set()
        self.recorded: dict[Kind, tuple[Recording, Any, list[Any]]] = {}

    def ready(self, stream: Stream) -> bool:
        """Whether the stream's next chunk does the same work on the same tensors as one before: not before its caches
        are full. The first chunk of a kind is computed: it makes what kernels and lookup tables need."""
        if not getattr(stream.caches, "full", False):  # FlatCaches have it
            return False
        key = self._key(stream)
        known = key in self.seen
        self.seen.add(key)
        return known

    def _key(self, stream: Stream) -> Kind:
        caches, attention = stream.caches, stream.attention
        chunk = stream.latent_frame // caches.shape.chunk_frames
        return caches.own, attention.sparse_density, guard.turn(attention, len(caches), chunk)

    def run(self, stream: Stream, inputs: tuple[Tensor, ...], act: Callable[..., Tensor]) -> Tensor:
        """act(*inputs) -> clean latents, with all that the chunk does to the caches but the host's books (`took`). The
        result is overwritten by the stream's next chunk at this place of the ring."""
        caches = stream.caches
        if not self.inputs:
            self.inputs = tuple(torch.empty_like(value) for value in inputs)
        for mine, value in zip(self.inputs, inputs, strict=True):
            mine.copy_(value, non_blocking=True)
        key = self._key(stream)
        if key not in self.recorded:
            if len(self.recorded) >= MOST:
                self.recorded.clear()
                self.seen.clear()
            recording = self.recorder.record(lambda: self._work(stream, act))
            self.recorded[key] = recording, caches.work, [text.kept for text in stream.text]
        recording, caches.work, kept = self.recorded[key]
        recording.replay()
        for text, value in zip(stream.text, kept, strict=True):
            if isinstance(value, Tensor):  # AnnCA's count is the recording's own; any other is the prompt's
                text.kept = value
        caches.took()
        return recording.outputs[0]

    def _work(self, stream: Stream, act: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x0 = act(*self.inputs)
        kept = [text.kept for text in stream.text if isinstance(text.kept, Tensor)]
        return x0, *stream.caches.work.tensors, *kept
