"""What only a GPU with TensorRT can prove, in one command, to be run in NVIDIA's Triton image:

    python -m plugins.verify --world doom --out /tmp/engine

Builds the engines, loads them as the server does, and holds every graph, then a whole stream, also recorded as CUDA
graphs, against PyTorch's kernels in the same state. Prints each check's figure and bound; ends with status 1 if one
failed, 2 if nothing could be checked."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from fastar_backend.config import ExecutionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.graphs import CudaRecorder, Recorder
from fastar_backend.engine.stream import Chunk, ChunkRequest, StreamOptions
from fastar_backend.errors import FastarError, InvalidInput
from plugins import engines, pipeline
from plugins.cli import attention_of

# Relative differences of one pass that rounding explains (estimates), by type.
BOUNDS = {"fp16": 1e-2, "bf16": 5e-2}
PROMPT = "a corridor with torches"


@dataclasses.dataclass(frozen=True)
class Result:
    what: str
    figure: float  # a difference
    bound: float

    @property
    def passed(self) -> bool:
        return self.figure <= self.bound  # not so, if it is not a number

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.what:62} {self.figure:10.3g}  at most {self.bound:g}"


def difference(mine: Tensor, theirs: Tensor) -> float:
    """||mine - theirs|| / ||theirs||; infinite where one is not finite or all zero and the other is not."""
    mine, theirs = mine.double(), theirs.double()
    if not mine.isfinite().all() or not theirs.isfinite().all():
        return float("inf")
    off, size = (mine - theirs).norm().item(), theirs.norm().item()
    return off / size if size else (0.0 if off == 0 else float("inf"))


def advance(engine: StreamEngine, chunk: int, stream: int = 1) -> Chunk:
    """Raises FastarError."""
    buttons = engine.world.config.buttons
    (result,) = engine.step([ChunkRequest(stream, (buttons[0] if buttons and chunk % 3 else "",))])
    if isinstance(result, FastarError):
        raise result
    return result


@torch.inference_mode()
def graphs(reference: StreamEngine, engine: StreamEngine) -> Iterator[Result]:
    """Each graph on the state that the reference's stream has when its caches are full. Both engines hold stream 1."""
    theirs, mine = (each.streams[1] for each in (reference, engine))
    while not getattr(theirs.caches, "full", False) or not theirs.caches.merged:
        advance(reference, theirs.chunk)
        if theirs.chunk > 4 * theirs.caches.places:  # nothing merges here
            break
    mine.caches.load(*theirs.caches.state())
    mine.latent_frame = theirs.latent_frame
    bound, frames = BOUNDS.get(engines.TYPES[reference.dtype], min(BOUNDS.values())), reference.shape.chunk_frames
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, *reference.latent_shape, generator=generator).to(reference.device, reference.dtype)
    actions = torch.zeros(1, frames, len(reference.world.config.buttons), device=x.device, dtype=x.dtype)

    def begin() -> None:
        for stream in (theirs, mine):
            stream.begin_caches()

    begin()
    yield Result("begin: turned keys", difference(mine.caches.keys, theirs.caches.keys), bound)
    steps = sorted({0.0, theirs.attention.dense_steps} if theirs.attention.sparse_density < 1 else {0.0})
    for progress in steps:
        begin()  # PyTorch selects once a chunk, a graph in every pass
        outs = [
            each._forward([stream], x, 0.7, actions, progress=progress, write=False)
            for each, stream in ((engine, mine), (reference, theirs))
        ]
        yield Result(f"denoising pass at {progress:g} of the steps: output", difference(*outs), bound)
    begin()
    outs = [
        each._forward([stream], x, 0.0, actions, progress=1.0, write=True)
        for each, stream in ((engine, mine), (reference, theirs))
    ]
    yield Result("writing pass: output", difference(*outs), bound)
    for name in ("keys", "values", "origin"):
        found = difference(getattr(mine.caches, name), getattr(theirs.caches, name))
        yield Result(f"writing pass: {name}, in place", found, bound)
    slots = theirs.caches.slots
    if slots:
        mine.caches.load(*theirs.caches.state())  # merging decides by comparisons: from equal inputs
        before = theirs.caches.merged.item()
        for stream in (theirs, mine):
            stream.caches.commit()
        other = (mine.caches.count[:, :slots] != theirs.caches.count[:, :slots]).float().mean().item()
        yield Result("update: share of groups with another count", other, 0.02)
        merged = [stream.caches.merged.item() - before for stream in (mine, theirs)]
        yield Result("update: tokens merged, relative", abs(merged[0] - merged[1]) / max(merged[1], 1.0), 0.02)


def streams(
    reference: StreamEngine, engine: StreamEngine, recorder: Recorder, chunks: int
) -> Iterator[Result]:  # fmt: skip
    """Whole streams from the same seed, then the engine's chunks recorded against computed."""
    seconds: dict[str, list[float]] = {"PyTorch": [], "TensorRT": []}
    every = {"PyTorch": reference, "TensorRT": engine}
    for each in every.values():
        each.close(1)
        each.open(1, PROMPT, StreamOptions(seed=1, start="nothing"))
    made: dict[str, list[Chunk]] = {name: [] for name in every}
    for chunk in range(chunks):
        for name, each in every.items():
            began = time.perf_counter()
            made[name].append(advance(each, chunk))
            seconds[name].append(time.perf_counter() - began)
    first = [torch.from_numpy(made[name][0].frames.astype("float32")) for name in ("TensorRT", "PyTorch")]
    yield Result("stream: the first chunk's pixels, mean of 255", (first[0] - first[1]).abs().mean().item(), 3.0)
    for name in ("density", "cache_tokens", "text_tokens"):
        off = [abs(getattr(a.stats, name) / getattr(b.stats, name) - 1) for a, b in zip(*made.values(), strict=True)]
        yield Result(f"stream: {name}, relative, worst of {chunks} chunks", max(off), 1e-3)
    engine.fork(1, 2)
    engine.recorder = recorder
    worst = 0.0
    # Each place of the ring is computed once more before it is recorded; the fork goes on unrecorded.
    for chunk in range(chunks, chunks + 2 * engine.streams[1].caches.places // engine.shape.chunk_frames + 2):
        recorded = advance(engine, chunk).frames.astype("int32")
        engine.recorder = None
        plain = advance(engine, chunk, stream=2)
        engine.recorder = recorder
        worst = max(worst, float(abs(recorded - plain.frames).mean()))
    yield Result("CUDA graphs: pixels against the same chunks computed", worst, 0.5)
    count = len(engine.streams[1].graphs.recorded)
    yield Result("CUDA graphs: places of the ring without a recording", float(count == 0), 0.0)
    for name, taken in seconds.items():
        print(f"      {name}: {sorted(taken[chunks // 2 :])[chunks // 4] * 1e3:.1f} ms a chunk (median, not recorded)")


def main(
    out: Annotated[Path, typer.Option(help="Folder for the engine.")],
    world: Annotated[str, typer.Option(help="A built-in world, or a folder with a world.json.")] = "doom",
    attention: Annotated[str, typer.Option(help="fastar, window, or JSON of all its settings.")] = "fastar",
    precision: Annotated[str, typer.Option(help="fp16 or bf16.")] = "fp16",
    plugins: Annotated[str, typer.Option(help="qdp, library, or auto.")] = "auto",
    chunks: Annotated[int, typer.Option(min=4, help="Of the stream that is compared.")] = 16,
) -> None:
    """Builds and proves an engine. Needs a GPU and TensorRT."""
    try:
        if precision not in BOUNDS:  # PyTorch has no kernels to compare with
            raise InvalidInput("precision", f"got {precision!r:.40}", " or ".join(BOUNDS))
        settings, trt = attention_of(attention), engines.tensorrt("verify")
        place = engines.here(trt)
        if place.gpu is None:
            raise FastarError("verify: PyTorch sees no GPU; allowed: a machine with one (docker run --gpus all)")
        print(
            f"{place.gpu}, compute capability {place.capability}, {place.tensorrt} {place.version}, {sys.version[:6]}"
        )
        loaded = pipeline.load(world, precision)
        began = time.perf_counter()
        made = pipeline.make(trt, loaded, settings, out, plugins=plugins)
        print(f"pass  built {len(made.graphs)} engines in {time.perf_counter() - began:.0f} s ({made.plugins}): {out}")
        dtype, none = pipeline.DTYPES[made.precision], ExecutionConfig(compile=False)
        by_engine = ExecutionConfig(compile=False, runtime="tensorrt", engine_dir=out)
        pair = [StreamEngine.load(world, "cuda", settings, 2, dtype, execution=each) for each in (none, by_engine)]
        print("pass  loaded")
        for engine in pair:
            engine.open(1, PROMPT, StreamOptions(seed=1, start="nothing"))
    except FastarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    failed = 0
    for result in itertools.chain(graphs(*pair), streams(*pair, CudaRecorder(), chunks)):
        print(result, flush=True)
        failed += not result.passed
    print("all passed" if not failed else f"{failed} failed")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
