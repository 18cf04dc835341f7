"""FlowCache's compressed keys and values ("Flow caching for autoregressive video generation", arXiv
2602.10825, section on KV cache compression, and `kvcompress/kv_compressor.py`). Its reuse of outputs: engine/reuse.py.

The budget holds the chunk written last whole and, of each head, the tokens before it with the best score: lambda *
importance - (1 - lambda) * redundancy. Importance is the attention that the last chunk's queries pay to a token, mean
over queries, the maximum of seven neighbours; redundancy the softmax over tokens of their keys' mean cosine with all
others. What is not kept is lost.

Ported: the cache is compressed once a chunk, as it is written; tokens stay in the order of time; keys are compared
without temporal position, since ours are stored turned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.attention.cache import CacheShape, FrameCache
from fastar_backend.attention.temp_cache import MergeReport, TempCache
from fastar_backend.config import AttentionConfig

NEIGHBOURS = 7  # tokens that share the highest importance among them


def scores(query: Tensor, keys: Tensor, raw: Tensor, mix: float) -> Tensor:
    """What each token is worth, [heads, m]. query: [heads, n, dim]; keys: [heads, m, dim]; raw: the keys without
    temporal position; mix: the weight of importance, 0..1."""
    attention = (query @ keys.transpose(1, 2)).float() * query.shape[-1] ** -0.5
    importance = F.max_pool1d(attention.softmax(-1).mean(1), NEIGHBOURS, 1, NEIGHBOURS // 2)
    unit = F.normalize(raw.float(), dim=-1)
    # With all keys, summed: the softmax takes no notice of a key's with itself, 1 for each.
    cosine = (unit @ unit.sum(1, keepdim=True).transpose(1, 2))[..., 0]
    redundancy = (cosine / keys.shape[1]).softmax(-1)
    return mix * importance - (1 - mix) * redundancy


class FlowCache(TempCache):
    """TempCache's layout, its memory slots holding single tokens."""

    def __init__(self, shape: CacheShape, config: AttentionConfig) -> None:
        recent = min(shape.chunk_frames, config.budget_frames)
        plain = {"recent_frames": recent, "sink_frames": 0, "weight": "none", "match": "key", "sparse_density": 1.0}
        super().__init__(shape, config.model_copy(update=plain))
        self.index = torch.zeros(shape.heads, 0, shape.head_dim, device=shape.device)  # nothing looks for a group
        self.query: Tensor | None = None  # the chunk's, while it is written

    def begin(self, start: int) -> None:
        super().begin(start)
        self.bias = None  # all heads hold as many tokens

    def append(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.query, self.reports = query, []
        FrameCache.append(self, query, key, value)
        self.query = None

    def _drop(self, surplus: int) -> None:
        size, slots, used = self.shape.frame_tokens, self.slots, self.used
        leaving = slice(self.first, self.prefix + surplus * size)  # all that is held, but the chunk written last
        times = torch.tensor(self.times[:surplus], device=self.shape.device).repeat_interleave(size)
        times = torch.cat([self.time[:, slots - used :], times.expand(self.shape.heads, -1)], 1)
        keys, values = self.keys[:, leaving], self.values[:, leaving]
        kept = min(slots, keys.shape[1])
        raw = self.shape.turn(keys, -(times - self.start).clamp(min=-self.shape.reach))
        worth = scores(self.query, keys, raw, self.config.baseline.flowcache_mix)
        chosen = worth.topk(kept, dim=-1).indices.sort(-1).values  # [heads, kept]
        rows = chosen[..., None].expand(-1, -1, self.shape.head_dim)
        there = slice(slots - kept, slots)
        self.keys[:, there], self.values[:, there] = keys.gather(1, rows), values.gather(1, rows)
        self.time[:, there] = times.gather(1, chosen)
        self.count[:, there] = 1
        self._report(chosen, used, surplus)
        self.used = kept
        FrameCache._drop(self, surplus)

    def _report(self, chosen: Tensor, used: int, surplus: int) -> None:
        """Where what was held went. chosen: [heads, kept] numbers among the `used` slots and the frames that leave."""
        heads, slots, size = self.shape.heads, self.slots, self.shape.frame_tokens
        place = torch.full((heads, used + surplus * size), -1, dtype=torch.long, device=chosen.device)
        new = torch.arange(slots - chosen.shape[1], slots, device=chosen.device)
        place.scatter_(1, chosen, new.expand_as(chosen))
        same = torch.arange(slots, device=chosen.device).expand(heads, -1)
        moved = torch.cat([same[:, : slots - used], place[:, :used]], 1)
        for frame in place[:, used:].split(size, 1):
            self.reports.append(MergeReport(frame, moved))
            moved = same  # the frames leave together, the slots move once
