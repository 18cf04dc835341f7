"""`StreamEngine`: opens, advances and closes streams. One call of `step` is one chunk for each stream in it.

A chunk is sampled from noise in a few steps (x0 = model(x); then re-noised with fresh noise to the next level),
decoded, and run through the model once more, nearly clean, to write its keys and values into the stream's caches
(Self-Forcing's sampler). Linear layers run on the whole batch; attention stream by stream, since caches differ in
length."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastar_backend.attention import CacheShape, bytes_of_caches
from fastar_backend.config import AttentionConfig, ExecutionConfig
from fastar_backend.engine.checks import check_attention, check_device, check_memory
from fastar_backend.engine.graphs import Recorder, StreamGraphs, recorder_for
from fastar_backend.engine.reuse import Reuse
from fastar_backend.engine.runtime import Runtime, TorchRuntime, engine_dtype, make_runtime
from fastar_backend.engine.snapshot import Snapshot, fingerprint
from fastar_backend.engine.stream import Chunk, ChunkRequest, ChunkStats, Stream, StreamOptions
from fastar_backend.errors import AtCapacity, FastarError, InvalidInput, SnapshotError, UnknownStream
from fastar_backend.model.autoencoder import unit_rms
from fastar_backend.model.decoder import state_bytes
from fastar_backend.model.tuning import tune
from fastar_backend.model.world import World, load_world

log = logging.getLogger(__name__)
PROMPT_BYTES = 4096
ACTION_BYTES = 256


class StreamEngine:
    """Not thread-safe: one caller at a time (Triton's instance)."""

    def __init__(
        self, world: World, attention: AttentionConfig, max_streams: int = 8, stream_bytes: int | None = None,
        deterministic: bool = False, recorder: Recorder | None = None, runtime: Runtime | None = None,
    ) -> None:  # fmt: skip
        """stream_bytes: caches of one stream may not grow beyond; dense attention and recall probes do grow. None: 4
        GiB, or what the default attention takes.
        deterministic: streams are computed one by one, so that no bit of one depends on who shares its step. recorder:
        makes CUDA graphs of the chunks of streams whose caches are full (one by one, too). runtime: None is PyTorch.
        Raises InvalidInput."""
        check_attention(attention, world.config.sampler.latent_frames_per_chunk, "attention")
        self.world, self.attention, self.max_streams = world, attention, max_streams
        self.deterministic, self.recorder = deterministic, recorder
        model, sampler = world.config.model, world.config.sampler
        self.shape = cache_shape(world)
        self.device, self.dtype = self.shape.device, self.shape.dtype
        self.runtime = runtime or TorchRuntime(world, self.shape)
        self.runtime.check(attention, "attention")
        self.latent_shape = (
            sampler.latent_frames_per_chunk, model.latent_channels, model.latent_height, model.latent_width,
        )  # fmt: skip
        self.streams: dict[int, Stream] = {}
        self.stream_bytes = stream_bytes or max(4 << 30, self._bounded_bytes(attention))

    @classmethod
    def load(cls, world: str = "doom", device: str = "cpu", attention: AttentionConfig | None = None,
             max_streams: int = 8, dtype: torch.dtype | None = None, *, deterministic: bool = False,
             execution: ExecutionConfig | None = None) -> StreamEngine:  # fmt: skip
        """world: an embedded world's name or a folder. dtype: None is the world's own, or a TensorRT
        engine's. Raises WeightsError, InvalidInput."""
        check_device(device)
        if torch.device(device).type == "cuda":
            torch.backends.cudnn.benchmark = True  # all of a world's convolutions have one shape
        execution, attention = execution or ExecutionConfig(), attention or AttentionConfig()
        loaded = load_world(world, device, dtype or engine_dtype(execution))
        runtime = make_runtime(loaded, cache_shape(loaded), attention, execution)
        tune(loaded, execution)
        engine = cls(
            loaded, attention, max_streams, deterministic=deterministic,
            recorder=recorder_for(loaded.dit.head.head.weight, execution), runtime=runtime,
        )  # fmt: skip
        check_memory(engine.device, engine.attention, engine._bounded_bytes, max_streams)
        return engine

    def world_info(self) -> dict:
        return self.world.info()

    @property
    def stream_ids(self) -> tuple[int, ...]:
        return tuple(self.streams)

    @torch.inference_mode()
    def open(self, stream_id: int, prompt: str, options: StreamOptions | None = None) -> None:
        """Raises InvalidInput (prompt, options, an id in use) or AtCapacity."""
        options = options or StreamOptions()
        self._check_free(stream_id)
        check_prompt(prompt)
        attention = options.attention or self.attention
        check_attention(attention, self.shape.chunk_frames, "OPTIONS.attention")
        if attention.bounded and (needed := self._bounded_bytes(attention)) > self.stream_bytes:
            frames = attention.budget_frames * self.stream_bytes // needed
            most = f"about {frames} ({needed} bytes are more than a stream's {self.stream_bytes})"
            raise InvalidInput("OPTIONS.attention.budget_frames", f"got {attention.budget_frames}", most)
        stream = Stream(self.world, self.shape, prompt, options, attention, self.runtime)
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

    def bytes_of(self, options: StreamOptions) -> int:
        """Bytes of caches of a stream with these options; without a budget or with recall probes, the limit itself."""
        attention = options.attention or self.attention
        if not attention.bounded or options.measure_recall:
            return self.stream_bytes
        return self._bounded_bytes(attention)

    def _bounded_bytes(self, attention: AttentionConfig) -> int:
        model = self.world.config.model
        decoder = state_bytes(self.world.decoder, model.latent_height, model.latent_width, self.dtype)
        return decoder + bytes_of_caches(self.shape, attention, model.layers)

    # Controls and snapshots of one stream

    def check_control(self, stream_id: int, kind: str, value: object, blend_chunks: int = 0) -> None:
        """kind: prompt, density, seed. Raises InvalidInput, UnknownStream; changes nothing."""
        stream, field = self._stream(stream_id), f"CONTROL.{kind}"
        if kind == "prompt":
            if not isinstance(value, str):
                raise InvalidInput(field, f"got {type(value).__name__}", f"1 to {PROMPT_BYTES} bytes of UTF-8 text")
            check_prompt(value, field)
        elif kind == "density":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise InvalidInput(field, f"got {value!r:.40}", "more than 0, at most 1")
            if stream.attention.kind != "fastar":
                raise InvalidInput(field, f"this stream's attention is {stream.attention.kind}", "fastar attention")
            self.runtime.check(stream.attention.model_copy(update={"sparse_density": float(value)}), "CONTROL")
        elif kind == "seed":
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
                raise InvalidInput(field, f"got {value!r:.40}", "0..2^63-1")
        else:
            raise InvalidInput("CONTROL", f"got {kind!r:.40}", "prompt, density, seed")

    @torch.inference_mode()
    def control(self, stream_id: int, kind: str, value: Any, blend_chunks: int = 0) -> None:
        """Takes effect with the stream's next chunk. Raises as `check_control`."""
        self.check_control(stream_id, kind, value, blend_chunks)
        stream = self._stream(stream_id)
        if kind == "prompt":
            stream.set_prompt(value, blend_chunks)
        elif kind == "density":
            stream.set_density(float(value))
        else:
            stream.noise.manual_seed(value)

    def fork(self, source: int, stream_id: int, seed: int | None = None) -> None:
        """Opens a stream in the state of `source`; buffers are copied when one of them goes on. Raises InvalidInput,
        UnknownStream, AtCapacity."""
        stream = self._stream(source)
        self._check_snapshot(stream)
        self._check_free(stream_id)
        self.streams[stream_id] = stream.fork()
        if seed is not None:
            self.streams[stream_id].noise.manual_seed(seed)

    def snapshot(self, stream_id: int, extra: dict[str, Any] | None = None) -> Snapshot:
        """Between two steps. extra: JSON of the caller's own. Raises UnknownStream, InvalidInput."""
        stream = self._stream(stream_id)
        self._check_snapshot(stream)
        return Snapshot.take(stream, self.world.config.name, self.fingerprint, extra or {})

    @torch.inference_mode()
    def restore(self, stream_id: int, snapshot: Snapshot) -> None:
        """Opens a stream in the snapshot's state. Raises SnapshotError, InvalidInput, AtCapacity."""
        self._check_free(stream_id)
        name, mine = snapshot.header["world"], self.world.config.name
        if snapshot.header["fingerprint"] != self.fingerprint:
            weights = "other weights" if name == mine else "another world"
            raise SnapshotError(f"snapshot: of {weights} ({name!r:.40}); allowed: those of {mine!r}, as loaded here")
        try:
            self.streams[stream_id] = Stream.from_state(
                self.world, self.shape, snapshot.header["stream"], snapshot.tensors, self.runtime
            )
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise SnapshotError(f"snapshot: it does not fit ({error!s:.120}); allowed: one of this release") from None

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.world)

    def _stream(self, stream_id: int) -> Stream:
        if stream_id not in self.streams:
            raise UnknownStream(f"stream_id: {stream_id} is not open; allowed: an opened, live stream")
        return self.streams[stream_id]

    def _check_free(self, stream_id: int) -> None:
        if stream_id in self.streams:
            raise InvalidInput("stream_id", f"{stream_id} is in use", "an id that no open stream has")
        if len(self.streams) >= self.max_streams:
            raise AtCapacity(f"stream: all {self.max_streams} slots are taken; allowed: try again when a stream ends")

    @staticmethod
    def _check_snapshot(stream: Stream) -> None:
        if any(probe is not None for probe in stream.probes):
            raise InvalidInput("stream", "it measures recall", "streams without measure_recall")

    # Chunks

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
            phases = {"prepare": 0.0, "denoise": 0.0, "write": 0.0, "decode": 0.0}
            try:
                for stream in streams:
                    self._prefill(stream)
                phases["prepare"] = time.perf_counter() - began
                frames, finite = self._advance(streams, torch.stack([actions for _, _, actions in ready]), phases)
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
                stats = dataclasses.replace(stats, phases=phases)
                results[row] = Chunk(requests[row].stream_id, video.numpy(), stats)
        return results

    def _check(self, request: ChunkRequest, earlier: Sequence[ChunkRequest]) -> tuple[Stream, Tensor]:
        stream = self._stream(request.stream_id)
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
        if stream.start is None:
            return
        latents, actions = self.world.starts[stream.start]
        stream.start = None
        frames = self.shape.chunk_frames
        for x0, action in zip(latents.split(frames), actions.split(frames), strict=True):
            stream.begin_caches()
            self.write([stream], x0[None], action[None])
            stream.latent_frame += frames

    def _advance(self, streams: list[Stream], actions: Tensor, phases: dict[str, float]
                 ) -> tuple[list[Tensor], list[bool]]:  # fmt: skip
        """actions: [streams, latent frames, buttons] -> uint8 [frames, height, width, 3] each, and whether all
        finite. Adds the seconds spent to `phases`."""
        began = time.perf_counter()
        for stream in streams:
            stream.blend()
        sampler = self.world.config.sampler
        noise = self._noise(streams, len(sampler.sigmas) + (sampler.context_noise > 0))
        phases["prepare"] += time.perf_counter() - began
        if len(streams) > 1 and (self.deterministic or self.recorder):
            rows = zip(streams, actions.split(1), noise.split(1, dim=1), strict=True)
            x0 = torch.cat([self._generate([stream], own, drawn, phases) for stream, own, drawn in rows])
        else:
            x0 = self._generate(streams, actions, noise, phases)
        began = time.perf_counter()
        frames, finite = self.decode(streams, x0), x0.isfinite().flatten(1).all(1).tolist()
        phases["decode"] += time.perf_counter() - began
        return frames, finite

    def _generate(self, streams: list[Stream], actions: Tensor, noise: Tensor, phases: dict[str, float]) -> Tensor:
        """Clean latents of the streams' next chunk, which is in their caches then."""
        began = time.perf_counter()
        stream = streams[0]
        if stream.graphs is None and self.recorder is not None:
            stream.graphs = StreamGraphs(self.recorder)
        if self.recorder is not None and stream.graphs.ready(stream):
            stream.caches.prepare(stream.latent_frame)

            def act(actions: Tensor, noise: Tensor) -> Tensor:
                stream.caches.turn_history()
                x0 = self.sample(streams, actions, noise)
                self._write_pass(streams, x0, actions, noise)
                stream.caches.merge()
                return x0

            x0 = stream.graphs.run(stream, (actions, noise), act)
            phases["denoise"] += time.perf_counter() - began  # the host's time: writing is in it
            return x0
        for stream in streams:
            stream.begin_caches()
        x0 = self.sample(streams, actions, noise)
        denoised = time.perf_counter()
        self.write(streams, x0, actions, noise)
        phases["denoise"] += denoised - began
        phases["write"] += time.perf_counter() - denoised
        return x0

    def sample(self, streams: list[Stream], actions: Tensor, noise: Tensor | None = None) -> Tensor:
        """Clean latents [streams, latent frames, C, h, w] of the streams' next chunk (each after `begin_chunk`). noise:
        [levels, streams, ...] from `_noise`; None: drawn here."""
        sigmas = self.world.config.sampler.sigmas
        noise = self._noise(streams, len(sigmas)) if noise is None else noise
        reuse = Reuse(self.world.dit, streams, len(sigmas))
        x0 = torch.zeros(len(streams), *self.latent_shape, device=self.device, dtype=self.dtype)
        for index, sigma in enumerate(sigmas):
            x = (1 - sigma) * x0 + sigma * noise[index]
            output = reuse.run(
                x, sigma, actions, functools.partial(self._forward, progress=index / len(sigmas), write=False)
            )
            x0 = output if self.world.config.model.prediction == "x0" else x - sigma * output
        return unit_rms(x0, 2) if self.world.config.sampler.unit_latents else x0

    def write(self, streams: list[Stream], x0: Tensor, actions: Tensor, noise: Tensor | None = None) -> None:
        """Writes a chunk into the caches. noise: as for `sample`; its last level is used."""
        self._write_pass(streams, x0, actions, self._noise(streams, 1) if noise is None else noise)
        for stream in streams:
            stream.caches.commit()

    def _write_pass(self, streams: list[Stream], x0: Tensor, actions: Tensor, noise: Tensor) -> None:
        """At the sampler's context noise (0: the clean pass)."""
        level = self.world.config.sampler.context_noise
        x = (1 - level) * x0 + level * noise[-1] if level else x0
        self._forward(streams, x, level, actions, progress=1.0, write=True)

    def decode(self, streams: list[Stream], x0: Tensor) -> list[Tensor]:
        """Latents [streams, latent frames, C, h, w] -> uint8 [frames, height, width, 3] of each on the CPU. Here a step
        waits for a GPU, once."""
        videos = []
        for stream, latents in zip(streams, x0, strict=True):
            # In one layout, whoever shares the step: convolutions round by it.
            video, stream.decoded = self.world.decoder.decode(latents.contiguous(), stream.decoded)
            pixels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            videos.append(self._moved(pixels.permute(0, 2, 3, 1).contiguous(), torch.device("cpu")))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return videos

    def _noise(self, streams: list[Stream], levels: int) -> Tensor:
        """[levels, streams, latent frames, C, h, w], drawn level after level from each stream's own generator."""
        drawn = [[stream.draw(self.latent_shape) for stream in streams] for _ in range(levels)]
        return self._moved(torch.stack([torch.stack(level) for level in drawn]), self.device).to(self.dtype)

    def _moved(self, x: Tensor, device: torch.device) -> Tensor:
        """To the device or from it through pinned memory: the host does not wait."""
        if self.device.type != "cuda":
            return x
        if device.type == "cpu":
            return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        return x.pin_memory().to(device, non_blocking=True)

    def _forward(self, streams: list[Stream], x: Tensor, sigma: float, actions: Tensor, *, progress: float,
                 write: bool) -> Tensor:  # fmt: skip
        return self.runtime.forward(streams, x, sigma, actions, progress=progress, write=write)

    def _finish(self, stream: Stream, frames: int, seconds: float, batch: int, prompt_applied: bool) -> ChunkStats:
        caches = stream.caches.stats()
        recall = [probe.recall for probe in stream.probes if probe is not None]
        stats = ChunkStats(
            chunk=stream.chunk,
            first_frame=stream.frame,
            frames=frames,
            cache_tokens=caches.tokens,
            cache_bytes=stream.cache_bytes,
            density=caches.executed / caches.possible,
            recall=sum(recall) / len(recall) if recall else None,
            merged_tokens=caches.merged,
            text_tokens=float(sum(text.kept for text in stream.text) / len(stream.text)),
            step_seconds=seconds,
            batch=batch,
            prompt_applied=prompt_applied,
            **stream.guarded(caches.guard),
        )
        stream.chunk += 1
        stream.frame += frames
        stream.latent_frame += self.shape.chunk_frames
        stream.stepped = time.monotonic()
        return stats


def cache_shape(world: World) -> CacheShape:
    model, weight = world.config.model, world.dit.head.head.weight
    return CacheShape(
        model.heads, model.head_dim, model.frame_tokens, world.config.sampler.latent_frames_per_chunk,
        model.rope_max_distance, model.rope_split, model.rope_theta, weight.device, weight.dtype, model.grid[1],
    )  # fmt: skip


def where(error: Exception) -> str:
    """The traceback's lines, without the exception's message."""
    return "".join(traceback.format_tb(error.__traceback__))


def check_prompt(prompt: str, field: str = "PROMPT") -> None:
    """Raises InvalidInput unless the prompt is 1..4096 bytes of text, not all white space."""
    size = len(prompt.encode())
    if not prompt.strip():
        raise InvalidInput(field, "it is empty", f"1 to {PROMPT_BYTES} bytes of UTF-8 text")
    if size > PROMPT_BYTES:
        raise InvalidInput(field, f"it has {size} bytes", f"1 to {PROMPT_BYTES} bytes of UTF-8 text")
