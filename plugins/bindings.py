"""What goes into the graphs of a stream (plugins/step.py) and comes out of them: names, shapes and types, in one place
for the exporter, the engines' builder and whoever runs them."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from fastar_backend.attention.cache import CacheShape
from fastar_backend.attention.flat_cache import FlatCaches, newest
from fastar_backend.config import AttentionConfig
from fastar_backend.errors import InvalidInput
from fastar_backend.model.world_config import WorldConfig
from plugins.table import evaluate

Kind = Literal["half", "f32", "i32"]
PASSES = ("denoise", "write", "denoise_sparse", "write_sparse")
GRAPHS = (*PASSES, "begin", "update", "prompt")
MOST_TOP = 3840  # elements of TensorRT's TopK


@dataclasses.dataclass(frozen=True)
class Binding:
    """An input or output of a graph. shape: expressions over B (streams), R (rows of a cache, a multiple of 128) and,
    of `begin` and `update`, G (any number of heads of one stream). kind: half is the world's type. alias: of an
    output: the input whose memory it is; only what `copied` says is a tensor of its own, to be copied there."""

    name: str
    kind: Kind
    shape: tuple[str, ...]
    output: bool = False
    alias: str | None = None
    copied: bool = False

    def size(self, **symbols: int) -> tuple[int, ...]:
        """E.g. size(B=2, R=1024). Raises KeyError for a symbol that is missing."""
        return tuple(evaluate(dim, symbols) for dim in self.shape)

    def type(self, half: torch.dtype) -> torch.dtype:
        return {"half": half, "f32": torch.float32, "i32": torch.int32}[self.kind]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and tables that the graphs of one world and attention have in common."""

    config: WorldConfig
    attention: AttentionConfig
    shape: CacheShape
    caches: FlatCaches  # of no layers: sizes and tables only

    @property
    def rows(self) -> int:
        """R of this attention's budget."""
        return self.caches.keys.shape[1]

    @property
    def sparse(self) -> bool:
        return self.attention.kind == "fastar" and self.attention.sparse_density < 1

    @property
    def graphs(self) -> tuple[str, ...]:
        """Those that a stream of this attention runs."""
        sparse = ("denoise_sparse", "write_sparse") if self.sparse else ()
        dense = ("denoise",) if not self.sparse or self.attention.dense_steps > 0 else ()
        write = () if self.sparse else ("write",)
        return *dense, *write, *sparse, "begin", *(("update",) if self.caches.slots else ()), "prompt"


def plan(config: WorldConfig, attention: AttentionConfig, dtype: torch.dtype = torch.float32) -> Plan:
    """Raises InvalidInput for what the graphs do not know."""
    model, sampler = config.model, config.sampler
    shape = CacheShape(
        model.heads, model.head_dim, model.frame_tokens, sampler.latent_frames_per_chunk, model.rope_max_distance,
        model.rope_split, model.rope_theta, torch.device("cpu"), dtype, model.grid[1],
    )  # fmt: skip
    _check(shape, attention)
    return Plan(config, attention, shape, FlatCaches(shape, attention, 0))


def _check(shape: CacheShape, attention: AttentionConfig) -> None:
    chunk, dim = shape.chunk_frames, shape.head_dim
    if dim < 32 or dim & (dim - 1):
        raise InvalidInput("world.model.head_dim", f"got {dim}", "a power of two, at least 32")
    allowed = {"kind": ("fastar", "window"), "guard": ("off",)}
    if attention.select_text:
        allowed |= {"index": ("exact", "quantised")}
        if attention.text_mass is None:
            raise InvalidInput(
                "attention.text_mass", "got None", "a share of the mass: no graph knows AnnCA by buckets"
            )
    if attention.kind == "fastar":
        allowed |= {"weight": ("count",), "representative": ("last",), "match": ("key",)}
        allowed |= {"index": ("exact", "quantised")}
    for name, values in allowed.items():
        if (got := getattr(attention, name)) not in values:
            raise InvalidInput(f"attention.{name}", f"got {got}", f"{' or '.join(map(str, values))}")
    if attention.sink_frames % chunk:
        raise InvalidInput("attention.sink_frames", f"got {attention.sink_frames}", f"a multiple of a chunk's {chunk}")
    if (stay := newest(attention)) % chunk or stay <= 0:
        name = "recent_frames" if attention.kind == "fastar" else "budget_frames"
        raise InvalidInput(f"attention.{name}", f"{stay} newest frames stay whole", f"a multiple of a chunk's {chunk}")
    if attention.kind == "fastar" and shape.frame_tokens > MOST_TOP:
        raise InvalidInput("world.model", f"{shape.frame_tokens} tokens in a frame", f"{MOST_TOP}: TensorRT's TopK")


def bindings(plan: Plan, graph: str) -> list[Binding]:
    """Inputs, then outputs, in the graph's order. Raises InvalidInput for an unknown graph."""
    if graph not in GRAPHS:
        raise InvalidInput("graph", f"got {graph!r:.40}", ", ".join(GRAPHS))
    model, caches = plan.config.model, plan.caches
    size, dim, heads, places = plan.shape.frame_tokens, model.head_dim, model.heads, caches.places
    if graph == "prompt":
        pair = ("1", str(model.text_tokens), str(heads), str(dim))
        made = [Binding(f"{name}.{i}", "half", pair, True) for i in range(model.layers) for name in ("key", "value")]
        return [Binding("text", "half", ("1", pair[1], str(model.text_dim))), *made]
    if graph == "begin":
        keys, origin = Binding("keys", "half", ("G", "R", f"{dim}")), ("G", f"{places * size}", f"{dim}")
        return _in_place([keys, Binding("origin", "half", origin), Binding("lines", "i32", (f"{places}",))], "keys")
    if graph == "update":
        cache, new = ("G", f"{plan.rows}", f"{dim}"), ("G", f"{size}", f"{dim}")
        held = [Binding("keys", "half", cache), Binding("values", "half", cache),
                Binding("code", "i32", ("G", f"{caches.slots}", f"{dim // 4}")),
                Binding("count", "f32", cache[:2]), Binding("stay", "f32", ("G", f"{caches.slots}")),
                Binding("first", "i32", ("G",)), Binding("source", "half", new), Binding("new_value", "half", new),
                Binding("new_stay", "f32", new[1:2]),
                Binding("far", "i32", ("1",))]  # fmt: skip
        made = _in_place(held, "keys", "values", "code", "count", "stay", "first")
        made[-1] = dataclasses.replace(made[-1], copied=True)  # made by no plugin
        return [*made, Binding("gone", "f32", ("1",), True)]
    start, layer = start_bindings(plan), layer_bindings(plan, graph)
    each = {"keys", "values", "count", "first", "text_keys", "text_values", "text_count", "origin"}
    once = [binding for binding in layer if not binding.output and binding.name not in {*each, "x", "e6"}]
    every = [
        dataclasses.replace(binding, name=of_layer(binding.name, i), alias=binding.alias and f"{binding.alias}.{i}")
        for i in range(model.layers)
        for binding in layer
        if (binding.alias or binding.name) in each
    ]
    given = [binding for binding in start if not binding.output] + once
    given += [binding for binding in every if not binding.output]
    return [*given, dataclasses.replace(start[0], name="output", output=True), *(b for b in every if b.output)]


def _in_place(given: list[Binding], *names: str) -> list[Binding]:
    known = {binding.name: binding for binding in given}
    after = [dataclasses.replace(known[name], name=f"{name}.after", output=True, alias=name) for name in names]
    return [*given, *after]


def of_layer(name: str, layer: int) -> str:
    """keys.after -> keys.3.after"""
    first, *rest = name.split(".")
    return ".".join([first, str(layer), *rest])


def start_bindings(plan: Plan) -> list[Binding]:
    model, frames = plan.config.model, ("B", str(plan.shape.chunk_frames))
    latents = (*frames, str(model.latent_channels), str(model.latent_height), str(model.latent_width))
    given = [Binding("latents", "half", latents), Binding("sigma", "f32", frames)]
    if model.action_dim:
        given.append(Binding("actions", "half", (*frames, str(model.action_dim))))
    sizes = {"x": (str(model.frame_tokens), str(model.dim)), "e": (str(model.dim),), "e6": ("6", str(model.dim))}
    return [*given, *(Binding(name, "half", (*frames, *size), True) for name, size in sizes.items())]


def layer_bindings(plan: Plan, graph: str) -> list[Binding]:
    model, group = plan.config.model, f"{plan.config.model.heads}*B"
    x, e6 = (dataclasses.replace(b, output=False) for b in start_bindings(plan) if b.name in ("x", "e6"))
    cache, text = (group, "R", str(model.head_dim)), (group, str(model.text_tokens), str(model.head_dim))
    given = [x, e6, Binding("row", "i32", ("B",))]
    held = [Binding("keys", "half", cache), Binding("values", "half", cache), Binding("count", "f32", cache[:2]),
            Binding("first", "i32", (group,)), Binding("text_keys", "half", text),
            Binding("text_values", "half", text), Binding("text_count", "f32", text[:2])]  # fmt: skip
    written = ["keys", "values"]
    if graph.startswith("write"):
        given.append(Binding("origin_row", "i32", ("B",)))
        whole = (group, str(plan.caches.places * plan.shape.frame_tokens), cache[2])
        held.append(Binding("origin", "half", whole))
        written.append("origin")
    made = _in_place([*given, *held], *written)
    return [*made, dataclasses.replace(x, name="next", output=True)]
