"""What the sparse baselines share: the whole history is kept, and a pass attends to a part of it.

Their papers bound computation, not memory, so these caches grow like dense attention's. The first layers and the first
denoising steps stay dense, as in their public code."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastar_backend.attention.cache import CacheShape, FrameCache, attention
from fastar_backend.config import AttentionConfig

PAPER_FRAME = 1560  # tokens of a latent frame of Wan2.1 at 480x832, for which the papers' sizes in tokens are meant


@dataclasses.dataclass(frozen=True)
class Block:
    """Queries [n] of a chunk that attend to the same keys [m]: token numbers in the chunk and in `FrameCache.view`."""

    queries: Tensor
    keys: Tensor


Plan = Sequence[Block]  # every query of the chunk is in one block


def block_size(tokens: int, config: AttentionConfig) -> int:
    """Tokens of a block in a frame of so many: as large a share of the frame as in the paper's, so that a small model's
    frame has as many blocks."""
    return max(1, min(config.baseline.block, round(config.baseline.block * tokens / PAPER_FRAME)))


def pairs(plan: Plan) -> int:
    return sum(len(block.queries) * len(block.keys) for block in plan)


def mask(plan: Plan, queries: Tensor, keys: int) -> Tensor:
    """What the plan lets these of the chunk's queries [n] see: bool [n, keys]."""
    seen = torch.zeros(len(queries), keys, dtype=torch.bool, device=queries.device)
    for block in plan:
        rows = torch.isin(queries, block.queries).nonzero()
        seen[rows, block.keys] = True
    return seen


def attend(query: Tensor, keys: Tensor, values: Tensor, plan: Plan, heads: Tensor, out: Tensor) -> None:
    """Writes the attention of `heads` [h] by the plan into `out`; query, out: [heads, n, head_dim]; keys, values:
    [heads, m, head_dim]. Only what is attended to is read."""
    at = heads[:, None]
    for block in plan:
        part = attention(query[at, block.queries], keys[at, block.keys], values[at, block.keys], None)
        out[at, block.queries] = part


class SparseHistory(FrameCache, abc.ABC):
    """layer: number of this cache's layer, 0 the first."""

    def __init__(self, shape: CacheShape, config: AttentionConfig, layer: int) -> None:
        super().__init__(shape)
        self.config, self.layer = config, layer
        self.sparse = False  # whether the last pass was

    def begin(self, start: int) -> None:
        super().begin(start)
        self.sparse = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, progress: float) -> Tensor:
        self.sparse = self.layer >= self.config.baseline.dense_layers and progress >= self.config.dense_steps
        if not self.sparse:
            return super().attend(query, key, value, progress)
        keys, values = self.view(key, value)
        out, executed = self._attend(query, keys, values)
        self.count_pairs(query.shape[1], executed / query.shape[1])
        return out

    def allowed(self, queries: Tensor) -> Tensor | None:
        return self._seen(queries) if self.sparse else None

    @abc.abstractmethod
    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, float]:
        """The output and the query-key pairs executed, mean over heads. query: [heads, n, head_dim]; keys, values:
        [heads, m, head_dim], the whole history and the chunk."""

    @abc.abstractmethod
    def _seen(self, queries: Tensor) -> Tensor:
        """What the last pass, a sparse one, let these of the chunk's queries [n] see: bool [heads, n, m]."""
