"""Cross-attention to the prompt: equal tokens folded once (exact), then AnnCA: only tokens that share a bucket with a
query.

Prompts are padded with equal, unmasked tokens, as in Wan. A group of m equal keys with equal values is one token with
logit bias log m: nothing is lost, and most of the padding's cost is gone. AnnCA (paper, section on cross-attention)
then keeps a token for this chunk iff at least one query of the head shares an LSH bucket with it; the padding's group
(else the largest) always stays, since an empty set would have no softmax."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.attention import ann
from fastar_backend.attention.cache import HALF, attention
from fastar_backend.config import AttentionConfig


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

        sums, (counts, first) = self.values, self.groups
        if self.config.select_text:  # a token that is dropped counts for nothing; the host need not know how many are
            keep = self.near(query)
            sums, counts = sums * keep[..., None], counts * keep
            self.kept = (counts > 0).float().sum(-1).mean()
        rows = counts.shape[1]
        return ops.attend(query.transpose(0, 1), self.keys, sums, counts, first, rows, rows).transpose(0, 1)

    def attend(self, query: Tensor) -> Tensor:
        """query: [heads, n, head_dim] -> the same shape."""
        keys, values = self.keys, self.values
        if self.groups is not None:
            return self._by_kernel(query)
        if self.bias is None:
            return attention(query, keys, values, None)
        bias = self.bias.expand(keys.shape[0], -1)
        if self.config.select_text:
            keep = self.near(query)
            count = int(keep.sum(-1).max())
            self.kept = keep.float().sum(-1).mean().item()
            # The kept tokens of each head first; heads with fewer are filled up with masked ones.
            index = keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :count]
            rows = index[..., None].expand(-1, -1, keys.shape[-1])
            keys, values = keys.gather(1, rows), values.gather(1, rows)
            bias = bias.masked_fill(~keep, -torch.inf).gather(1, index)
        return attention(query, keys, values, bias)

    def near(self, query: Tensor) -> Tensor:
        """[heads, tokens] bool: tokens that share a bucket with some query, and the padding's group."""
        tables, bits = self.config.index_tables, self.config.index_bits
        mine, theirs = ann.signatures(query, tables, bits), ann.signatures(self.keys, tables, bits)
        offset = torch.arange(tables, device=query.device) << bits  # one histogram over all tables
        seen = torch.zeros(len(query), tables << bits, dtype=torch.bool, device=query.device)
        seen.scatter_(1, (mine + offset).flatten(1), True)
        keep = seen.gather(1, (theirs + offset).flatten(1)).unflatten(1, (-1, tables)).any(-1)
        return keep | self.always
