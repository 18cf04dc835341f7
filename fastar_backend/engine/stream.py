"""One stream: what a caller asks of a chunk, what it gets, and all the state in between."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fastar_backend.attention import CacheShape, TextCache
from fastar_backend.attention.recall import RecallProbe
from fastar_backend.config import AttentionConfig, Config
from fastar_backend.engine.density import Density
from fastar_backend.engine.runtime import Runtime, TorchRuntime
from fastar_backend.model.decoder import check_state
from fastar_backend.model.world import World

DECODER = "decoder."  # prefix of the decoder's tensors in a stream's state


@dataclasses.dataclass(frozen=True)
class ChunkRequest:
    """Advance one stream by one chunk."""

    stream_id: int
    actions: tuple[str, ...]  # one for the whole chunk, or one per latent frame; e.g. ("forward+turn_left", "")
    prompt: str | None = None  # a new prompt from this chunk on


@dataclasses.dataclass(frozen=True)
class ChunkStats:
    """Figures of one chunk, sent to the client as JSON (docs/structure.md)."""

    chunk: int
    first_frame: int
    frames: int
    cache_tokens: float  # mean over layers, per head
    cache_bytes: int
    density: float  # executed / dense query-key pairs of this chunk's self-attention, 0..1
    recall: float | None  # attention mass of the whole history that was kept, 0..1; None unless measured
    merged_tokens: float  # history tokens folded into a group with others, mean over layers
    text_tokens: float  # prompt tokens attended to, mean over layers and heads
    step_seconds: float
    batch: int
    prompt_applied: bool
    # Seconds of the step, the same for all streams in it: prepare, denoise, write, decode. On a GPU the host runs
    # ahead and waits where frames are copied out: there `decode` holds most of the time.
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    # The quality guard's, None where it is off: AnnSA's recall and output error (attention/guard.py) by this chunk's
    # sample, and the share of cached keys that a block of queries attended to.
    guard_recall: float | None = None
    guard_error: float | None = None
    sparse_density: float | None = None

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One stream's new frames. frames: uint8 [frames, height, width, 3], RGB."""

    stream_id: int
    frames: np.ndarray
    stats: ChunkStats


class StreamOptions(Config):
    """What a client may choose when it opens a stream (the OPTIONS tensor)."""

    seed: int = Field(0, ge=0, lt=2**63)
    start: str = Field("auto", max_length=64)
    attention: AttentionConfig | None = None  # None: the server's
    measure_recall: bool = False  # keeps all keys beside the stream's cache: memory grows; for benchmarks


class Stream:
    """All state of one stream; nothing about it lives elsewhere. Dropping the object frees it."""

    NUMBERS = ("latent_frame", "chunk", "frame", "blend_step", "blend_chunks", "start")
    TENSORS = ("prompt", "target", "origin")

    def __init__(self, world: World, shape: CacheShape, prompt: str, options: StreamOptions,
                 attention: AttentionConfig, runtime: Runtime | None = None) -> None:  # fmt: skip
        """runtime: None is PyTorch. Raises InvalidInput where it cannot run this attention."""
        self._prepare(world, shape, attention, runtime, portable=options.measure_recall)
        self.probes = [RecallProbe(shape, cache) if options.measure_recall else None for cache in self.caches]
        self.noise.manual_seed(options.seed)
        # The embedded prompt [text tokens, text_dim]: in effect, at the end of a blend, at its beginning.
        self.prompt = self.target = self.origin = self.world.text([prompt])[0]
        self._remember_prompt()
        self.start = world.find_start(options.start, prompt)  # None once its frames are in the caches

    def _prepare(self, world: World, shape: CacheShape, attention: AttentionConfig, runtime: Runtime | None,
                 portable: bool = False) -> None:  # fmt: skip
        self.world, self.attention = world, attention
        self.runtime = runtime or TorchRuntime(world, shape)
        self.noise = torch.Generator()  # on the CPU: the same video on every device
        self.caches = self.runtime.caches(attention, portable)
        self.density = Density(attention.sparse_density)  # the guard's, where it holds a floor
        self.probes: list[RecallProbe | None] = [None] * len(self.caches)
        self.text: list[TextCache] = []
        self.graphs: Any = None  # the engine's recordings of this stream's chunks (engine/graphs.py)
        self.decoded = self.world.decoder.state()  # what the decoder remembers; never written to, but replaced
        self.latent_frame = 0  # of the next chunk; counts the start's frames too
        self.chunk = 0
        self.frame = 0  # video frames sent
        self.blend_step = self.blend_chunks = 0
        self.stepped = time.monotonic()

    def set_prompt(self, prompt: str, blend_chunks: int = 0) -> None:
        """The new prompt counts from the next chunk on. blend_chunks: its embedding is mixed into the old one's in
        equal steps, so that the last of so many chunks has the new prompt alone."""
        self.target, self.origin = self.world.text([prompt])[0], self.prompt
        self.blend_step, self.blend_chunks = 0, max(blend_chunks, 1)

    def blend(self) -> None:
        """The next step of a prompt change, if one is under way."""
        if self.blend_step >= self.blend_chunks:
            return
        self.blend_step += 1
        share = self.blend_step / self.blend_chunks
        self.prompt = self.target if share == 1 else torch.lerp(self.origin, self.target, share)
        self._remember_prompt()

    def _remember_prompt(self) -> None:
        """Computes the cross-attention keys and values of the prompt, once."""
        dit = self.world.dit
        weight = dit.head.head.weight
        pairs = dit.prompt_keys_values(self.prompt[None].to(weight.device, weight.dtype))
        text = [self.runtime.text(key[0], value[0], self.prompt, self.attention) for key, value in pairs]
        if self.graphs is None or not self.graphs.recorded:
            self.text = text
        else:  # recordings know the tensors by their place in memory
            for mine, fresh in zip(self.text, text, strict=True):
                mine.take(fresh)

    def set_density(self, density: float) -> None:
        """AnnSA: the share of cached keys that a query attends to (fastar attention only). Where the guard holds a
        floor, it goes on from here."""
        self.density = Density(density)
        self._configure(density)

    def _configure(self, density: float) -> None:
        self.attention = self.attention.model_copy(update={"sparse_density": density})
        self.caches.configure(self.attention)

    def guarded(self, found: tuple[float, float] | None) -> dict[str, float]:
        """found: recall and error of the chunk just made, or None where the guard is off. Returns its part of the
        chunk's stats; where it holds a floor, sets the next chunk's density."""
        if found is None:
            return {}
        attention, (recall, error) = self.attention, found
        if attention.guard == "hold":
            self.density = self.density.after(recall, attention.recall_floor)
            if self.density.value != attention.sparse_density:
                self._configure(self.density.value)
        return {"guard_recall": recall, "guard_error": error, "sparse_density": attention.sparse_density}

    def draw(self, like: tuple[int, ...]) -> Tensor:
        """Standard normal noise from the stream's own generator, on the CPU."""
        return torch.randn(like, generator=self.noise)

    def begin_chunk(self) -> None:
        self.blend()
        self.begin_caches()

    def begin_caches(self) -> None:
        self.caches.begin(self.latent_frame)
        for probe in self.probes:
            if probe is not None:
                probe.begin(self.latent_frame)

    @property
    def cache_bytes(self) -> int:
        """Keys, values and their bookkeeping, the decoder's state, recall probes' history included."""
        decoded = sum(value.nbytes for value in self.decoded.values())
        probes = sum(probe.history.nbytes for probe in self.probes if probe is not None)
        return decoded + probes + self.caches.nbytes

    def fork(self) -> Stream:
        """A stream in the same state. Caches are shared until one side begins its next chunk. Not with probes."""
        twin = copy.copy(self)
        twin.noise = torch.Generator()
        twin.noise.set_state(self.noise.get_state())
        twin.caches = self.caches.fork()
        twin.text = [text.fork() for text in self.text]
        twin.graphs = None
        twin.stepped = time.monotonic()
        return twin

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Numbers (JSON) and tensors from which `from_state` makes this stream again. The tensors are views that
        nobody will write to."""
        numbers = {name: getattr(self, name) for name in self.NUMBERS}
        tensors = {name: getattr(self, name).clone() for name in self.TENSORS} | {"noise": self.noise.get_state()}
        own, values = self.caches.state()
        values |= {f"{DECODER}{name}": value for name, value in self.decoded.items()}
        numbers |= {"attention": self.attention.model_dump(), "caches": own}
        numbers["density"] = dataclasses.asdict(self.density)
        return numbers, tensors | values

    @classmethod
    def from_state(cls, world: World, shape: CacheShape, numbers: dict[str, Any], tensors: dict[str, Tensor],
                   runtime: Runtime | None = None) -> Stream:  # fmt: skip
        """Raises KeyError, TypeError, ValueError, RuntimeError where the state does not fit."""
        stream = cls.__new__(cls)
        stream._prepare(world, shape, AttentionConfig.model_validate(numbers["attention"]), runtime)
        stream.density = Density.load(numbers["density"])
        for name in cls.NUMBERS:
            setattr(stream, name, numbers[name])
        if stream.start is not None and stream.start not in world.starts:
            raise ValueError(f"start {stream.start!r:.40} is unknown")
        model = world.config.model
        for name in cls.TENSORS:
            if tensors[name].shape != (model.text_tokens, model.text_dim) or not tensors[name].is_floating_point():
                raise ValueError(f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}")
            setattr(stream, name, tensors[name].to(shape.device))
        stream.decoded = {
            name.removeprefix(DECODER): value.to(shape.device)
            for name, value in tensors.items()
            if name.startswith(DECODER)
        }
        check_state(world.decoder, stream.decoded, model.latent_height, model.latent_width, shape.dtype)
        stream.noise.set_state(tensors["noise"])
        stream.caches.load(numbers["caches"], tensors)
        stream._remember_prompt()
        return stream
