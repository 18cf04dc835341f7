"""What computes a chunk's passes: PyTorch here, or engines that TensorRT built (plugins/runner.py).

The stream engine knows neither: it asks a `Runtime` for a stream's caches, for a prompt's, and for the transformer's
output. Merging and turning are the caches' own (`Caches.begin`, `Caches.commit`)."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fastar_backend.attention import Caches, CacheShape, TextCache, make_caches
from fastar_backend.attention.batch import StreamsAttend, StreamsAttendText
from fastar_backend.config import AttentionConfig, ExecutionConfig
from fastar_backend.errors import InvalidInput
from fastar_backend.model.world import World

if TYPE_CHECKING:
    from fastar_backend.engine.stream import Stream

RUNNER = "plugins.runner"  # loaded where an engine is asked for, and nowhere else


class Runtime(Protocol):
    def check(self, attention: AttentionConfig, field: str) -> None:
        """Raises InvalidInput, naming a setting under `field`, if streams with that attention cannot be run."""

    def caches(self, attention: AttentionConfig, portable: bool) -> Caches:
        """Of a new stream. portable: a recall probe looks into them. Raises InvalidInput."""

    def text(self, key: Tensor, value: Tensor, text: Tensor, attention: AttentionConfig) -> TextCache:
        """One layer's prompt, from the arguments of `TextCache`."""

    def forward(self, streams: list[Stream], x: Tensor, sigma: float, actions: Tensor, *, progress: float,
                write: bool) -> Tensor:  # fmt: skip
        """The transformer's output for noisy latents x [streams, latent frames, C, h, w] at noise level sigma, after
        the streams' `begin_caches`. progress: share of the denoising steps done, 0..1. write: the pass whose keys and
        values are kept."""


class TorchRuntime:
    def __init__(self, world: World, shape: CacheShape) -> None:
        self.world, self.shape = world, shape

    def check(self, attention: AttentionConfig, field: str) -> None:
        pass

    def caches(self, attention: AttentionConfig, portable: bool) -> Caches:
        return make_caches(self.shape, attention, self.world.config.model.layers, portable)

    def text(self, key: Tensor, value: Tensor, text: Tensor, attention: AttentionConfig) -> TextCache:
        return TextCache(key, value, text, attention)

    def forward(self, streams: list[Stream], x: Tensor, sigma: float, actions: Tensor, *, progress: float,
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
        level = torch.full(x.shape[:2], sigma, device=self.shape.device)
        return self.world.dit(x, level, actions, attend, cross)


def make_runtime(world: World, shape: CacheShape, attention: AttentionConfig, execution: ExecutionConfig) -> Runtime:
    """world: as loaded, not tuned. Raises InvalidInput where TensorRT, or an engine that fits, is missing."""
    if execution.runtime == "torch":
        return TorchRuntime(world, shape)
    return _runner().load(world, shape, attention, execution.engine_dir)


def engine_dtype(execution: ExecutionConfig) -> torch.dtype | None:
    """In which a world has to be loaded; None: its own. Raises InvalidInput as `make_runtime`."""
    return None if execution.runtime == "torch" else _runner().engine_dtype(execution.engine_dir)


def _runner() -> ModuleType:
    try:
        return importlib.import_module(RUNNER)
    except ModuleNotFoundError as error:
        problem = f"tensorrt needs the module {error.name}, which is not installed here"
        raise InvalidInput("runtime", problem, "torch, or an installation of this project with its plugins") from None
