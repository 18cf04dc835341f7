"""Cross-attention to the prompt: equal tokens folded once (exact), then AnnCA: only the tokens that the chunk's queries
attend to.

Prompts are padded with equal, unmasked tokens, as in Wan. A group of m equal keys with equal values is one token with
logit bias log m: nothing is lost, and most of the padding's cost is gone. AnnCA then chooses for each head, by one of
two tests:

- mass (ours): the fewest tokens that hold the share `text_mass` of the head's attention, measured over a sample of the
  queries. The others are merged into one group, as TempCache merges keys: their means, weighted by mass.
- bucket (paper, section on cross-attention): the tokens that share an LSH bucket with at least one query; the others
  are dropped. The padding's group (else the largest) always stays, since an empty set would have no softmax. Buckets
  know directions only: measured (docs/decisions.md), heads lose up to two thirds of their mass."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.attention import ann, ann_sa
from fastar_backend.attention.cache import HALF, attention
from fastar_backend.config import AttentionConfig

SAMPLES = 64  # queries of a chunk, at most, that the mass test measures by: 1.4 % of Wan's 4680


class TextCache:
    """One layer's prompt of one stream. key, value: [text tokens, heads, head_dim]; text: [text tokens, text_dim], the
    embedded prompt, whose equal rows are folded."""

    def __init__(self, key: Tensor, value: Tensor, text: Tensor, config: AttentionConfig) -> None:
        self.config = config
        self.bias: Tensor | None = None
        if config.kind == "fastar" or config.select_text:
            _, group, count = torch.unique(text, dim=0, return_inverse=True, return_counts=True)
            first = torch.full_like(count, len(text)).scatter_reduce(
                0, group, torch.arange(len(text), device=text.device), "amin"
            )
            key, value, self.bias = key[first], value[first], count.to(key.dtype).log()
            padding = (text[first] == 0).all(-1)
            padding = padding.int().argmax() if padding.any() else count.argmax()
            self.always = torch.arange(len(count), device=text.device) == padding  # [tokens] bool
        self.keys, self.values = key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
        self.kept: float | Tensor = float(len(key))  # tokens attended to by the last call, mean over heads
        self.groups: tuple[Tensor, Tensor] | None = None  # of the kernel: counts, and where they begin
        self.tokens = len(text)
        if self.bias is not None and self.keys.is_cuda and self.keys.dtype in HALF:
            self.use_kernel()

    def use_kernel(self) -> None:
        """From now on by the kernel (fastar only), which takes groups' values as sums, and their counts. The groups are
        the last rows of as many as a prompt has tokens, so that all prompts have one shape."""
        heads, held, _ = self.keys.shape
        free = self.tokens - held
        counts = F.pad(self.bias.float().exp(), (free, 0)).expand(heads, -1).contiguous()
        self.keys, self.values = F.pad(self.keys, (0, 0, free, 0)), F.pad(self.values, (0, 0, free, 0))
        self.values = (self.values * counts[..., None]).to(self.values.dtype)
        self.always = F.pad(self.always, (free, 0))
        self.groups = counts, torch.full((heads,), free, dtype=torch.int32, device=counts.device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, *(self.groups or ()), *(() if self.bias is None else (self.always,))

    def take(self, other: TextCache) -> None:
        """Another prompt of the same shape (by the kernel, or nothing folded) into the same tensors."""
        for mine, value in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(value)
        self.kept = other.kept

    def fork(self) -> TextCache:
        twin = copy.copy(self)
        twin.keys, twin.values = self.keys.clone(), self.values.clone()
        if self.groups is not None:
            twin.groups = self.groups[0].clone(), self.groups[1].clone()
        if self.bias is not None:
            twin.always = self.always.clone()
        return twin

    def _by_kernel(self, query: Tensor) -> Tensor:
        from fastar_backend.kernels import ops  # a mask would have the size of queries x keys

        keys, sums, (counts, first) = self.keys, self.values, self.groups
        if self.config.select_text:  # a token that is dropped counts for nothing; the host need not know how many are
            keep, share = self.choose(query, counts)
            rest = None if share is None else merged(share, keys, sums / counts.clamp(min=1)[..., None], counts)
            sums, counts = sums * keep[..., None], counts * keep
            if rest is not None:
                key, mean, weight = rest
                keys, counts = torch.cat([keys, key], 1), torch.cat([counts, weight], 1)
                sums = torch.cat([sums, (mean * weight[..., None]).to(sums.dtype)], 1)
            self.kept = (counts > 0).float().sum(-1).mean()
        rows = counts.shape[1]
        return ops.attend(query.transpose(0, 1), keys, sums, counts, first, rows, rows).transpose(0, 1)

    def attend(self, query: Tensor) -> Tensor:
        """query: [heads, n, head_dim] -> the same shape."""
        keys, values = self.keys, self.values
        if self.groups is not None:
            return self._by_kernel(query)
        if self.bias is None:
            return attention(query, keys, values, None)
        bias = self.bias.expand(keys.shape[0], -1)
        if self.config.select_text:
            keep, share = self.choose(query, bias.exp())
            rest = None if share is None else merged(share, keys, values, bias.exp())
            count = int(keep.sum(-1).max())
            # The kept tokens of each head first; heads with fewer are filled up with masked ones.
            index = keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :count]
            rows = index[..., None].expand(-1, -1, keys.shape[-1])
            keys, values = keys.gather(1, rows), values.gather(1, rows)
            bias = bias.masked_fill(~keep, -torch.inf).gather(1, index)
            if rest is not None:
                key, mean, weight = rest
                keys, values = torch.cat([keys, key], 1), torch.cat([values, mean], 1)
                bias = torch.cat([bias, weight.log().to(bias.dtype)], 1)
            self.kept = (bias > -torch.inf).float().sum(-1).mean().item()
        return attention(query, keys, values, bias)

    def choose(self, query: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
        """query: [heads, n, head_dim]; counts: [heads, tokens], 0 = no token there. Returns the tokens kept, [heads,
        tokens] bool, and by the mass test each other token's share in the mass of all others [heads, tokens] (0 for
        those kept)."""
        if self.config.text_mass is None or self.config.index == "lsh":
            return self.near(query), None
        sample = query[:, :: -(-query.shape[1] // SAMPLES)]
        near = ann_sa.scores(sample.float(), self.keys.float(), self.config)
        mass = (near + counts.float().log()[:, None]).softmax(-1).mean(1)
        most, order = mass.sort(dim=-1, descending=True, stable=True)
        fewest = most.cumsum(-1) - most < self.config.text_mass  # what is ahead of a token is not enough yet
        keep = torch.zeros_like(fewest).scatter_(1, order, fewest)
        rest = mass * ~keep
        return keep, rest / rest.sum(-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).tiny)

    def near(self, query: Tensor) -> Tensor:
        """[heads, tokens] bool: tokens that share a bucket with some query, and the padding's group."""
        tables, bits = self.config.index_tables, self.config.index_bits
        mine, theirs = ann.signatures(query, tables, bits), ann.signatures(self.keys, tables, bits)
        offset = torch.arange(tables, device=query.device) << bits  # one histogram over all tables
        seen = torch.zeros(len(query), tables << bits, dtype=torch.bool, device=query.device)
        seen.scatter_(1, (mine + offset).flatten(1), True)
        keep = seen.gather(1, (theirs + offset).flatten(1)).unflatten(1, (-1, tables)).any(-1)
        return keep | self.always


def merged(share: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens with a share [heads, tokens] as one group: its key and value [heads, 1, head_dim], means by share, and
    its weight [heads, 1], 0 where no token has one. keys, values: [heads, tokens, head_dim]; counts: [heads, tokens].

    log weight = sum of share (log count - log share), with which the group's e^logit is for no query above the sum of
    its tokens' (Jensen), and equal to it where their logits differ as their shares do: like tokens get their count."""
    row = share[:, None]  # in half precision the values are float32 all the same, where they come from sums by counts
    log = (torch.special.xlogy(share, counts) - torch.special.xlogy(share, share)).sum(-1, keepdim=True)
    return row.to(keys.dtype) @ keys, row.to(values.dtype) @ values, log.exp() * (share > 0).any(-1, keepdim=True)
