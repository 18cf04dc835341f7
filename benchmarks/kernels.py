"""The GPU kernels at Wan2.1-1.3B's shapes (480x832): first compared with float32, then timed beside cuDNN.

`python -m benchmarks.kernels --out DIR` on a GPU of compute capability 9.0 or newer. No speed is reported for a kernel
that is wrong. Rates count 4 * queries * keys * 128 operations a head (attention), on executed blocks only."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastar_backend.kernels import ops

HEADS, DIM, FRAME, CHUNK = 12, 128, 1560, 3
QUERIES = FRAME * CHUNK
LAYERS = 30
TILES = [ops.Tiles(m, n, w, s) for m, n, w, s in (
    (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3),
)]  # fmt: skip
SPARSE_TILES = [ops.Tiles(m, ops.KEY_BLOCK, w, s) for m, w, s in ((128, 8, 2), (128, 8, 3), (64, 4, 2))]


def milliseconds(act: Callable[[], Any], repeats: int = 20) -> float:
    """Median by events, after a warm-up."""
    for _ in range(3):
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


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """[queries, heads, dim] in float32, head by head."""
    out = []
    for head in range(key.shape[0]):
        logits = query[:, head].float() @ key[head].float().T * DIM**-0.5
        out.append((logits if mask is None else logits + mask[head]).softmax(-1) @ value[head].float())
    return torch.stack(out, 1)


def check(name: str, out: Tensor, reference: Tensor, limit: float = 1e-2) -> float:
    error = ((out.float() - reference.float()).norm() / reference.float().norm()).item()
    if not error < limit:
        raise SystemExit(f"{name} is wrong: relative error {error:.2e}, allowed {limit:.0e}; no figures")
    return error


def attention(frames: int) -> dict[str, Any]:
    """frames: latent frames of keys, of which all but the chunk's are memory with counts."""
    stop, memory = frames * FRAME, (frames - CHUNK) * FRAME
    query, key, value = random(QUERIES, HEADS, DIM), random(HEADS, stop, DIM), random(HEADS, stop, DIM)
    count = torch.randint(1, 50, (HEADS, stop), device="cuda").float()
    first = torch.zeros(HEADS, dtype=torch.int32, device="cuda")
    work = 4 * HEADS * QUERIES * stop * DIM
    row: dict[str, Any] = {"frames": frames}
    columns = torch.arange(stop, device="cuda")
    mask = torch.where(columns < memory, count.log(), 0.0)
    mean = value / torch.where(columns < memory, count, 1.0)[..., None]
    if frames <= 21:
        row["error"] = check("attend", ops.attend(query, key, value, count, first, memory, stop),
                             plain(query, key, mean, mask[:, None]))  # fmt: skip
    heads_first = query.transpose(0, 1)[None]
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            row[name] = milliseconds(lambda: F.scaled_dot_product_attention(heads_first, key[None], value[None]))
        row[f"{name}_tflops"] = work / row[name] / 1e9
    best = {}
    for tile in TILES:
        try:
            best[str(tile)] = milliseconds(
                lambda t=tile: ops.attend(query, key, value, count, first, memory, stop, tile=t)
            )
        except Exception as failure:  # too much shared memory
            best[str(tile)] = float("inf")
            print(tile, type(failure).__name__)
    row["tiles"] = best
    row["ours"] = milliseconds(lambda: ops.attend(query, key, value, count, first, memory, stop))
    row["ours_tflops"] = work / row["ours"] / 1e9
    return row


def sparse(frames: int, density: float) -> dict[str, Any]:
    """Block-sparse over a compact index, at `density` of the key blocks."""
    stop = frames * FRAME
    key_blocks = -(-stop // ops.KEY_BLOCK)
    rows = key_blocks * ops.KEY_BLOCK
    query, key, value = random(QUERIES, HEADS, DIM), random(HEADS, rows, DIM), random(HEADS, rows, DIM)
    members = torch.ones(HEADS, rows, device="cuda")
    for tensor in (key, value, members):
        tensor[:, stop:] = 0.0
    order = torch.rand(HEADS, QUERIES, device="cuda").argsort(-1)
    zero = torch.zeros(HEADS, dtype=torch.int32, device="cuda")
    chosen = max(1, round(density * key_blocks))
    work = 4 * HEADS * QUERIES * chosen * ops.KEY_BLOCK * DIM
    row: dict[str, Any] = {"frames": frames, "density": density, "tiles": {}}
    for tile in SPARSE_TILES:
        query_blocks = -(-QUERIES // tile.queries)
        blocks = torch.rand(HEADS, query_blocks, key_blocks, device="cuda").topk(chosen, -1).indices
        selection = order, torch.full((HEADS, query_blocks), chosen, dtype=torch.int32, device="cuda"), blocks.int()

        def act(selection: Any = selection, tile: ops.Tiles = tile) -> Tensor:
            return ops.attend(query, key, value, members, zero, 0, stop, selection=selection, tile=tile)

        allowed = torch.zeros(HEADS, query_blocks, key_blocks, dtype=torch.bool, device="cuda").scatter_(
            2, blocks, True
        )
        allowed = allowed.repeat_interleave(ops.KEY_BLOCK, 2)[..., :stop].repeat_interleave(tile.queries, 1)
        mask = torch.full((HEADS, QUERIES, stop), -torch.inf, device="cuda")
        mask.scatter_(1, order[..., None].expand_as(mask), torch.where(allowed[:, :QUERIES], 0.0, -torch.inf))
        row["error"] = check("sparse attend", act(), plain(query, key[:, :stop], value[:, :stop], mask))
        del allowed, mask
        time = milliseconds(act)
        row["tiles"][str(tile)] = {"ms": time, "tflops": work / time / 1e9}
    return row


def upkeep(budget: int) -> dict[str, Any]:
    """One leaving latent frame of one stream: ANN top-1 and merging, all layers at once."""
    heads, slots = LAYERS * HEADS, budget * FRAME
    code, probe = ops.quantise(random(heads, slots, DIM)), ops.quantise(random(heads, FRAME, DIM))
    first = torch.zeros(heads, dtype=torch.int32, device="cuda")
    similarity, match = ops.nearest(probe, code, first)
    head = heads // 2
    exact = probe[head].float() @ code[head].float().T / 16129
    check("nearest", similarity[head], exact.max(-1).values, 1e-3)
    row: dict[str, Any] = {"budget": budget}
    row["nearest"] = milliseconds(lambda: ops.nearest(probe, code, first), 5)
    row["nearest_tops"] = 2 * heads * FRAME * slots * DIM / row["nearest"] / 1e9
    ones = torch.ones(heads, slots, device="cuda")
    new = ops.Groups(random(heads, FRAME, DIM), random(heads, FRAME, DIM), probe, ones[:, :FRAME].contiguous(),
                     torch.rand(heads, FRAME, device="cuda"))  # fmt: skip
    held = ops.Groups(random(heads, slots, DIM), random(heads, slots, DIM), code, ones, torch.rand_like(ones))
    row["merge"] = milliseconds(lambda: ops.merge(held, match, new, True), 5)
    slot = torch.rand(heads, slots, device="cuda").argsort(-1)[:, :FRAME].contiguous()
    order = torch.rand(heads, FRAME, device="cuda").argsort(-1)
    replace = torch.rand(heads, FRAME, device="cuda") < 0.5
    row["place"] = milliseconds(lambda: ops.place(held, slot, order, replace, new), 5)
    price = torch.rand(heads, slots, device="cuda")
    row["cheapest_slots"] = milliseconds(lambda: price.topk(FRAME, largest=False), 5)
    row["sort_tokens"] = milliseconds(lambda: price[:, :FRAME].sort(-1), 5)
    return row


def turning() -> dict[str, Any]:
    """The time rotation of nine ring frames of every layer (once a chunk), and of one chunk of one layer."""
    span = 24
    angles = torch.randn(2 * span + 1, 22, device="cuda")
    source = random(LAYERS * HEADS, 9 * FRAME, DIM)
    out = torch.empty_like(source)
    turns = torch.randint(0, 2 * span, (9,), dtype=torch.int32, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    time = milliseconds(lambda: ops.turn(source.transpose(0, 1), turns, cos, sin, FRAME, out.transpose(0, 1)), 5)
    return {"ring": time, "ring_tb_s": 2 * source.nbytes / time / 1e9}


def main(out: Path = Path("out/kernels")) -> None:
    torch.manual_seed(0)
    a, b = random(8192, 8192), random(8192, 8192)
    matmul = 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9
    bytes_ = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    copy = 2 * bytes_.nbytes / milliseconds(bytes_.clone) / 1e9
    del bytes_
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "matmul_tflops": matmul, "copy_tb_s": copy,
        "attention": [attention(frames) for frames in (3, 9, 21, 63)],
        "sparse": [sparse(21, 0.16), sparse(63, 0.16), sparse(21, 0.5)],
        "upkeep": upkeep(6), "turn": turning(),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
