"""What the quality guard costs: two streams of the embedded world, equal but for the guard, chunk about chunk.

    OMP_NUM_THREADS=1 python -m benchmarks.guard --chunks 100

Prints the median CPU seconds of a chunk without and with the guard, their ratio, that of neighbouring chunks (median),
and the share of a chunk spent in the guard's own functions, which a noisy machine disturbs least.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated

import torch
import typer

from fastar_backend.attention import guard
from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import ChunkRequest, StreamOptions

WARM = 12  # chunks until the caches are full


def main(
    chunks: Annotated[int, typer.Option(min=1, help="of each stream, that are timed")] = 60,
    density: Annotated[float, typer.Option(min=0.01, max=1.0, help="AnnSA's")] = 0.3,
) -> None:
    inside, by_keys = 0.0, guard.by_keys

    def timed(*parts):
        nonlocal inside
        began = time.process_time()
        found = by_keys(*parts)
        inside += time.process_time() - began
        return found

    guard.by_keys = timed
    engine = StreamEngine.load("doom")
    prompt = next(iter(engine.world.config.scenarios.values())).prompt
    kinds = ("off", "observe")
    for stream, kind in enumerate(kinds):
        attention = AttentionConfig(sparse_density=density, guard=kind)
        engine.open(stream, prompt, StreamOptions(seed=7, attention=attention))
    seconds: tuple[list[float], list[float]] = ([], [])
    shares = []
    for chunk in range(WARM + chunks):
        for stream in (0, 1) if chunk % 2 else (1, 0):  # neither always comes second
            began, inside = time.process_time(), 0.0
            engine.step([ChunkRequest(stream, ("forward",))])
            seconds[stream].append(time.process_time() - began)
            if stream:
                shares.append(inside / seconds[stream][-1])
    off, on = (statistics.median(values[WARM:]) for values in seconds)
    pairs = [b / a for a, b in list(zip(*seconds, strict=True))[WARM:]]
    figures = {"off": off, "on": on, "ratio": on / off, "ratio_of_pairs": statistics.median(pairs)}
    figures |= {"own_share": statistics.median(shares[WARM:])}
    print(json.dumps({"threads": torch.get_num_threads(), "density": density, "chunks": chunks} | figures))


if __name__ == "__main__":
    typer.run(main)
