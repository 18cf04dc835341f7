"""Milliseconds per chunk of the video decoders, and how far that is from what the machine could do.

    python -m benchmarks.decode --device cuda --out out/decode
    python -m benchmarks.decode --device cpu --tiny --no-compiled   # does it run?

Random weights, one stream in its steady state: a chunk is 3 latent frames -> 12 frames. Before a decoder is timed, its
second chunk must agree with that of the first of its kind; one that does not gets no time. Writes decode.json and
decode.md.

Work of a chunk at 480x832, multiplications and additions counted apart (FlopCounterMode on the meta device; the run
counts for its own size): Wan's VAE 40.65 TFLOP, of which what is at 480x832 has 16.0, at 240x416 15.9, at 120x208 7.0,
at 60x104 1.8; TAEHV 1.58 TFLOP. At 750 TFLOP/s (what a large bf16 product reaches on an H100 or H200) the floors are
54 ms and 2.1 ms. They leave out memory: a residual block reads and writes its features 11 times if norm and activation
are one kernel; at 480x832 once is 0.9 GB, 0.2 to 0.3 ms. Over all blocks that is 13 ms. A stream's state is 1801 MiB
for the VAE, 64 MiB for TAEHV (bf16).
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import typer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastar_backend.model.decoder import STRIDE, state_bytes
from fastar_backend.model.taehv import TinyDecoder
from fastar_backend.model.wan_vae import MEAN, STD, WanDecoder, native_name

LATENTS = 3  # of a chunk
FRAMES = 12
AGREE = 0.05  # largest relative difference (root mean square) to the first decoder of a kind; bf16 rounding is 0.01
Step = Callable[[Tensor], Tensor]  # the next chunk of one stream


class Diffusers:
    """AutoencoderKLWan, its caches kept from chunk to chunk, frame by frame as its own `decode` does. Eager."""

    def __init__(self, vae: nn.Module) -> None:
        self.vae, self.first = vae, True
        vae.clear_cache()
        self.std, self.mean = (torch.tensor(values, device=vae.device)[:, None, None] for values in (STD, MEAN))

    def __call__(self, latents: Tensor) -> Tensor:
        vae, x = self.vae, (latents.float() * self.std + self.mean).to(self.vae.dtype)
        x = vae.post_quant_conv(x.transpose(0, 1)[None])
        frames = []
        for i in range(x.shape[2]):
            frames.append(
                vae.decoder(x[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=[0], first_chunk=self.first)
            )
            self.first = False
        return torch.cat(frames, 2)[0].transpose(0, 1)


class Ours:
    def __init__(self, decoder: WanDecoder | TinyDecoder, compiled: bool) -> None:
        self.decoder, self.state = decoder, decoder.state()
        self.steady = torch.compile(decoder.decode, dynamic=False) if compiled else decoder.decode

    def __call__(self, latents: Tensor) -> Tensor:
        decode = self.steady if self.state else self.decoder.decode
        pixels, self.state = decode(latents, self.state)
        return pixels


def decoders(dims: tuple[int, int], place: dict, compiled: bool) -> Iterator[tuple[str, str, Callable[[], Step]]]:
    """Kind, name, and what makes it. The Wan decoders have the same weights."""
    weights: dict[str, Tensor] = {}

    def wan(compile_it: bool) -> Step:
        decoder = WanDecoder(dims[0])
        if weights:
            decoder.load_state_dict(weights)
        else:
            weights.update(decoder.state_dict())
        return Ours(decoder.to(**place).eval(), compile_it)

    def tiny(compile_it: bool) -> Step:
        torch.manual_seed(1)
        return Ours(TinyDecoder(dims[1]).to(**place).eval(), compile_it)

    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        print(f"no diffusers baseline: {error}")
    else:
        vae = AutoencoderKLWan(base_dim=dims[0])
        inside = {k: v for k, v in vae.state_dict().items() if not k.startswith(("encoder.", "quant_conv."))}
        weights |= {native_name(name): value.clone() for name, value in inside.items()}
        yield "wan", "diffusers, eager", lambda: Diffusers(vae.to(**place).eval())
        del vae
    for compile_it in (False, True) if compiled else (False,):
        how = "compiled" if compile_it else "eager"
        yield "wan", f"Wan VAE, {how}", lambda c=compile_it: wan(c)
    for compile_it in (False, True) if compiled else (False,):
        yield "taehv", f"TAEHV, {'compiled' if compile_it else 'eager'}", lambda c=compile_it: tiny(c)


def seconds_of(act: Callable[[], object], runs: int, device: str) -> float:
    """Median; on CUDA between events, the queue kept full."""
    if device != "cuda":
        spent = []
        for _ in range(runs):
            began = time.perf_counter()
            act()
            spent.append(time.perf_counter() - began)
        return statistics.median(spent)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        act()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / 1e3


def ceiling(place: dict, size: int) -> float:
    """FLOP/s of a large matrix product."""
    a, b = (torch.randn(size, size, **place) for _ in range(2))
    for _ in range(5):
        a @ b
    return 2 * size**3 / seconds_of(lambda: a @ b, 20, place["device"])


def work_of(decoder: Callable[[], WanDecoder | TinyDecoder], height: int, width: int) -> tuple[float, int]:
    """FLOP of a steady chunk, and bytes of a stream's state in bf16."""
    with torch.device("meta"):
        meta = decoder()
        latents = torch.empty(LATENTS, 16, height, width)
        _, state = meta.decode(latents, meta.state())
        with FlopCounterMode(display=False) as counter:
            meta.decode(latents, state)
    return counter.get_total_flops(), state_bytes(meta, height, width, torch.bfloat16)


def measure(make: Callable[[], Step], chunks: list[Tensor], want: Tensor | None, runs: int, device: str):
    """A row, and the second chunk. want: what that must be."""
    step = make()
    step(chunks[0])
    began = time.perf_counter()
    second = step(chunks[1]).float()
    row: dict = {"warm_up_seconds": round(time.perf_counter() - began, 2)}
    if want is not None:
        row["difference"] = float((second - want).square().mean().sqrt() / want.square().mean().sqrt())
        if not row["difference"] < AGREE:
            return row | {"error": f"differs by {row['difference']:.3f} from the first: not timed"}, second
    for _ in range(2):
        step(chunks[1])
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    row["ms"] = 1e3 * seconds_of(lambda: step(chunks[1]), runs, device)
    row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return row, second


def table(report: dict) -> str:
    lines = [
        f"{report['device']}, torch {report['torch']}, {report['size']}, {report['dtype']}; "
        f"a large product: {report['ceiling_tflops']:.3g} TFLOP/s.",
        "",
        "| decoder | ms per 12 frames | frames/s | TFLOP/s | times floor | peak MiB | state MiB (bf16) | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error']} | | | | | | |")
            continue
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        different = f"{row['difference']:.4f}" if "difference" in row else "-"
        lines.append(
            f"| {row['name']} | {row['ms']:.2f} | {1e3 * FRAMES / row['ms']:.1f} | {row['tflops']:.3g} | "
            f"{row['times_floor']:.2f} | {peak} | {row['state_mib']:.0f} | {different} |"
        )
    return "\n".join(lines)


@torch.inference_mode()
def main(
    device: str = "cuda", height: int = 480, width: int = 832, dtype: str = "bfloat16", runs: int = 20,
    compiled: bool = True, tiny: bool = False, out: Path = Path("out/decode"),
) -> None:  # fmt: skip
    """tiny: 32x48 pixels, few channels, float32; says nothing about speed."""
    dims, product = ((8, 16), 256) if tiny else ((96, 256), 8192)
    if tiny:
        height, width, dtype, runs = 32, 48, "float32", 3
    place = {"device": device, "dtype": getattr(torch, dtype)}
    torch.backends.cudnn.benchmark = True
    out.mkdir(parents=True, exist_ok=True)
    rows, cols = height // STRIDE, width // STRIDE
    work = {
        "wan": work_of(lambda: WanDecoder(dims[0]), rows, cols),
        "taehv": work_of(lambda: TinyDecoder(dims[1]), rows, cols),
    }
    limit = ceiling(place, product)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    report: dict = {
        "device": name, "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(),
        "size": f"{height}x{width}", "dtype": dtype, "ceiling_tflops": limit / 1e12, "rows": [],
    }  # fmt: skip
    torch.manual_seed(0)
    chunks = [torch.randn(LATENTS, 16, rows, cols, **place) for _ in range(2)]
    first: dict[str, Tensor] = {}
    for kind, name, make in decoders(dims, place, compiled):
        try:
            row, second = measure(make, chunks, first.get(kind), runs, device)
            first.setdefault(kind, second)
        except RuntimeError as error:  # out of memory, a compiler's failure: the others can still be measured
            row = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.100}"}
        if "ms" in row:
            flop, state = work[kind]
            row |= {"tflops": flop / row["ms"] / 1e9, "times_floor": row["ms"] / 1e3 / (flop / limit)}
            row |= {"tflop_per_chunk": flop / 1e12, "state_mib": state / 2**20}
        report["rows"].append({"name": name, **row})
        print(report["rows"][-1], flush=True)
        (out / "decode.json").write_text(json.dumps(report, indent=1))
        torch.compiler.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    (out / "decode.md").write_text(table(report) + "\n")
    print(table(report))


if __name__ == "__main__":
    typer.run(main)
