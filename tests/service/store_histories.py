"""What any store must do: the same as a folder does, whatever happens to one stream."""

from __future__ import annotations

import random
import time
from pathlib import Path

from fastar_backend.errors import FastarError
from fastar_backend.service.store import SnapshotStore, Store


def said(act, *arguments):
    """What it returned, or which error it raised."""
    try:
        return act(*arguments)
    except FastarError as error:
        return type(error), str(error)


def looks_as_in_a_folder(store: Store, folder: Path, seed: int, steps: int = 150) -> None:
    """Three servers that write, take over, rewind and read one stream, by turns, some of them out of date. seed: 0:
    always the same history; others: another one each time."""
    draw = random.Random(f"{seed} {time.time_ns()}" if seed else seed)
    reference, epochs = SnapshotStore(str(folder), keep=2, ttl=3600), [1, 1, 1]
    for step in range(steps):
        who, chunk = draw.randrange(3), draw.randrange(12)
        acts = [
            ("put", "token", chunk, draw.randbytes(draw.choice([0, 1, 7, 14, 40])), epochs[who]),
            ("put", "token", chunk, b"another", epochs[who]),
            ("drop", "token", chunk, epochs[who]),
            ("get", "token", draw.choice([None, chunk])),
            ("claim", "token", chunk),
        ]
        name, *arguments = draw.choices(acts, (4, 4, 1, 4, 1))[0]
        ours, theirs = (said(getattr(one, name), *arguments) for one in (store, reference))
        assert ours == theirs, (step, name, arguments)
        if name == "claim":
            epochs[who] = ours
        assert store.chunks("token") == reference.chunks("token"), (step, name, arguments)
    assert store.chunks("other") == []
