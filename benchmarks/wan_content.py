"""What FAST-AR's content-dependent stages cost at Wan's shapes on real activations: merging and AnnSA's selection.

    python -m benchmarks.wan_content --out DIR

Random keys have no redundancy: nothing joins a group. Here the embedded world streams a while with dense attention; its
keys, values and queries are tiled to 30 layers of 12 heads of 128 dimensions and 1560 tokens a latent frame (two heads
side by side make one; a token stands at about 16 places, with a little noise, so that places differ) and go through the
same caches, beside random ones in the same run."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.wan import POLICIES, milliseconds
from fastar_backend.attention.cache import CacheShape
from fastar_backend.attention.flat_cache import FlatCaches
from fastar_backend.config import AttentionConfig, ModelConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import ChunkRequest, StreamOptions

NOISE = 0.05  # of a key's own size


class Recorded:
    """Queries, keys and values of the embedded world's newest latent frames, without temporal positions: [frames,
    layers, heads, tokens, dim]."""

    def __init__(self, chunks: int, device: str) -> None:
        engine = StreamEngine.load("doom", device, AttentionConfig(kind="dense"), dtype=torch.float32)
        engine.open(1, "a maze of metal rooms", StreamOptions(seed=4))
        seen: list[list[tuple[Tensor, ...]]] = []
        for index, block in enumerate(engine.world.dit.blocks):
            before = block.before

            def record(x: Tensor, e: Tensor, *space: Tensor, before=before, index=index) -> tuple[Tensor, ...]:
                made = before(x, e, *space)
                if index == 0:
                    seen.append([])
                seen[-1].append(tuple(part[0].clone() for part in made))
                return made

            block.before = record
        actions = ("forward", "forward+turn_left", "turn_left", "forward")
        frames = []
        for chunk in range(chunks):
            seen.clear()
            engine.step([ChunkRequest(1, (actions[chunk // 2 % len(actions)],))])
            written = torch.stack([torch.stack(layer) for layer in seen[-1]])  # [layers, 3, tokens, heads, dim]
            frames += list(written.unflatten(2, (-1, engine.shape.frame_tokens)).permute(2, 1, 0, 4, 3, 5))
        self.frames = torch.stack(frames)  # [frames, 3, layers, heads, tokens, dim]

    def tiled(self, frame: int, shape: CacheShape, layers: int) -> Tensor:
        """[3, layers, heads, tokens, dim] of one latent frame in a larger model's shape."""
        source = self.frames[frame % len(self.frames)]
        own_layers, own_heads, own_tokens = source.shape[1:4]
        x = source[:, torch.arange(layers) % own_layers]
        first = torch.arange(shape.heads) % own_heads
        x = torch.cat([x[:, :, first], x[:, :, (first + 1 + torch.arange(shape.heads) // own_heads) % own_heads]], -1)
        x = x[:, :, :, torch.arange(shape.frame_tokens) * own_tokens // shape.frame_tokens]
        noise = torch.randn(x.shape[2:], generator=torch.Generator().manual_seed(1)).to(x)  # the same in every frame
        return (x + NOISE * x.norm(dim=-1, keepdim=True) * noise / x.shape[-1] ** 0.5)[..., : shape.head_dim]


def main(out: Path = Path("out/wan_content"), chunks: int = 12,
         recorded: Annotated[int, typer.Option(help="Chunks of the embedded world.")] = 24) -> None:  # fmt: skip
    model, device = ModelConfig.wan_1_3b(), "cuda"
    real = Recorded(recorded, device)
    shape = CacheShape(
        model.heads, model.head_dim, model.frame_tokens, 3, model.rope_max_distance, model.rope_split,
        model.rope_theta, torch.device(device), torch.bfloat16,
    )  # fmt: skip
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "runs": {}}
    for name in ("random", "recorded"):
        config = POLICIES["fastar"].model_copy(update={"sparse_density": 0.28, "dense_steps": 0.0})
        caches = FlatCaches(shape, config, model.layers)
        merging, selecting = [], []
        with torch.inference_mode():
            for chunk in range(chunks):
                if name == "recorded":
                    parts = [real.tiled(3 * chunk + frame, shape, model.layers) for frame in range(3)]
                    x = torch.cat(parts, 3)
                else:
                    x = torch.randn(3, model.layers, shape.heads, shape.chunk_tokens, shape.head_dim, device=device)
                x = x.transpose(2, 3).to(torch.bfloat16)
                caches.begin(3 * chunk)
                for layer, cache in enumerate(caches):
                    cache.attend(*x[:, layer], progress=0.0, write=False)
                selecting.append(_selection_ms(caches[0], x[:, 0]))
                for layer, cache in enumerate(caches):
                    cache.attend(*x[:, layer], progress=1.0, write=True)
                merging.append(_once(caches.commit))
        stats = caches.stats()
        result["runs"][name] = {
            "merge_ms": statistics.median(merging[4:]), "select_ms_of_a_layer": statistics.median(selecting[4:]),
            "merged_tokens": stats.merged, "cached_tokens": stats.tokens, "history_tokens": chunks * shape.chunk_tokens,
            "density": stats.executed / stats.possible,
        }  # fmt: skip
        print(name, result["runs"][name], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "wan_content.json").write_text(json.dumps(result, indent=1))


def _selection_ms(cache, x: Tensor) -> float:
    """A call that selects, less one that has its selection."""

    def select() -> None:
        cache.selection = None
        cache.attend(*x, progress=0.0, write=False)

    return milliseconds(select, 3) - milliseconds(lambda: cache.attend(*x, progress=0.0, write=False), 3)


def _once(act) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    act()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


if __name__ == "__main__":
    typer.run(main)
