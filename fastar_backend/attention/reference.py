"""The attention stack in plain float64 loops: slow, obvious, and what the fast files beside it must compute.

Shapes are those of the fast code, [heads, tokens, head_dim]. Queries and keys come without temporal positions (spatial
ones do not matter here); `turned` gives them theirs. Nothing is imported from the fast code: the two share no mistake.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

SPREAD, PERIOD = 4, 16  # TempCache: how much longer some tokens stay than others, and one in how many stays longest


def attention(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Softmax over groups: logit q.k / sqrt(d) + log m for a group of m keys, whose value is their mean.

    query: [heads, n, d]; keys, values: [heads, m, d]; counts: [heads, m], 0 = no group there; None = all 1.
    """
    heads, queries, dim = query.shape
    out = torch.zeros(heads, queries, dim, dtype=torch.float64)
    for head in range(heads):
        held = [j for j in range(keys.shape[1]) if counts is None or counts[head, j] > 0]
        bias = [0.0 if counts is None else math.log(float(counts[head, j])) for j in held]
        head_keys = [keys[head, j].double() for j in held]
        for i in range(queries):
            q = query[head, i].double()
            logits = [float(q @ k) / math.sqrt(dim) + b for k, b in zip(head_keys, bias, strict=True)]
            top = max(logits)
            weights = [math.exp(logit - top) for logit in logits]
            total = sum(weights)
            for weight, j in zip(weights, held, strict=True):
                out[head, i] += weight / total * values[head, j].double()
    return out


def sparse_quality(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, allowed: Tensor) -> tuple[float, float]:
    """What the quality guard measures. Arguments as in `attention`; allowed: [heads, n, m] bool, what a query attends
    to. Returns the share of the dense mass on allowed keys, mean over heads and queries, and the output's error in
    norm, as a share of the dense output's."""
    heads, queries, dim = query.shape
    recall = 0.0
    sparse = torch.zeros(heads, queries, dim, dtype=torch.float64)
    for head in range(heads):
        for i in range(queries):
            logits = [float(query[head, i].double() @ key.double()) / math.sqrt(dim) for key in keys[head]]
            weights = [float(counts[head, j]) * math.exp(logit) for j, logit in enumerate(logits)]
            taken = sum(weight for weight, yes in zip(weights, allowed[head, i], strict=True) if yes)
            recall += taken / sum(weights) / (heads * queries)
            one = slice(head, head + 1)
            seen = counts[one] * allowed[one, i]
            sparse[head, i] = attention(query[one, i : i + 1], keys[one], values[one], seen)[0, 0]
    dense = attention(query, keys, values, counts)
    return recall, float((sparse - dense).norm() / dense.norm())


def turned(x: Tensor, position: int, time_dim: int, theta: float) -> Tensor:
    """x [..., head_dim] with its first `time_dim` dimensions rotated, pair by pair, to a temporal position."""
    out = x.double().clone()
    for pair in range(time_dim // 2):
        angle = position * theta ** (-2 * pair / time_dim)
        even, odd = x[..., 2 * pair].double(), x[..., 2 * pair + 1].double()
        out[..., 2 * pair] = even * math.cos(angle) - odd * math.sin(angle)
        out[..., 2 * pair + 1] = even * math.sin(angle) + odd * math.cos(angle)
    return out


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where tokens lie in time, and how far time is told apart."""

    frame_tokens: int
    chunk_frames: int
    reach: int  # temporal distances beyond it, counted from the chunk's first frame, are this
    time_dim: int
    theta: float
    columns: int = 0  # tokens in a row of the frame; 0: one row

    def place(self, x: Tensor, times: list[int], start: int) -> Tensor:
        """x [heads, len(times), d], turned to the positions of `times` as seen from a chunk that starts at `start`."""
        rows = [
            turned(x[:, i], max(time - start, -self.reach), self.time_dim, self.theta) for i, time in enumerate(times)
        ]
        return torch.stack(rows, 1)


def whole_sequence(query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: int | None = None,
                   sinks: int = 0) -> Tensor:  # fmt: skip
    """Block-causal attention over a whole sequence of frames: a chunk sees all frames before it and itself.

    window: only the first `sinks` and the newest others of the frames before, `window` in all, are seen.
    """
    size, chunk = layout.frame_tokens, layout.chunk_frames
    out = []
    for start in range(0, query.shape[1] // size, chunk):
        seen = list(range(start))
        if window is not None and len(seen) > window:
            seen = seen[:sinks] + seen[len(seen) - (window - sinks) :]
        own = list(range(start, start + chunk))
        times = [time for time in seen + own for _ in range(size)]
        rows = [time * size + i for time in seen + own for i in range(size)]
        q = query[:, start * size : (start + chunk) * size]
        q = layout.place(q, [time for time in own for _ in range(size)], start)
        out.append(attention(q, layout.place(key[:, rows], times, start), value[:, rows]))
    return torch.cat(out, 1)


@dataclasses.dataclass
class Group:
    """Corresponding keys of several frames, or one key (count 1). Key and query have no temporal position."""

    key: Tensor
    value: Tensor  # mean of the members'
    query: Tensor  # of the token that came last
    time: int  # latent frame of the newest member
    due: float = 0.0  # when the newest member is to give way: a latent frame, and a fraction
    count: int = 1


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def due(time: int, token: int, columns: int) -> float:
    """When the token, a number within the frame at `time`, gives way: SPREAD latent frames later, or as many times that
    as the power of two, PERIOD at most, that divides time + its number in the order of thinning. That order's binary
    digits, from the lowest: is the token on a white square of a chessboard; is its row odd; the same of squares of
    2 x 2 tokens, of 4 x 4, and so on."""
    row, column = divmod(token, columns) if columns else (0, token)
    digits = []
    while row or column:
        digits += [(row + column) % 2, row % 2]
        row, column = row // 2, column // 2
    number = sum(digit * 2**place for place, digit in enumerate(digits))
    steps = next(step for step in (16, 8, 4, 2, 1) if step <= PERIOD and (time + number) % step == 0)
    return time + SPREAD * steps + sum(digit / 2 ** (place + 1) for place, digit in enumerate(digits))


def merge(groups: list[Group], leaving: list[Group], threshold: float, budget: int, match: str = "key",
          fold: float = 0.7, early: bool = False) -> list[Group]:  # fmt: skip
    """TempCache, one head: the groups after the tokens of leaving frames have met them.

    A token's match is the nearest group of its key (of its query: the paper); it joins if their *keys*' cosine exceeds
    the threshold, unless (not `early`) there is room for all who leave. The last member is the representative.
    Tokens without a group found one; beyond `budget` groups those that nobody has just joined give way, whose time is
    up first, one for one, to newcomers that stay longer. Who has no place is folded into the nearest group (count and
    mean value, not the key) if their keys' cosine exceeds `fold`, or dropped.
    """
    room = not early and len(groups) + len(leaving) <= budget
    joining: dict[int, list[Group]] = {}
    newcomers = []
    for token in leaving:
        probe = token.query if match == "query" else token.key
        nearest = max(range(len(groups)), key=lambda i: cosine(probe, groups[i].key), default=None)
        if nearest is not None and not room and cosine(token.key, groups[nearest].key) > threshold:
            joining.setdefault(nearest, []).append(token)
        else:
            newcomers.append(token)
    replaceable = sorted((g for i, g in enumerate(groups) if i not in joining), key=lambda group: group.due)
    kept, losers = list(groups), []
    for token in sorted(newcomers, key=lambda token: -token.due):
        if len(kept) < budget:
            kept.append(token)
        elif replaceable and token.due > replaceable[0].due:
            kept = [token if group is replaceable[0] else group for group in kept]
            losers.append(replaceable.pop(0))
        else:
            losers.append(token)
    for index, tokens in joining.items():
        group = groups[index]
        total = group.value * group.count
        for token in tokens:
            total = total + token.value
        group.count += len(tokens)
        group.value = total / group.count
        group.key, group.time, group.due = tokens[-1].key, tokens[-1].time, tokens[-1].due
    for loser in losers if fold < 1 and kept else []:
        group = max(kept, key=lambda group: cosine(loser.key, group.key))
        if cosine(loser.key, group.key) <= fold:
            continue
        group.value = (group.value * group.count + loser.value * loser.count) / (group.count + loser.count)
        group.count += loser.count
    return kept


class TempCache:
    """One layer of one stream; per head, groups (`memory`), and sinks and newest frames token by token (`frames`)."""

    def __init__(self, heads: int, layout: Layout, *, budget: int, sinks: int, recent: int, threshold: float,
                 match: str = "key", fold: float = 0.7, early: bool = False) -> None:  # fmt: skip
        """budget: groups. sinks, recent: whole frames."""
        self.layout, self.budget, self.sinks, self.recent = layout, budget, sinks, recent
        self.threshold, self.match, self.fold, self.early = threshold, match, fold, early
        self.memory: list[list[Group]] = [[] for _ in range(heads)]
        self.frames: list[list[Group]] = [[] for _ in range(heads)]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        """The chunk's queries over all that is held and the chunk itself; start: its first latent frame."""
        times = self._times(start)
        q, k = self.layout.place(query, times, start), self.layout.place(key, times, start)
        out = []
        for head, (memory, frames) in enumerate(zip(self.memory, self.frames, strict=True)):
            keys, values, counts = self._held(memory + frames, start, k[head], value[head])
            out.append(attention(q[head][None], keys[None], values[None], counts[None])[0])
        return torch.stack(out)

    def append(self, query: Tensor, key: Tensor, value: Tensor, start: int) -> None:
        """Takes a clean chunk in; frames beyond the newest leave for the memory."""
        size, times = self.layout.frame_tokens, self._times(start)
        for head in range(len(self.memory)):
            self.frames[head] += [
                Group(key[head, i].double(), value[head, i].double(), query[head, i].double(), times[i],
                      due(times[i], i % size, self.layout.columns))
                for i in range(len(times))
            ]  # fmt: skip
            surplus = len(self.frames[head]) - (self.sinks + self.recent) * size
            while surplus > 0:  # frame by frame
                first = self.sinks * size
                leaving = self.frames[head][first : first + size]
                del self.frames[head][first : first + size]
                self.memory[head] = merge(
                    self.memory[head], leaving, self.threshold, self.budget, self.match, self.fold, self.early
                )
                surplus -= size

    def _times(self, start: int) -> list[int]:
        return [start + i for i in range(self.layout.chunk_frames) for _ in range(self.layout.frame_tokens)]

    def _held(self, groups: list[Group], start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, counts = key, value.double(), torch.ones(len(key), dtype=torch.float64)
        if groups:
            raw = torch.stack([group.key for group in groups])[None]
            placed = self.layout.place(raw, [group.time for group in groups], start)[0]
            keys = torch.cat([placed, keys])
            values = torch.cat([torch.stack([group.value for group in groups]), values])
            counts = torch.cat([torch.tensor([group.count for group in groups], dtype=torch.float64), counts])
        return keys, values, counts


def signatures(x: Tensor, planes: Tensor, tables: int, bits: int) -> list[list[int]]:
    """LSH: per row of x [n, d] its bucket in each table, the signs of `bits` projections read as a binary number."""
    found = []
    for row in x.double():
        buckets = []
        for table in range(tables):
            bucket = 0
            for bit in range(bits):
                if float(row @ planes[:, table * bits + bit].double()) > 0:
                    bucket += 2**bit
            buckets.append(bucket)
        found.append(buckets)
    return found


def ann_sa(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, own: int, planes: Tensor, bits: int,
           density: float, blocks: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """AnnSA by masking. Queries in the order of their buckets form equal blocks; a block takes the share `density` of
    the cached keys with the most attention from its queries, and the last `own` keys (the chunk's).

    Returns the attention output and the mask [heads, queries, keys] of what each query attended to.
    """
    heads, queries, dim = query.shape
    cached = keys.shape[1] - own
    take = math.ceil(density * cached)
    mask = torch.zeros(heads, queries, keys.shape[1], dtype=torch.bool)
    out = torch.zeros(heads, queries, dim, dtype=torch.float64)
    for head in range(heads):
        buckets = [codes[0] for codes in signatures(query[head], planes, 1, bits)]
        order = sorted(range(queries), key=lambda i: buckets[i])
        for block in range(blocks):
            members = order[block * queries // blocks : (block + 1) * queries // blocks]
            score = [0.0] * cached
            for i in members:
                q = query[head, i].double()
                weights = [
                    float(counts[head, j]) * math.exp(float(q @ keys[head, j].double()) / math.sqrt(dim))
                    for j in range(cached)
                ]
                total = sum(weights)
                for j in range(cached):
                    score[j] += weights[j] / total
            taken = sorted(range(cached), key=lambda j: -score[j])[:take]
            for i in members:
                mask[head, i, taken] = True
                mask[head, i, cached:] = True
        for i in range(queries):
            seen = mask[head, i] & (counts[head] > 0)
            q, k, v = query[head, i], keys[head, seen], values[head, seen]
            out[head, i] = attention(q[None, None], k[None], v[None], counts[head, seen][None])[0, 0]
    return out, mask


def folded(text: Tensor) -> list[list[int]]:
    """Token numbers of equal rows of text [tokens, text_dim], group by group."""
    groups: list[list[int]] = []
    for token in range(len(text)):
        same = next((group for group in groups if text[group[0]].equal(text[token])), None)
        groups.append([token]) if same is None else same.append(token)
    return groups


def ann_ca(query: Tensor, keys: Tensor, values: Tensor, text: Tensor, planes: Tensor, tables: int,
           bits: int) -> tuple[Tensor, list[int]]:  # fmt: skip
    """AnnCA's bucket test: equal prompt tokens (rows of text [tokens, text_dim]) folded into groups; a head keeps the
    groups that share a bucket of some table with some query, and the largest group (the padding).

    query: [heads, n, d]; keys, values: [heads, tokens, d]. Returns the output and the groups kept by each head.
    """
    groups = folded(text)
    largest = max(len(group) for group in groups)
    out, kept = [], []
    for head in range(len(query)):
        asked = signatures(query[head], planes, tables, bits)
        here = []
        for group in groups:
            (code,) = signatures(keys[head, group[:1]], planes, tables, bits)
            shared = any(code[table] == buckets[table] for buckets in asked for table in range(tables))
            if shared or len(group) == largest:
                here.append(group)
        first = [group[0] for group in here]
        counts = torch.tensor([len(group) for group in here], dtype=torch.float64)
        out.append(attention(query[head][None], keys[head, first][None], values[head, first][None], counts[None])[0])
        kept.append(len(here))
    return torch.stack(out), kept


def ann_ca_by_mass(query: Tensor, keys: Tensor, values: Tensor, text: Tensor, least: float,
                   every: int) -> tuple[Tensor, list[int]]:  # fmt: skip
    """AnnCA's mass test with exact scores: a head keeps its fewest groups of equal tokens that hold the share `least`
    of its attention, by every `every`-th query; the others become one group, which counts as kept, too.

    Arguments otherwise, and results, as of `ann_ca`."""
    groups = folded(text)
    first, counts = [group[0] for group in groups], [float(len(group)) for group in groups]
    out, kept = [], []
    for head in range(len(query)):
        asked = query[head, ::every].double()
        mass = [0.0] * len(groups)
        for q in asked:
            dots = [float(q @ keys[head, token].double()) / math.sqrt(query.shape[-1]) for token in first]
            weights = [count * math.exp(dot - max(dots)) for count, dot in zip(counts, dots, strict=True)]
            for group, weight in enumerate(weights):
                mass[group] += weight / sum(weights) / len(asked)
        here: list[int] = []
        for group in sorted(range(len(groups)), key=lambda group: -mass[group]):
            if sum(mass[other] for other in here) < least:
                here.append(group)
        k = [keys[head, first[group]].double() for group in here]
        v = [values[head, first[group]].double() for group in here]
        m = [counts[group] for group in here]
        rest = [group for group in range(len(groups)) if group not in here]
        if rest:
            total = sum(mass[group] for group in rest)
            shares = {group: mass[group] / total for group in rest}
            k.append(sum(share * keys[head, first[group]].double() for group, share in shares.items()))
            v.append(sum(share * values[head, first[group]].double() for group, share in shares.items()))
            m.append(math.exp(sum(share * math.log(counts[group] / share) for group, share in shares.items())))
        weights = torch.tensor(m, dtype=torch.float64)
        out.append(attention(query[head][None], torch.stack(k)[None], torch.stack(v)[None], weights[None])[0])
        kept.append(len(k))
    return torch.stack(out), kept
