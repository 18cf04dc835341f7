"""Some streams in one batch, their passes run by executors of graphs, for comparison with PyTorch's own path; a world
whose heads the graphs take."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import random_world
import torch
from torch import Tensor

from fastar_backend.attention import TextCache
from fastar_backend.attention.batch import StreamsAttend, StreamsAttendText
from fastar_backend.attention.flat_cache import FlatCaches
from fastar_backend.config import AttentionConfig
from fastar_backend.model.world import World, load_world
from plugins import step

# Merging begins with the third chunk; the memory, of 40 tokens, is full two chunks later.
ATTENTION = AttentionConfig(budget_frames=6, recent_frames=4, merge_threshold=0.5, fold_threshold=0.2)
# Five key blocks, of which a stream that has begun to merge holds three: the chunk's own, and one of the other two.
SPARSE = ATTENTION.model_copy(update={"budget_frames": 24, "sparse_density": 0.3, "dense_steps": 0.4})
LAYER = ("keys", "values", "count", "first", "origin")


def make_world(folder: Path, layers: int = 2) -> World:
    """Random weights, two heads of 32, 4x5 tokens a frame in patches of 2x2: chunks of 40 tokens, 2 query blocks."""
    config = copy.deepcopy(random_world.CONFIG)
    config["model"] |= {"dim": 64, "heads": 2, "patch": [1, 2, 2], "latent_height": 8, "latent_width": 10}
    config["model"]["layers"] = layers
    return load_world(str(random_world.write(folder, config)), "cpu")


class Text(TextCache):
    """In the kernel's layout, on every device."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.use_kernel()


def text_of(world: World, prompt: str, attention: AttentionConfig) -> list[TextCache]:
    text = world.text([prompt])[0]
    return [Text(key[0], value[0], text, attention) for key, value in world.dit.prompt_keys_values(text[None])]


def bind(plan: step.Plan, caches: Sequence[FlatCaches], texts: Sequence[Sequence[TextCache]], latents: Tensor,
         sigma: float, actions: Tensor) -> dict[str, Tensor]:  # fmt: skip
    """What a pass takes and writes, all streams in one tensor."""
    rows = torch.tensor([one.own_rows.start for one in caches], dtype=torch.int32)
    bound = {"latents": latents, "sigma": torch.full(latents.shape[:2], sigma), "actions": actions, "row": rows}
    bound |= {"origin_row": rows - caches[0].slots, "output": torch.full_like(latents, torch.nan)}
    for i in range(len(caches[0])):
        heads = slice(i * plan.shape.heads, (i + 1) * plan.shape.heads)
        bound |= {f"{name}.{i}": torch.cat([getattr(one, name)[heads] for one in caches]) for name in LAYER}
        for at, name in enumerate(("keys", "values", "count")):
            bound[f"text_{name}.{i}"] = torch.cat([text[i].tensors[at] for text in texts])
    return bound


def run_pass(executors: Mapping[str, Any], plan: step.Plan, graph: str, caches: Sequence[FlatCaches],
             texts: Sequence[Sequence[TextCache]], latents: Tensor, sigma: float, actions: Tensor,
             ) -> Tensor:  # fmt: skip
    bound = bind(plan, caches, texts, latents, sigma, actions)
    executors[graph].run(bound)
    for i in range(len(caches[0])):
        heads = slice(i * plan.shape.heads, (i + 1) * plan.shape.heads)
        for name in LAYER:
            for one, value in zip(caches, bound[f"{name}.{i}"].chunk(len(caches)), strict=True):
                getattr(one, name)[heads] = value
    return bound["output"]


def begin(executors: Mapping[str, Any], caches: FlatCaches, start: int) -> None:
    caches.prepare(start)
    executors["begin"].run({"keys": caches.keys, "origin": caches.origin, "lines": caches.lines})
    caches.count[:, caches.slots : caches.stop] = 1


def merge(executors: Mapping[str, Any], caches: FlatCaches) -> None:
    """`FlatCaches.merge`, all heads together."""
    if not caches.drives_out:
        return
    size = caches.shape.frame_tokens
    for due, place in zip(caches.leaving, caches.next_places, strict=True):
        there = slice(place * size, (place + 1) * size)
        rows = slice(caches.slots + there.start, caches.slots + there.stop)
        bound = {name: getattr(caches, name) for name in ("keys", "values", "count", "stay", "first")}
        bound |= {"code": caches.code.view(torch.int32), "far": caches.far[place : place + 1], "gone": torch.zeros(1)}
        bound |= {"source": caches.origin[:, there].contiguous(), "new_value": caches.values[:, rows].contiguous()}
        executors["update"].run(bound | {"new_stay": due})
        caches.merged += bound["gone"][0] / len(caches.keys)
    caches.stay -= caches.shape.chunk_frames


@torch.inference_mode()
def by_kernels(world: World, plan: step.Plan, caches: Sequence[FlatCaches], texts: Sequence[Sequence[TextCache]],
               latents: Tensor, sigma: float, actions: Tensor, progress: float, write: bool) -> Tensor:  # fmt: skip
    """The same pass on PyTorch's path, by kernels."""
    layers, none = range(len(caches[0])), [None] * len(caches)
    attend = [
        StreamsAttend(plan.shape, [one[i] for one in caches], none, progress=progress, write=write) for i in layers
    ]
    cross = [StreamsAttendText([text[i] for text in texts]) for i in layers]
    return world.dit(latents, torch.full(latents.shape[:2], sigma), actions, attend, cross)
