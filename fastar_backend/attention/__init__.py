"""What a query may attend to: dense, window, FAST-AR; one cache per stream and layer, one interface (`FrameCache`)."""

from __future__ import annotations

from fastar_backend.attention.ann_ca import TextCache
from fastar_backend.attention.cache import CacheShape, FrameCache
from fastar_backend.attention.temp_cache import TempCache
from fastar_backend.config import AttentionConfig

__all__ = ["CacheShape", "FrameCache", "TempCache", "TextCache", "make_cache"]


def make_cache(shape: CacheShape, config: AttentionConfig) -> FrameCache:
    """The cache of one layer of one stream."""
    if config.kind == "dense":
        return FrameCache(shape)
    if config.kind == "window":
        return FrameCache(shape, config.budget_frames, config.sink_frames)
    return TempCache(shape, config)
