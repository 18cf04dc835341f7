"""Prompt tokens of the embedded worlds: words hashed into a small learned table (no vocabulary file to ship)."""

from __future__ import annotations

import re
import zlib

import torch
from torch import Tensor, nn

BUCKETS = 1024


def words(prompt: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", prompt.lower())


def tokenise(prompt: str, length: int) -> list[int]:
    """At most `length` table rows in 1..BUCKETS-1; row 0 is the padding. Words beyond `length` are cut off."""
    return [1 + zlib.crc32(word.encode()) % (BUCKETS - 1) for word in words(prompt)][:length]


class HashedWords(nn.Module):
    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.table = nn.Embedding(BUCKETS, dim, padding_idx=0)

    def forward(self, prompts: list[str]) -> Tensor:
        """[prompts, length, dim], zero-padded."""
        tokens = torch.zeros(len(prompts), self.length, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            found = tokenise(prompt, self.length)
            tokens[row, : len(found)] = torch.tensor(found, dtype=torch.long)
        return self.table(tokens.to(self.table.weight.device))
