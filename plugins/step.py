"""The graphs of a stream as modules over a world's transformer and the operators of domain `fastar`: what is exported
to ONNX and built into TensorRT engines. `bindings` names every input and output of a graph.

A chunk is: `begin` (the whole frames' keys turned into the chunk's frame of reference), passes of `denoise`, one of
`write`, then `update` for each frame that leaves the ring; the laws are those of `attention/flat_cache`, whose tensors
are bound. `denoise_sparse` and `write_sparse` are the passes with AnnSA, which select anew in every pass (FlatLayer
selects once a chunk). `prompt` makes a prompt's keys and values; equal tokens are folded by the host (TextCache).

Differences from PyTorch's path, none beyond rounding: the timestep's embedding is computed in float32 (TensorRT has no
float64), and the patch embedding is a product of matrices."""

from __future__ import annotations

import abc
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar_backend.attention.ann import planes
from fastar_backend.attention.cache import by_place
from fastar_backend.attention.temp_cache import FREE
from fastar_backend.errors import InvalidInput
from fastar_backend.model.dit import Block, CausalDiT
from plugins import ops  # registers the operators
from plugins.bindings import GRAPHS, PASSES, Binding, Plan, bindings, layer_bindings, of_layer, plan, start_bindings

assert ops
__all__ = ["GRAPHS", "PASSES", "Binding", "Graph", "Part", "Plan", "bindings", "make", "plan"]


class Graph(nn.Module, abc.ABC):
    """Takes its inputs in the order of its bindings and returns its outputs likewise, all new tensors. kind: graphs of
    one kind and plan differ in their weights only."""

    def __init__(self, plan: Plan, kind: str, own: list[Binding]) -> None:
        super().__init__()
        self.plan, self.kind = plan, kind
        self.inputs = [binding for binding in own if not binding.output]
        self.outputs = [binding for binding in own if binding.output]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        made = self.run({binding.name: tensor for binding, tensor in zip(self.inputs, tensors, strict=True)})
        return tuple(made[binding.name] for binding in self.outputs)

    @abc.abstractmethod
    def run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by name -> outputs by name."""

    def parts(self) -> list[Part]:
        """What the graph consists of, in order."""
        return [Part("", self, {})]


class Part(NamedTuple):
    """name: in the whole. names: of the part's inputs and outputs in the whole, where they differ."""

    name: str
    graph: Graph
    names: dict[str, str]


class Pass(Graph):
    """One pass of the transformer over a chunk of B streams: layers of one kind, one after the other."""

    def __init__(self, plan: Plan, name: str, dit: CausalDiT) -> None:
        super().__init__(plan, name, bindings(plan, name))
        if name.endswith("sparse") and not plan.sparse:
            raise InvalidInput("attention.sparse_density", f"got {plan.attention.sparse_density}", "less than 1: AnnSA")
        tables = _tables(plan, dit)
        self.start, self.finish = Start(plan, dit), Finish(plan, dit)
        self.layers = nn.ModuleList(Layer(plan, name, block, tables) for block in dit.blocks)

    def parts(self) -> list[Part]:
        known = {binding.name for binding in (*self.inputs, *self.outputs)}
        parts = [Part("start", self.start, {"x": "x.0"})]
        for i, layer in enumerate(self.layers):
            names = {b.name: name for b in (*layer.inputs, *layer.outputs) if (name := of_layer(b.name, i)) in known}
            parts.append(Part(f"layer.{i}", layer, names | {"x": f"x.{i}", "next": f"x.{i + 1}"}))
        return [*parts, Part("finish", self.finish, {"x": f"x.{len(self.layers)}"})]

    def run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        values = dict(given)
        for _, graph, names in self.parts():
            made = graph(*(values[names.get(binding.name, binding.name)] for binding in graph.inputs))
            values |= {names.get(b.name, b.name): tensor for b, tensor in zip(graph.outputs, made, strict=True)}
        return values


class Start(Graph):
    """Patches x [B, F, tokens, dim], and the embedding e of noise level and actions, also as each block takes it."""

    def __init__(self, plan: Plan, dit: CausalDiT) -> None:
        super().__init__(plan, "start", start_bindings(plan))
        self.patch_embedding, self.time_embedding = dit.patch_embedding, dit.time_embedding
        self.time_projection = dit.time_projection
        self.action_embedding = dit.action_embedding if plan.config.model.action_dim else None
        half = plan.config.model.freq_dim // 2
        rates = 1000 * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("rates", rates.float(), persistent=False)

    def run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        latents, (_, rows, columns) = given["latents"], self.plan.config.model.patch
        x = latents.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).permute(0, 1, 3, 5, 2, 4, 6)
        x = F.linear(x.flatten(4).flatten(2, 3), self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        angles = given["sigma"][..., None] * self.rates
        e = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        if self.action_embedding is not None:
            e = e + self.action_embedding(given["actions"])
        return {"x": x, "e": e, "e6": self.time_projection(e).unflatten(-1, (6, -1))}


class Finish(Graph):
    """The model's output from the last block's."""

    def __init__(self, plan: Plan, dit: CausalDiT) -> None:
        latents, *_, x, e, _ = start_bindings(plan)
        given = [dataclasses.replace(binding, output=False) for binding in (x, e)]
        super().__init__(plan, "finish", [*given, dataclasses.replace(latents, name="output", output=True)])
        self.head = dit.head

    def run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        model = self.plan.config.model
        x = self.head(given["x"], given["e"]).unflatten(-1, (*model.patch[1:], -1)).unflatten(2, model.grid)
        return {"output": x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)}


def _tables(plan: Plan, dit: CausalDiT) -> dict[str, Tensor]:
    """Constants of all layers, which share them."""
    shape, attention, wide = plan.shape, plan.attention, torch.promote_types(plan.shape.dtype, torch.float32)
    return {
        "cos": plan.caches.cos, "sin": plan.caches.sin, "in_chunk": plan.caches.in_chunk,
        "space_cos": dit.space_cos.to(wide), "space_sin": dit.space_sin.to(wide),
        "order": by_place(shape).int(), "planes": planes(shape.head_dim, 1, attention.index_bits, shape.device),
    }  # fmt: skip


class Layer(Graph):
    """One block, its attentions by operators (`SelfAttend` and `CrossAttend` of model/dit.py)."""

    def __init__(self, plan: Plan, name: str, block: Block, tables: dict[str, Tensor]) -> None:
        super().__init__(plan, f"layer of {name}", layer_bindings(plan, name))
        self.write, self.sparse = name.startswith("write"), name.endswith("sparse")
        self.block = block
        for key, table in tables.items():
            self.register_buffer(key, table, persistent=False)

    def run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        space, streams = (self.space_cos, self.space_sin), given["x"].shape[0]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return _streams(self.attend(_grouped(query), _grouped(key), _grouped(value), given, made), streams)

        def cross(query: Tensor) -> Tensor:
            return _streams(self.cross(_grouped(query), given), streams)

        return made | {"next": self.block(given["x"], given["e6"], space, attend, cross)}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Tensor],
               made: dict[str, Tensor]) -> Tensor:  # fmt: skip
        """`FlatLayer.attend`. All [N, G, D], contiguous. Adds to `made` what it changes."""
        fastar, row, turn = torch.ops.fastar, given["row"], (self.in_chunk, self.cos, self.sin)
        query, key = fastar.turn(query, *turn), fastar.turn(key, *turn)
        keys = made["keys.after"] = fastar.append(given["keys"], key, row)
        values = made["values.after"] = fastar.append(given["values"], value, row)
        cache = keys, values, given["count"], given["first"]
        if self.write:
            made["origin.after"] = fastar.append(given["origin"], key, given["origin_row"])
        return self.attend_sparse(query, *cache[:3], row) if self.sparse else fastar.attend(query, *cache)

    def cross(self, query: Tensor, given: dict[str, Tensor]) -> Tensor:
        """`TextCache.attend`, also where AnnCA chooses by mass."""
        fastar, config = torch.ops.fastar, self.plan.attention
        keys, values, count = (given[f"text_{name}"] for name in ("keys", "values", "count"))
        if config.select_text:
            mass = fastar.text_mass(query, keys, count, quantised=config.index == "quantised")
            keys, values, count = fastar.condense_text(mass, keys, values, count, share=config.text_mass)
        first = torch.zeros_like(given["first"])  # what has no token counts for nothing
        return fastar.attend(query, keys, values, count, first)

    def attend_sparse(self, query: Tensor, keys: Tensor, values: Tensor, count: Tensor, row: Tensor) -> Tensor:
        fastar, config = torch.ops.fastar, self.plan.attention
        if config.sparse_order == "bucket":
            order = fastar.arrange(fastar.signatures(query, self.planes))
        else:
            order = self.order.expand(keys.shape[0], -1).contiguous()
        near = fastar.near_blocks(fastar.block_means(query, order), keys, count)
        own = self.plan.shape.chunk_tokens
        counts, blocks = fastar.choose_blocks(near, row, own=own, density=config.sparse_density)
        return fastar.attend_sparse(query, keys, values, count, order, counts, blocks)


def _grouped(x: Tensor) -> Tensor:
    """[B, N, heads, D] -> [N, B * heads, D], contiguous."""
    return x.transpose(0, 1).flatten(1, 2).contiguous()


def _streams(x: Tensor, streams: int) -> Tensor:
    """The way back."""
    return x.unflatten(1, (streams, -1)).transpose(0, 1)


class Begin(Graph):
    """`FlatCaches.turn_history` of all places: those without a frame have keys of zeros, and stay so. That the filled
    rows' count is 1 is the host's to write, once a place."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, "begin", bindings(plan, "begin"))
        for name in ("cos", "sin"):
            self.register_buffer(name, getattr(plan.caches, name), persistent=False)

    def run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        turn = given["lines"], self.cos, self.sin
        slots = self.plan.caches.slots
        return {"keys.after": torch.ops.fastar.turn_into(given["keys"], given["origin"], *turn, row=slots)}


class Update(Graph):
    """`FlatCaches._merge`: the frame of one place goes into the memory. `source`, `new_value`: what origin and
    values have in the place's rows; `far`: its line of the table of turns; `new_stay`: as in `TempCache`. `gone`:
    tokens that went into a group, all heads together."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, "update", bindings(plan, "update"))
        for name in ("cos", "sin"):
            self.register_buffer(name, getattr(plan.caches, name), persistent=False)
        if not (slots := plan.caches.slots):
            raise InvalidInput("graph", "got update, and this attention keeps no groups", "fastar attention's")
        self.register_buffer("backwards", FREE * (1 + torch.arange(slots) / slots), persistent=False)

    def run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        fastar, config = torch.ops.fastar, self.plan.attention
        size, slots = self.plan.shape.frame_tokens, self.plan.caches.slots
        held = tuple(given[name] for name in ("keys", "values", "code", "count", "stay"))
        code_before, count = given["code"], given["count"][:, :slots]
        stay, value = given["new_stay"], given["new_value"]
        turned = fastar.turn(given["source"].transpose(0, 1).contiguous(), given["far"], self.cos, self.sin)
        key = turned.transpose(0, 1).contiguous()
        code = fastar.quantise(key)
        new = value, key, code
        similarity, match = fastar.nearest(code, code_before, given["first"])
        joins = similarity > config.merge_threshold
        if not config.merge_early:
            joins = joins & (given["first"] < size)[:, None]
        worth, newcomer = torch.where(joins, 3 * FREE, stay).topk(size)
        full = count > 0
        # Tokens that join no group mark a column of their own: TensorRT's scatter only replaces.
        marked = torch.zeros_like(torch.cat([count, count[:, :1]], 1))
        at = torch.where(joins, match, slots).long()
        joined = marked.scatter(1, at, torch.ones_like(similarity))[:, :slots] > 0
        price = torch.where(joined, torch.inf, torch.where(full, given["stay"], self.backwards))
        cost, slot = price.topk(size, largest=False)
        replace = worth > cost  # whoever joins no group takes a free slot
        evicts = replace & full.gather(1, slot)
        lost = evicts | ~(replace | joins.gather(1, newcomer))
        *held, loser_value, loser_code, loser_count = fastar.place(
            slot.int(), newcomer.int(), replace.int(), *new, stay, *held
        )
        held = self.merge(torch.where(joins, match, slots), new, torch.ones_like(similarity), stay, held, renew=True)
        first = (slots - (held[3][:, :slots] > 0).float().sum(-1)).int()
        gone = joins.float().sum()
        if config.fold_threshold < 1:
            similarity, target = fastar.nearest(loser_code, held[2], first)
            lost = lost & (target >= 0) & (similarity > config.fold_threshold)
            losers = loser_value, key, loser_code  # their keys are not looked at
            held = self.merge(torch.where(lost, target, slots), losers, loser_count, stay, held, renew=False)
            gone = gone + lost.float().sum()
        names = ("keys", "values", "code", "count", "stay", "first")
        made = zip((f"{name}.after" for name in names), (*held, first), strict=True)
        return dict(made) | {"gone": gone[None]}

    @staticmethod
    def merge(target: Tensor, new: tuple[Tensor, Tensor, Tensor], count: Tensor, stay: Tensor,
              held: list[Tensor], renew: bool) -> list[Tensor]:  # fmt: skip
        order = torch.ops.fastar.arrange(target)
        ascending = target.gather(1, order.long())
        return list(torch.ops.fastar.merge(ascending, order, *new, count, stay, *held, renew=renew))


class Prompt(Graph):
    """`CausalDiT.prompt_keys_values`."""

    def __init__(self, plan: Plan, dit: CausalDiT) -> None:
        super().__init__(plan, "prompt", bindings(plan, "prompt"))
        self.text_embedding = dit.text_embedding
        self.layers = nn.ModuleList(block.cross_attn for block in dit.blocks)

    def run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        embedded = self.text_embedding(given["text"])
        pairs = [layer.key_value(embedded) for layer in self.layers]
        return {
            f"{name}.{i}": x for i, pair in enumerate(pairs) for name, x in zip(("key", "value"), pair, strict=True)
        }


def make(plan: Plan, dit: CausalDiT, graph: str) -> Graph:
    """A graph over the transformer's own weights. Raises InvalidInput."""
    if graph not in GRAPHS:
        raise InvalidInput("graph", f"got {graph!r:.40}", ", ".join(GRAPHS))
    if graph in PASSES:
        return Pass(plan, graph, dit).eval().requires_grad_(False)
    made = Begin(plan) if graph == "begin" else Update(plan) if graph == "update" else Prompt(plan, dit)
    return made.eval().requires_grad_(False)
