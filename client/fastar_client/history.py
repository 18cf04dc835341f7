"""What the server executed since its newest stored snapshot, chunk by chunk: enough to make those chunks again."""

from __future__ import annotations

import dataclasses
from collections import deque


@dataclasses.dataclass(frozen=True)
class Made:
    """One chunk that has come."""

    actions: tuple[str, ...]
    applied: tuple[int, ...]  # controls that took effect with it
    rewound: bool = False  # among them a rewind, to this chunk


class History:
    """Of the chunks `first` .. `next` - 1, without gap."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.stored = False  # whether we know of a snapshot before `first`
        self._made: deque[Made] = deque()
        self._before = 0  # highest control applied before `first`

    @property
    def next(self) -> int:
        return self.first + len(self._made)

    def __getitem__(self, chunk: int) -> Made:
        return self._made[chunk - self.first]

    def add(self, chunk: int, made: Made) -> None:
        """`chunk` is `next`, or, with a rewind, any: what came after it is undone."""
        if made.rewound:
            if chunk < self.first:
                self._made.clear()
                self.first, self._before = chunk, 0
            self.stored = True
            while self.next > chunk:
                self._made.pop()
        self._made.append(made)

    def trim(self, snapshot: int | None) -> int:
        """Forgets the chunks before `snapshot`; returns the highest control applied before what is left."""
        while snapshot is not None and self.first < snapshot < self.next:
            self._before = max(self._before, *self._made.popleft().applied, 0)
            self.first += 1
        self.stored = self.stored or self.first == snapshot
        return self._before

    def last_control(self, chunk: int) -> int:
        """The highest control applied before `chunk`."""
        return max([self._before, *(id for n in range(self.first, chunk) for id in self[n].applied)])

    def ask(self, actions: tuple[str, ...], at_end: bool) -> int:
        """The chunk to resume at. The server goes on from the newest state that is not later, and only its first reply
        tells which that was; the request for it carries `actions`. So ask for `next`, where the server is likely to
        have that state (`at_end`) or any state will do; else for the newest snapshot that we know to be there."""
        uniform = all(made.actions == actions and not made.applied for made in self._made)
        return self.next if at_end or uniform or not self.stored else self.first

    def holds(self, chunk: int, received: int) -> bool:
        """Whether we can go on from the state before `chunk`, which took controls up to `received`; not from one of
        before a rewind."""
        return self.first <= chunk <= self.next and received >= self.last_control(chunk)
