"""Sparse VideoGen 2 (Yang et al., arXiv 2505.18875, section 3 and `svg/kmeans_utils.py`): queries and keys are
clustered by k-means; a cluster of queries attends to the clusters of keys that hold most of its attention by the
centroids.

Attention between clusters is softmax of (centroid . centroid / sqrt d), weighted by the key clusters' sizes; the
largest are taken until their sum exceeds top_p, and never fewer than a share of the clusters. Centroids are kept from
pass to pass and refined in a few rounds.

Ported: keys are clustered anew in every pass, as history and temporal positions change with each chunk; clusters come
with new frames, up to the paper's number. A small model has fewer clusters, of `TOKENS` at least. Initial centroids are
evenly spaced tokens, not random ones. Executed by a mask: exact, but without saving time on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.attention.baselines.history import SparseHistory
from fastar_backend.attention.cache import CacheShape
from fastar_backend.config import AttentionConfig

TOKENS = 8  # of a cluster at least, on average
MOVED = 1e-4  # k-means ends when no centroid moves farther


def kmeans(x: Tensor, centroids: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm, from `centroids` [heads, k, dim] on; x: [heads, n, dim]. Returns each row's cluster [heads,
    n], the centroids and the clusters' sizes [heads, k]; an empty cluster's centroid stays where it was."""
    x = x.float()
    for _ in range(rounds):
        score = x @ centroids.transpose(1, 2) - centroids.square().sum(-1)[:, None] / 2
        label = score.argmax(-1)
        size = torch.zeros(centroids.shape[:2], device=x.device).scatter_add_(1, label, torch.ones_like(x[..., 0]))
        total = torch.zeros_like(centroids).scatter_add_(1, label[..., None].expand_as(x), x)
        before, centroids = centroids, torch.where(size[..., None] > 0, total / size.clamp(min=1)[..., None], centroids)
        if (centroids - before).norm(dim=-1).max() < MOVED:
            break
    return label, centroids, size


def choose(query: Tensor, key: Tensor, size: Tensor, top_p: float, least: float) -> Tensor:
    """Key clusters of each query cluster: bool [heads, query clusters, key clusters]. query, key: centroids [heads, k,
    dim]; size: [heads, key clusters]; least: share of the key clusters that is always taken."""
    score = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5 + size.log()[:, None]).softmax(-1)
    score, order = score.sort(-1, descending=True)
    before = score.cumsum(-1) - score  # of those that come first
    take = before <= (top_p if top_p < 1 else torch.inf)
    take[..., : int(least * take.shape[-1])] = True
    return torch.zeros_like(take).scatter(2, order, take)


class Svg2Cache(SparseHistory):
    CENTROIDS = ("query_centroids", "key_centroids")

    def __init__(self, shape: CacheShape, config: AttentionConfig, layer: int) -> None:
        super().__init__(shape, config, layer)
        self.query_centroids = self.key_centroids = torch.zeros(shape.heads, 0, shape.head_dim, device=shape.device)
        self.seen: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.query_centroids.nbytes + self.key_centroids.nbytes

    def begin(self, start: int) -> None:
        super().begin(start)
        self.seen = None

    def _cluster(self, x: Tensor, centroids: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """`kmeans` of x [heads, n, dim] from these centroids and as many new ones as it may have more."""
        settings, missing = self.config.baseline, max(1, min(most, x.shape[1] // TOKENS)) - centroids.shape[1]
        rounds = settings.svg2_rounds if centroids.shape[1] else settings.svg2_first_rounds
        if missing > 0:
            new = x[:, -self.shape.chunk_tokens :] if centroids.shape[1] else x
            rows = torch.linspace(0, new.shape[1] - 1, missing, device=x.device).long()
            centroids = torch.cat([centroids, new[:, rows].float()], 1)
        return kmeans(x, centroids, rounds)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, float]:
        settings = self.config.baseline
        mine, self.query_centroids, _ = self._cluster(query, self.query_centroids, settings.svg2_query_clusters)
        theirs, self.key_centroids, size = self._cluster(keys, self.key_centroids, settings.svg2_key_clusters)
        chosen = choose(self.query_centroids, self.key_centroids, size, settings.svg2_top_p, settings.svg2_least)
        rows = chosen.gather(1, mine[..., None].expand(-1, -1, chosen.shape[2]))
        self.seen = rows.gather(2, theirs[:, None].expand(-1, rows.shape[1], -1))
        out = F.scaled_dot_product_attention(query[None], keys[None], values[None], self.seen[None])[0]
        return out, float(self.seen.sum()) / len(query)

    def _seen(self, queries: Tensor) -> Tensor:
        return self.seen[:, queries]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        numbers, tensors = super().state()
        return numbers, tensors | {name: getattr(self, name) for name in self.CENTROIDS}

    def load(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load(numbers, tensors)
        for name in self.CENTROIDS:
            value, (heads, _, dim) = tensors[name], self.keys.shape
            if value.dim() != 3 or (value.shape[0], value.shape[2]) != (heads, dim) or value.dtype != torch.float32:
                raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, not float32 [{heads}, clusters, {dim}]")
            setattr(self, name, value.to(self.shape.device))
