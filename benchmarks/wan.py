"""FAST-AR at full scale: Wan2.1-1.3B's causal transformer at 480x832 on one GPU, thousands of frames.

    python -m benchmarks.wan --out DIR                      # headline: FAST-AR, window and dense; decoder included
    python -m benchmarks.wan --part lengths --out DIR       # a chunk after histories of several lengths: break-even
    python -m benchmarks.wan --part streams --out DIR       # streams per GPU at 16 FPS
    python -m benchmarks.wan --part guard --out DIR         # what the quality guard costs a chunk
    python -m benchmarks.wan --part table --out DIR         # where the time of a chunk goes, and each part's floor

Random weights, so that nothing has to be downloaded: random content has no redundancy, which is the worst case for a
cache and honest for speed, since the budget is hard. Quality is measured elsewhere. Every chunk is timed from the call
of `StreamEngine.step` to its frames in host memory: four denoising passes, the pass that writes the cache, merging,
decoding, copy out. Dense attention is cuDNN's, the faster one on Hopper (benchmarks/kernels.py)."""

from __future__ import annotations

import gc
import json
import statistics
import time
import zlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from benchmarks.wan_report import FRAMES, markdown, plot
from fastar_backend.config import AttentionConfig, ExecutionConfig, ModelConfig, SamplerConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.graphs import recorder_for
from fastar_backend.engine.stream import ChunkRequest, StreamOptions
from fastar_backend.engine.warm_up import fill, fill_chunk
from fastar_backend.errors import FastarError
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.taehv import TinyDecoder
from fastar_backend.model.tuning import tune
from fastar_backend.model.wan_vae import WanDecoder
from fastar_backend.model.world import World, WorldConfig

WARM = 6  # chunks until graphs are recorded, at each place of a cache's ring
POLICIES = {
    "fastar": AttentionConfig(budget_frames=6, recent_frames=3),
    "window": AttentionConfig(kind="window", budget_frames=6, sink_frames=3),
    "dense": AttentionConfig(kind="dense"),
}


def settings_of(policy: AttentionConfig) -> dict[str, AttentionConfig]:
    """Other budgets (half of it, or six latent frames of it, the newest), and AnnSA at two densities."""
    budgets = {
        f"budget {frames}": policy.model_copy(update={"budget_frames": frames, "recent_frames": min(6, frames // 2)})
        for frames in (6, 12, 21, 36)
    }
    sparse = {
        f"{name}, density {density}": budget.model_copy(update={"sparse_density": density})
        for name, budget in budgets.items()
        for density in (0.28, 0.16)
        if name in ("budget 6", "budget 21")
    }
    return budgets | sparse


class RandomText:
    """Embedded prompts without a text encoder: 40 tokens, zero-padded as umT5's are."""

    def __init__(self, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.on = model, {"device": device, "dtype": dtype}

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        out = torch.zeros(len(prompts), self.model.text_tokens, self.model.text_dim, **self.on)
        for row, prompt in enumerate(prompts):
            own = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            out[row, :40] = torch.randn(40, self.model.text_dim, generator=own).to(**self.on)
        return out


def randomise(module: nn.Module) -> None:
    """Weights of the size that keeps activations near 1; biases and modulations small."""
    for name, value in module.named_parameters():
        if value.dim() > 1 and "modulation" not in name:
            nn.init.normal_(value, std=value[0].numel() ** -0.5)
        elif name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight", "gamma")):
            nn.init.ones_(value)
        else:
            nn.init.normal_(value, std=0.02)


def make_world(decoder: str, layers: int, tiny: bool, device: str, dtype: torch.dtype) -> World:
    changes: dict[str, Any] = {"layers": layers}
    if tiny:
        changes |= {"dim": 256, "heads": 2, "ffn_dim": 512, "text_dim": 64, "latent_height": 8, "latent_width": 12}
    model = ModelConfig(**changes)
    config = WorldConfig(
        name="wan-random", native_fps=16, frames_per_latent=4, buttons=(), scenarios={}, starts={}, model=model,
        sampler=SamplerConfig(),
    )  # fmt: skip
    on = torch.device(device)
    with on:
        dit = CausalDiT(model).to(on, dtype).eval().requires_grad_(False)
        pixels = (TinyDecoder(64 if tiny else 256) if decoder == "taehv" else WanDecoder(16 if tiny else 96)).to(dtype)
    randomise(dit)
    randomise(pixels)
    return World(config, dit, RandomText(model, on, dtype), pixels.eval().requires_grad_(False), None, {})


def make_engine(world: World, *, execution: ExecutionConfig, attention: AttentionConfig) -> StreamEngine:
    torch.backends.cudnn.benchmark = True
    tune(world, execution)
    recorder = recorder_for(world.dit.head.head.weight, execution)
    return StreamEngine(world, attention, max_streams=64, stream_bytes=1 << 62, recorder=recorder)


def advance(engine: StreamEngine, streams: list[int]) -> list[Any]:
    chunks = engine.step([ChunkRequest(stream, ("",)) for stream in streams])
    for chunk in chunks:
        if isinstance(chunk, FastarError):
            raise chunk
    return chunks


def rollout(engine: StreamEngine, policy: AttentionConfig, frames: int, seconds: float) -> dict[str, Any]:
    """One stream until so many frames, or the time or the memory is over."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine.open(1, "a forest in the rain", StreamOptions(seed=1, start="nothing", attention=policy))
    times, made, memory, shown, stopped = [], [], [], [], "frames"
    began = time.perf_counter()
    chunk = None
    try:
        while sum(made) < frames and stopped == "frames":
            start = time.perf_counter()
            (chunk,) = advance(engine, [1])
            times.append(time.perf_counter() - start)
            made.append(len(chunk.frames))
            if len(shown) < 2:
                shown.append(chunk.frames.astype(np.float32))
            memory.append(torch.cuda.max_memory_allocated() / 2**30)
            torch.cuda.reset_peak_memory_stats()
            if time.perf_counter() - began > seconds:
                stopped = "time"
    except FastarError:
        stopped = "memory"  # `step` reports running out of memory as a failed step, and closes the stream
    engine.close(1)
    count = np.cumsum(made).tolist()
    result = {"frames": count, "seconds": times, "peak_gib": memory, "stopped_by": stopped, "shown": shown}
    if len(times) > 12:
        steady, tenth = times[8:], max(1, (len(times) - 8) // 10)
        result |= {
            "fps": FRAMES / statistics.median(steady), "fps_last": FRAMES / statistics.median(times[-tenth:]),
            "fps_whole": sum(made[1:]) / sum(times[1:]),
            "flat": statistics.median(steady[:tenth]) / statistics.median(times[-tenth:]),
            "memory_growth": memory[-1] / max(memory[8], memory[9]) - 1,
            "stream_gib": None if chunk is None else chunk.stats.cache_bytes / 2**30,
            "density": None if chunk is None else chunk.stats.density,
            "cache_tokens": None if chunk is None else chunk.stats.cache_tokens,
        }  # fmt: skip
    return result


@torch.inference_mode()
def at_lengths(engine: StreamEngine, policy: AttentionConfig, frames: list[int]) -> list[dict[str, float]]:
    """Four chunks after histories of so many latent frames, filled with random keys and values: what a chunk costs
    there without the time that a rollout takes to get there. Ends where the memory does."""
    rows: list[dict[str, float]] = []
    gc.collect()
    torch.cuda.empty_cache()
    engine.open(1, "a forest in the rain", StreamOptions(seed=1, start="nothing", attention=policy))
    stream = engine.streams[1]
    try:
        for latent in frames:
            while stream.latent_frame < latent:
                fill_chunk(engine, stream)
            torch.cuda.reset_peak_memory_stats()
            times = []
            for _ in range(6 if policy.kind == "dense" else 10):  # graphs are recorded, at each place of the ring
                start = time.perf_counter()
                advance(engine, [1])
                times.append(time.perf_counter() - start)
            peak = torch.cuda.max_memory_allocated() / 2**30
            rows.append(
                {"latent_frames": stream.latent_frame, "ms": 1000 * statistics.median(times[-4:]), "peak_gib": peak}
            )
    except (FastarError, torch.OutOfMemoryError):
        print(f"out of memory after {stream.latent_frame} latent frames", flush=True)
    engine.close(1)
    return rows


def against_dense(lengths: dict[str, list[dict[str, float]]], milliseconds_of: float) -> list[dict[str, float]]:
    """Dense attention's rollout from what its chunks cost at several lengths (linear in between), and how often as
    fast a policy is whose chunks all take `milliseconds_of`: at a frame, and over all frames up to it."""
    at, cost = (np.array([row[name] for row in lengths["dense"]]) for name in ("latent_frames", "ms"))
    chunks = np.arange(1, int(at[-1]) // 3 + 1)
    dense = np.interp(3 * chunks, at, cost)
    rows = []
    for frame in (240, 480, 720, 960, 1440, 1920, FRAMES * len(chunks)):
        if (count := frame // FRAMES) <= len(chunks):
            rows.append({"frame": frame, "dense_fps": 1000 * FRAMES / dense[count - 1],
                         "faster_here": dense[count - 1] / milliseconds_of,
                         "faster_so_far": dense[:count].mean() / milliseconds_of})  # fmt: skip
    return rows


@torch.inference_mode()
def many(engine: StreamEngine, policy: AttentionConfig, streams: int, chunks: int = 6) -> dict[str, Any]:
    """Streams in one step, all caches full."""
    gc.collect()
    torch.cuda.empty_cache()
    numbers = list(range(1, streams + 1))
    for number in numbers:
        engine.open(number, "a forest in the rain", StreamOptions(seed=number, start="nothing", attention=policy))
        fill(engine, engine.streams[number])
    try:
        for _ in range(WARM):
            advance(engine, numbers)
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(chunks):
            start = time.perf_counter()
            advance(engine, numbers)
            times.append(time.perf_counter() - start)
        each = FRAMES / statistics.median(times)
        return {"streams": streams, "fps_each": each, "fps_worst": FRAMES / max(times), "fps_total": each * streams,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30}  # fmt: skip
    finally:
        for number in numbers:
            engine.close(number)


@torch.inference_mode()
def guarded(engine: StreamEngine, policy: AttentionConfig, chunks: int = 40) -> dict[str, float]:
    """Two streams, one of them watched by the quality guard, chunk about chunk, all caches full. With AnnSA at .28."""
    gc.collect()
    torch.cuda.empty_cache()
    for stream, kind in ((1, "off"), (2, "observe")):
        attention = policy.model_copy(update={"sparse_density": 0.28, "guard": kind})
        engine.open(stream, "a forest in the rain", StreamOptions(seed=1, start="nothing", attention=attention))
        fill(engine, engine.streams[stream])
    times: dict[int, list[float]] = {1: [], 2: []}
    recalls = []
    warm, before = 26, torch.cuda.memory_reserved()  # until every set of layers is recorded at each place
    for index in range(warm + chunks):
        for stream in (1, 2) if index % 2 else (2, 1):
            start = time.perf_counter()
            (chunk,) = advance(engine, [stream])
            times[stream].append(time.perf_counter() - start)
            recalls += [chunk.stats.guard_recall] if stream == 2 else []
    for stream in times:
        engine.close(stream)
    pairs = [b / a for a, b in list(zip(times[1], times[2], strict=True))[warm:]]
    off, on = (1000 * statistics.median(times[stream][warm:]) for stream in (1, 2))
    return {"off_ms": off, "on_ms": on, "ratio_of_pairs": statistics.median(pairs), "recall": statistics.mean(recalls),
            "recordings_gib": (torch.cuda.memory_reserved() - before) / 2**30}  # fmt: skip


def milliseconds(act: Any, repeats: int = 5) -> float:
    act()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        act()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def ceilings(device: torch.device) -> tuple[float, float]:
    """TFLOP/s of a bf16 product and TB/s of a copy."""
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    x = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    matmul = 2 * 8192**3 / milliseconds(lambda: a @ b, 20) / 1e9
    return matmul, 2 * x.nbytes / milliseconds(lambda: x.clone(), 20) / 1e9


# Which part of a chunk a kernel belongs to: the first line with a piece of its name counts.
KERNELS = {
    "products of the linear layers": ("nvjet", "cublas"),
    "norms, gates, positions in space": ("modulate_kernel", "heads_kernel"),
    "attention to whole frames (cuDNN)": ("sdpa",),
    "attention to the memory and the prompt (ours)": ("attend_kernel",),
    "positions in time": ("turn_kernel",),
    "merging: nearest groups": ("nearest_kernel",),
    "merging: the rest": ("merge_kernel", "place_kernel", "gather", "sort", "Sort", "TopK", "topk", "scatter"),
    "decoding": ("fprop", "triton_", "conv"),
}


@torch.inference_mode()
def table(engine: StreamEngine, policy: AttentionConfig) -> dict[str, Any]:
    """Where the time of a chunk goes, by its kernels in the whole step with full caches (milliseconds), and floors from
    this machine's own bf16 product and copy rates."""
    model, shape = engine.world.config.model, engine.shape
    matmul, copy = ceilings(engine.device)
    engine.open(1, "a forest in the rain", StreamOptions(seed=1, start="nothing", attention=policy))
    stream = engine.streams[1]
    fill(engine, stream)
    for _ in range(WARM):
        advance(engine, [1])
    times = []
    for _ in range(10):
        start = time.perf_counter()
        (chunk,) = advance(engine, [1])
        times.append(1000 * (time.perf_counter() - start))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        advance(engine, [1])
    kernels = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    parts = dict.fromkeys([*KERNELS, "other kernels and copies"], 0.0)
    for event in kernels:
        part = next((part for part, names in KERNELS.items() if any(name in event.key for name in names)), None)
        parts[part or "other kernels and copies"] += event.self_device_time_total / 1000
    top = {event.key[:80]: [event.self_device_time_total / 1000, event.count] for event in kernels[:30]}
    passes = len(engine.world.config.sampler.sigmas) + 1
    keys = chunk.stats.cache_tokens + shape.chunk_tokens
    per_token = 2 * (4 * model.dim**2 + 2 * model.dim**2 + 2 * model.dim * model.ffn_dim) * model.layers
    floors = {
        "linear layers": passes * shape.chunk_tokens * per_token / matmul / 1e9,
        "self-attention": passes * model.layers * 4 * shape.chunk_tokens * keys * model.dim / matmul / 1e9,
    }
    engine.close(1)
    return {"matmul_tflops": matmul, "copy_tb_s": copy, "parts_ms": parts, "floors_ms": floors,
            "chunk_ms": statistics.median(times), "kernels_ms": sum(parts.values()), "kernels": top,
            "keys": keys}  # fmt: skip


def main(
    out: Path = Path("out/wan"),
    part: Annotated[
        str, typer.Option(help="rollouts, lengths, settings, streams, guard or table; several by commas.")
    ] = "rollouts",
    policies: str = "fastar,window,dense",
    frames: int = 2880,
    seconds: Annotated[float, typer.Option(help="Limit for each rollout.")] = 240.0,
    decoder: Annotated[str, typer.Option(help="wan or taehv.")] = "taehv",
    layers: int = 30,
    compiled: bool = True,
    fp8: bool = False,
    budget: Annotated[int, typer.Option(help="Latent frames; half of them the newest, whole.")] = 6,
    streams: str = "1,2,4,6",
    tiny: Annotated[bool, typer.Option(help="A reduced model, to see that it runs.")] = False,
) -> None:
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    recent = max(3, budget // 2 // 3 * 3)
    policies_of = POLICIES | {
        "fastar": AttentionConfig(budget_frames=budget, recent_frames=recent),
        "window": AttentionConfig(kind="window", budget_frames=budget, sink_frames=3),
    }
    world = make_world(decoder, layers, tiny, "cuda", torch.bfloat16)
    execution = ExecutionConfig(precision="fp8" if fp8 else "auto", compile=compiled)
    engine = make_engine(world, execution=execution, attention=policies_of["fastar"])
    settings = {
        "decoder": decoder,
        "compiled": compiled,
        "fp8": fp8,
        "budget": budget,
        "recent": recent,
        "layers": layers,
    }
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "settings": settings}

    def save() -> None:
        (out / "wan.json").write_text(json.dumps(result, indent=1))
        (out / "wan.md").write_text(markdown(result))

    began = time.perf_counter()
    engine.open(1, "a forest in the rain", StreamOptions(seed=1, start="nothing"))
    for _ in range(3):
        advance(engine, [1])
    engine.close(1)
    result["warm_up_seconds"] = time.perf_counter() - began
    print(f"warm-up {result['warm_up_seconds']:.0f} s", flush=True)
    if "table" in part:
        result["table"] = table(engine, policies_of["fastar"])
        save()
    if "rollouts" in part:
        result["rollouts"], first = {}, None
        for name in policies.split(","):
            run = rollout(engine, policies_of[name], frames, seconds)
            # Two chunks fit every cache whole, so all policies must show the same, to rounding.
            first = first or run["shown"]
            run["off_by"] = [float(np.abs(a - b).mean()) for a, b in zip(first, run.pop("shown"), strict=True)]
            result["rollouts"][name] = run
            print(name, {key: value for key, value in run.items() if not isinstance(value, list)}, flush=True)
            save()
        plot(result, out / "wan.png")
    if "lengths" in part:
        result["lengths"] = {}
        for name in policies.split(","):
            steps = [3, 6, 9, 12, 21, *(range(60, 721, 60) if name == "dense" else (60,))]
            result["lengths"][name] = at_lengths(engine, policies_of[name], steps)
            for row in result["lengths"][name]:
                print(name, row, flush=True)
            save()
        if {"fastar", "dense"} <= result["lengths"].keys():
            steady = statistics.median(row["ms"] for row in result["lengths"]["fastar"][2:])
            result["against_dense"] = against_dense(result["lengths"], steady)
            save()
        if "rollouts" in result:
            plot(result, out / "wan.png")
    if "settings" in part:
        result["by_setting"] = {}
        for name, policy in settings_of(policies_of["fastar"]).items():
            result["by_setting"][name] = at_lengths(engine, policy, [policy.budget_frames + 6])[0]
            print(name, result["by_setting"][name], flush=True)
            save()
    if "streams" in part:
        result["streams"] = []
        for number in map(int, streams.split(",")):
            try:
                row = many(engine, policies_of["fastar"], number)
            except (FastarError, torch.cuda.OutOfMemoryError) as error:
                print(f"{number} streams: {type(error).__name__}", flush=True)
                break
            result["streams"].append({"policy": "fastar"} | row)
            print(row, flush=True)
            save()
    if "guard" in part:
        result["guard"] = guarded(engine, policies_of["fastar"])
        print(result["guard"], flush=True)
    save()
    print(markdown(result))


if __name__ == "__main__":
    typer.run(main)
