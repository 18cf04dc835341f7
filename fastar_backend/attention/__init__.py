"""What a query may attend to: dense, window, FAST-AR; the caches of a stream (`make_caches`), one interface for each
layer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from fastar_backend.attention.ann_ca import TextCache
from fastar_backend.attention.cache import CacheShape, FrameCache
from fastar_backend.attention.layers import Caches, CacheStats, PortableCaches, make_cache
from fastar_backend.attention.temp_cache import TempCache
from fastar_backend.config import AttentionConfig

__all__ = [
    "Caches",
    "CacheShape",
    "CacheStats",
    "FrameCache",
    "TempCache",
    "TextCache",
    "bytes_of_caches",
    "make_cache",
    "make_caches",
]


def make_caches(shape: CacheShape, config: AttentionConfig, layers: int, portable: bool = False) -> Caches:
    """All layers' caches of one stream: by kernels on a GPU in half precision where those know the setting, else (or if
    `portable`) in plain PyTorch."""
    return PortableCaches(shape, config, layers) if portable else _kind(shape, config)(shape, config, layers)


def bytes_of_caches(shape: CacheShape, config: AttentionConfig, layers: int) -> int:
    """What `make_caches` would allocate (dense attention: to begin with); nothing is allocated."""
    return _kind(shape, config)(dataclasses.replace(shape, device=torch.device("meta")), config, layers).nbytes


def _kind(shape: CacheShape, config: AttentionConfig) -> Callable[[CacheShape, AttentionConfig, int], Caches]:
    if shape.device.type == "cuda" and shape.dtype in (torch.bfloat16, torch.float16):
        from fastar_backend.attention import flat_cache  # Triton comes with PyTorch for CUDA only

        if flat_cache.supports(shape, config):
            return flat_cache.FlatCaches
    return PortableCaches
