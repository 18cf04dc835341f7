"""The baselines' rules in plain float64 loops: slow, obvious, and what the files beside must decide. Nothing is
imported from them: the two share no mistake."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def radial(frames: int, chunk: int, size: int, block: int, decay: float) -> Tensor:
    """RadialAttention's mask for the last `chunk` of `frames` frames of `size` tokens: bool [chunk * size, frames *
    size]. block: tokens; decay: of the window's width."""
    starts = range(0, size, block)
    power = 1
    while power <= size:
        power *= 2
    seen = torch.zeros(chunk * size, frames * size, dtype=torch.bool)
    for row in range(chunk):
        for frame in range(frames):
            distance = abs(frames - chunk + row - frame)
            reach = float(power)
            while distance >= power / reach:  # halves at distance 1, 2, 4, 8, ...
                reach /= 2
            for top in starts:
                for left in starts:
                    rows, columns = range(top, min(top + block, size)), range(left, min(left + block, size))
                    if frame == 0:
                        keep = True
                    elif distance and reach < block and distance % int(block / reach) != 0:
                        keep = False
                    else:
                        width = max(reach * decay, block)
                        if distance < 2:
                            width = size // (distance + 1)
                        shares = [sum(abs(i - j) <= width for i in rows) / len(rows) for j in columns]
                        touched = [share for share in shares if share > 0]
                        keep = bool(touched) and sum(share > 1 / 3 for share in touched) / len(touched) > 0.6
                    if keep:
                        for i in rows:
                            seen[row * size + i, frame * size + columns.start : frame * size + columns.stop] = True
    return seen


def svg1(frames: int, chunk: int, size: int, block: int, share: float) -> tuple[Tensor, Tensor]:
    """The spatial and the temporal head's mask, bool [chunk * size, frames * size] each."""
    newest = max(chunk, math.ceil(share * frames))
    margin = math.ceil(max(0.0, share * size - block) / 2)
    masks = []
    for kind in ("spatial", "temporal"):
        seen = torch.zeros(chunk * size, frames * size, dtype=torch.bool)
        for i in range(chunk * size):
            first = i % size // block * block
            for j in range(frames * size):
                frame, place = j // size, j % size
                near = first - margin <= place < min(first + block, size) + margin
                seen[i, j] = frame == 0 or (frame >= frames - newest if kind == "spatial" else near)
        masks.append(seen)
    return masks[0], masks[1]


def svg2_choice(query: Tensor, key: Tensor, size: Tensor, top_p: float, least: float) -> Tensor:
    """Key clusters of each query cluster, bool [k, m]. query: centroids [k, d]; key: [m, d]; size: [m]."""
    chosen = torch.zeros(len(query), len(key), dtype=torch.bool)
    for i, center in enumerate(query.double()):
        logits = [float(center @ other) / math.sqrt(len(other)) for other in key.double()]
        weight = [float(count) * math.exp(logit) for count, logit in zip(size, logits, strict=True)]
        taken, mass = 0, 0.0
        for j in sorted(range(len(key)), key=lambda j: -weight[j]):
            if mass > top_p and taken >= int(least * len(key)):
                break
            chosen[i, j] = True
            taken, mass = taken + 1, mass + weight[j] / sum(weight)
    return chosen


def flowcache_scores(query: Tensor, keys: Tensor, raw: Tensor, mix: float) -> Tensor:
    """Of one head, [m]. query: [n, d]; keys, raw: [m, d], the keys with temporal position and without."""
    query, keys, raw = query.double(), keys.double(), raw.double()
    count = len(keys)
    importance = [0.0] * count
    for q in query:
        logits = [math.exp(float(q @ k) / math.sqrt(len(q))) for k in keys]
        for j in range(count):
            importance[j] += logits[j] / sum(logits) / len(query)
    similar = []
    for i in range(count):
        cosine = [float(raw[i] @ raw[j] / (raw[i].norm() * raw[j].norm())) for j in range(count) if j != i]
        similar.append(math.exp(sum(cosine) / count))
    rows = []
    for j in range(count):
        best = max(importance[max(0, j - 3) : j + 4])
        rows.append(mix * best - (1 - mix) * similar[j] / sum(similar))
    return torch.tensor(rows, dtype=torch.float64)
