"""AnnSA over a layer's cache: each block of queries attends to a share of the cached keys (ann_sa.py) and to the chunk.

By itself over the whole history, without a bound (the paper's AnnSA alone); `TempCache` bounds what is held."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar_backend.attention import ann_sa, guard
from fastar_backend.attention.cache import CacheShape, FrameCache, by_place
from fastar_backend.config import AttentionConfig


class SparseCache(FrameCache):
    def __init__(self, shape: CacheShape, config: AttentionConfig, max_frames: int | None = None, sink_frames: int = 0,
                 prefix: int = 0) -> None:  # fmt: skip
        super().__init__(shape, max_frames, sink_frames, prefix)
        self.config = config
        self.selection: ann_sa.Selection | None = None
        self.sample: guard.Sample | None = None  # what the guard looks at in this chunk
        self.measured: Tensor | None = None  # recall and error of it

    def begin(self, start: int) -> None:
        super().begin(start)
        self.selection = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, progress: float) -> Tensor:
        config = self.config
        if config.sparse_density >= 1 or progress < config.dense_steps or not self.tokens:
            return super().attend(query, key, value, progress)
        keys, values = self.view(key, value)
        if self.selection is None:  # once a chunk: later passes see nearly the same queries
            bias = None if self.bias is None else self.bias[:, : self.tokens]
            self.selection = ann_sa.select(query, keys[:, : self.tokens], bias, config, by_place(self.shape))
        self.count_pairs(query.shape[1], self.selection.keys_per_block + key.shape[1])
        out = ann_sa.attend(query, keys, values, self.bias, self.selection)
        if progress >= 1 and self.sample is not None:
            self.measured = guard.by_keys(self.sample, query, keys, values, self.bias, self.selection)
        return out

    def allowed(self, queries: Tensor) -> Tensor | None:
        selection = self.selection
        if selection is None:
            return None
        own = self.shape.chunk_tokens
        block = selection.order.argsort(-1)[:, queries] // (own // selection.blocks)
        seen = torch.zeros(len(block), selection.blocks, self.tokens + own, dtype=torch.bool, device=block.device)
        seen.scatter_(2, selection.keys, True)
        seen[..., -own:] = True
        return seen.gather(1, block[..., None].expand(-1, -1, seen.shape[2]))
