"""`StreamEngine`: opens, advances and closes streams. One call of `step` is one chunk for each stream in it.

A chunk is sampled from noise in a few steps (x0 = model(x); then re-noised with fresh noise to the next level),
decoded, and run through the model once more, nearly clean, to write its keys and values into the stream's caches
(Self-Forcing's sampler). Linear layers run on the whole batch; attention stream by stream, since caches differ in
length."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Sequence

import torch
from torch import Tensor

from fastar_backend.attention import CacheShape
from fastar_backend.attention.batch import StreamsAttend, StreamsAttendText
from fastar_backend.config import AttentionConfig
from fastar_backend.engine.stream import Chunk, ChunkRequest, ChunkStats, Stream, StreamOptions
from fastar_backend.errors import AtCapacity, FastarError, InvalidInput, UnknownStream
from fastar_backend.model.autoencoder import unit_rms
from fastar_backend.model.world import World, load_world

log = logging.getLogger(__name__)
PROMPT_BYTES = 4096
ACTION_BYTES = 256


class StreamEngine:
    """Not thread-safe: one caller at a time (Triton's instance)."""

    def __init__(
        self, world: World, attention: AttentionConfig, max_streams: int = 8, stream_bytes: int = 4 << 30
    ) -> None:
        """stream_bytes: caches of one stream may not grow beyond; dense attention and recall probes do grow."""
        self.world, self.attention, self.max_streams, self.stream_bytes = world, attention, max_streams, stream_bytes
        model, sampler = world.config.model, world.config.sampler
        weight = world.dit.head.head.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.shape = CacheShape(
            model.heads, model.head_dim, model.frame_tokens, sampler.latent_frames_per_chunk, model.rope_max_distance,
            model.rope_split, model.rope_theta, self.device, self.dtype,
        )  # fmt: skip
        self.latent_shape = (
            sampler.latent_frames_per_chunk, model.latent_channels, model.latent_height, model.latent_width,
        )  # fmt: skip
        self.streams: dict[int, Stream] = {}

    @classmethod
    def load(cls, world: str = "doom", device: str = "cpu", attention: AttentionConfig | None = None,
             max_streams: int = 8, dtype: torch.dtype = torch.float32) -> StreamEngine:  # fmt: skip
        """world: an embedded world's name or a folder. Raises WeightsError."""
        return cls(load_world(world, device, dtype), attention or AttentionConfig(), max_streams)

    def world_info(self) -> dict:
        return self.world.info()

    @property
    def stream_ids(self) -> tuple[int, ...]:
        return tuple(self.streams)

    @torch.inference_mode()
    def open(self, stream_id: int, prompt: str, options: StreamOptions | None = None) -> None:
        """Raises InvalidInput (prompt, options, an id in use) or AtCapacity."""
        options = options or StreamOptions()
        if stream_id in self.streams:
            raise InvalidInput("stream_id", f"{stream_id} is in use", "an id that no open stream has")
        if len(self.streams) >= self.max_streams:
            raise AtCapacity(f"stream: all {self.max_streams} slots are taken; allowed: try again when a stream ends")
        check_prompt(prompt)
        attention = options.attention or self.attention
        model = self.world.config.model
        token_bytes = 2 * model.dim * model.layers * self.dtype.itemsize
        if attention.kind != "dense" and attention.budget_frames * model.frame_tokens * token_bytes > self.stream_bytes:
            most = self.stream_bytes // (model.frame_tokens * token_bytes)
            raise InvalidInput("OPTIONS.attention.budget_frames", f"got {attention.budget_frames}", f"1..{most}")
        stream = Stream(self.world, self.shape, prompt, options, attention)
        if attention.kind != "dense" and stream.cache_bytes > self.stream_bytes:  # the chunk's room is in it, too
            most = f"less: these caches have {stream.cache_bytes} bytes of {self.stream_bytes}"
            raise InvalidInput("OPTIONS.attention.budget_frames", f"got {attention.budget_frames}", most)
        self.streams[stream_id] = stream

    def close(self, stream_id: int) -> bool:
        """Frees the stream's memory; False if there is no such stream."""
        return self.streams.pop(stream_id, None) is not None

    def sweep(self, idle_seconds: float) -> list[int]:
        """Closes the streams that were not stepped for so long; returns their ids."""
        limit = time.monotonic() - idle_seconds
        idle = [stream_id for stream_id, stream in self.streams.items() if stream.stepped < limit]
        for stream_id in idle:
            self.close(stream_id)
        return idle

    def warm_up(self, chunks: int = 3) -> float:
        """Runs a throw-away stream; returns the seconds of its last chunk."""
        self.open(-1, next(iter(self.world.config.scenarios.values())).prompt)
        try:
            for _ in range(chunks):
                (result,) = self.step([ChunkRequest(-1, ("",))])
                if isinstance(result, FastarError):
                    raise result
        finally:
            self.close(-1)
        return result.stats.step_seconds

    @torch.inference_mode()
    def step(self, requests: Sequence[ChunkRequest]) -> list[Chunk | FastarError]:
        """Advances each requested stream by one chunk; results in the order of the requests.

        A request that is wrong yields its error and changes nothing; a stream whose step fails is closed.
        """
        began = time.perf_counter()
        results: list[Chunk | FastarError | None] = [None] * len(requests)
        ready: list[tuple[int, Stream, Tensor]] = []
        for row, request in enumerate(requests):
            try:
                stream, actions = self._check(request, requests[:row])
                ready.append((row, stream, actions))
            except FastarError as error:
                results[row] = error
        for row, stream, _ in ready:
            if requests[row].prompt is not None:
                stream.set_prompt(requests[row].prompt)
        if ready:
            streams = [stream for _, stream, _ in ready]
            try:
                for stream in streams:
                    self._prefill(stream)
                frames, finite = self._advance(streams, torch.stack([actions for _, _, actions in ready]))
            except Exception as error:  # out of memory, a kernel's failure: these streams' states are unknown now
                # Without the message: it might quote a prompt.
                log.error("step of %d streams failed: %s\n%s", len(ready), type(error).__name__, where(error))
                for row, _, _ in ready:
                    self.close(requests[row].stream_id)
                    results[row] = FastarError(f"step: {type(error).__name__}; allowed: open a new stream")
                return results
            seconds = time.perf_counter() - began
            for (row, stream, _), video, ok in zip(ready, frames, finite, strict=True):
                if not ok:
                    self.close(requests[row].stream_id)
                    results[row] = FastarError("step: the model's output is not finite; allowed: open a new stream")
                    continue
                stats = self._finish(stream, video.shape[0], seconds, len(ready), requests[row].prompt is not None)
                results[row] = Chunk(requests[row].stream_id, video.numpy(), stats)
        return results

    def _check(self, request: ChunkRequest, earlier: Sequence[ChunkRequest]) -> tuple[Stream, Tensor]:
        stream = self.streams.get(request.stream_id)
        if stream is None:
            raise UnknownStream(f"stream_id: {request.stream_id} is not open; allowed: an opened, live stream")
        if any(other.stream_id == request.stream_id for other in earlier):
            raise InvalidInput("stream_id", f"{request.stream_id} twice in one step", "one request a stream")
        if stream.cache_bytes > self.stream_bytes:
            self.close(request.stream_id)
            raise AtCapacity(
                f"stream: its caches have {stream.cache_bytes} bytes; allowed: {self.stream_bytes} a stream, "
                "which fastar and window attention without measure_recall never exceed"
            )
        frames = self.shape.chunk_frames
        if len(request.actions) not in (1, frames):
            raise InvalidInput("ACTIONS", f"{len(request.actions)} elements", f"1 or {frames}")
        if request.prompt is not None:
            check_prompt(request.prompt)
        vectors = []
        for index, action in enumerate(request.actions):
            if len(action.encode()) > ACTION_BYTES:
                raise InvalidInput(f"ACTIONS[{index}]", f"{len(action.encode())} bytes", f"at most {ACTION_BYTES}")
            vectors.append(self.world.action_vector(action, f"ACTIONS[{index}]"))
        return stream, torch.stack(vectors).expand(frames, -1).to(self.device, self.dtype)

    def _prefill(self, stream: Stream) -> None:
        """Writes the start's real frames, if any, into a fresh stream's caches."""
        if stream.pending_start is None:
            return
        latents, actions = stream.pending_start
        stream.pending_start = None
        frames = self.shape.chunk_frames
        for x0, action in zip(
            latents.split(self.shape.chunk_frames), actions.split(self.shape.chunk_frames), strict=True
        ):
            stream.begin_chunk()
            self.write([stream], x0[None], action[None])
            stream.latent_frame += frames

    def _advance(self, streams: list[Stream], actions: Tensor) -> tuple[list[Tensor], list[bool]]:
        """actions: [streams, latent frames, buttons] -> uint8 [frames, height, width, 3] each, and whether all
        finite."""
        for stream in streams:
            stream.begin_chunk()
        x0 = self.sample(streams, actions)
        self.write(streams, x0, actions)
        return list(self.decode(x0)), x0.isfinite().flatten(1).all(1).tolist()

    def sample(self, streams: list[Stream], actions: Tensor) -> Tensor:
        """Clean latents [streams, latent frames, C, h, w] of the streams' next chunk (each after `begin_chunk`)."""
        sigmas = self.world.config.sampler.sigmas
        x0 = torch.zeros(len(streams), *self.latent_shape, device=self.device, dtype=self.dtype)
        for index, sigma in enumerate(sigmas):
            x = (1 - sigma) * x0 + sigma * self._noise(streams)
            output = self._forward(streams, x, sigma, actions, progress=index / len(sigmas), write=False)
            x0 = output if self.world.config.model.prediction == "x0" else x - sigma * output
        return unit_rms(x0, 2) if self.world.config.sampler.unit_latents else x0

    def write(self, streams: list[Stream], x0: Tensor, actions: Tensor) -> None:
        """The pass that writes a chunk into the caches, at the sampler's context noise (0: the clean pass)."""
        level = self.world.config.sampler.context_noise
        x = (1 - level) * x0 + level * self._noise(streams) if level else x0
        self._forward(streams, x, level, actions, progress=1.0, write=True)

    def decode(self, x0: Tensor) -> Tensor:
        """Latents [streams, latent frames, C, h, w] -> uint8 [streams, frames, height, width, 3] on the CPU."""
        video = self.world.autoencoder.decode(x0.flatten(0, 1)).unflatten(0, (len(x0), -1)).flatten(1, 2)
        pixels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pixels.permute(0, 1, 3, 4, 2).contiguous().cpu()

    def _noise(self, streams: list[Stream]) -> Tensor:
        return torch.stack([stream.draw(self.latent_shape) for stream in streams]).to(self.device, self.dtype)

    def _forward(self, streams: list[Stream], x: Tensor, sigma: float, actions: Tensor, *, progress: float,
                 write: bool) -> Tensor:  # fmt: skip
        layers = range(self.world.config.model.layers)
        attend = [
            StreamsAttend(
                self.shape, [s.caches[i] for s in streams], [s.probes[i] for s in streams],
                progress=progress, write=write,
            )
            for i in layers
        ]  # fmt: skip
        cross = [StreamsAttendText([s.text[i] for s in streams]) for i in layers]
        level = torch.full(x.shape[:2], sigma, device=self.device)
        return self.world.dit(x, level, actions, attend, cross)

    def _finish(self, stream: Stream, frames: int, seconds: float, batch: int, prompt_applied: bool) -> ChunkStats:
        caches, mean = stream.caches, lambda values: sum(values) / len(stream.caches)
        recall = [probe.recall for probe in stream.probes if probe is not None]
        stats = ChunkStats(
            chunk=stream.chunk,
            first_frame=stream.frame,
            frames=frames,
            cache_tokens=mean(cache.tokens for cache in caches),
            cache_bytes=stream.cache_bytes,
            density=sum(cache.executed for cache in caches) / sum(cache.possible for cache in caches),
            recall=sum(recall) / len(recall) if recall else None,
            merged_tokens=mean(getattr(cache, "merged", 0.0) for cache in caches),
            text_tokens=mean(text.kept for text in stream.text),
            step_seconds=seconds,
            batch=batch,
            prompt_applied=prompt_applied,
        )
        stream.chunk += 1
        stream.frame += frames
        stream.latent_frame += self.shape.chunk_frames
        stream.stepped = time.monotonic()
        return stats


def where(error: Exception) -> str:
    """The traceback's lines, without the exception's message."""
    return "".join(traceback.format_tb(error.__traceback__))


def check_prompt(prompt: str) -> None:
    """Raises InvalidInput unless the prompt is 1..4096 bytes of text, not all white space."""
    size = len(prompt.encode())
    if not prompt.strip():
        raise InvalidInput("PROMPT", "it is empty", f"1 to {PROMPT_BYTES} bytes of UTF-8 text")
    if size > PROMPT_BYTES:
        raise InvalidInput("PROMPT", f"it has {size} bytes", f"1 to {PROMPT_BYTES} bytes of UTF-8 text")
