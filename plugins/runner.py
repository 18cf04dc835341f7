"""Streams whose passes TensorRT computes: `fastar_backend.engine.runtime.Runtime` over the graphs of plugins/step.py.

A stream's caches and prompt are the tensors that PyTorch's own kernels use (`FlatCaches`, `TextCache`); the graphs read
and write them where they are. What is left to the host is its books, and the prompt's keys and values, once a prompt.
Who runs a graph is an `Executor`: TensorRT on a GPU; in tests, an evaluator on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastar_backend.attention import CacheShape, TextCache
from fastar_backend.attention.flat_cache import FlatCaches
from fastar_backend.config import AttentionConfig
from fastar_backend.errors import FastarError, InvalidInput
from fastar_backend.kernels.ops import KEY_BLOCK
from fastar_backend.model.world import World
from plugins import engines, ops, step
from plugins.table import OPERATORS

if TYPE_CHECKING:
    from fastar_backend.engine.stream import Stream

assert ops  # registers the operators: `choose_blocks` counts what a sparse pass attends to


class Executor(Protocol):
    """One graph, ready to run."""

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        """tensors: all inputs, and the outputs that are not an input's alias, by name. Inputs that have an alias are
        changed in place. Work on a GPU is only queued, on PyTorch's current stream."""


class EngineCaches(FlatCaches):
    """A stream's caches, turned and merged by the graphs `begin` and `update`."""

    def __init__(self, runtime: EngineRuntime, attention: AttentionConfig) -> None:
        super().__init__(runtime.shape, attention, runtime.plan.config.model.layers)
        self.runtime = runtime
        device, size = runtime.shape.device, runtime.shape.frame_tokens
        places = range(0, self.places, runtime.shape.chunk_frames)
        # [1] int32 each, by the chunk's first place: never written to, so that forks and recordings may share them.
        whole = {"dtype": torch.int32, "device": device}
        self.origin_rows = {place: torch.tensor([place * size], **whole) for place in places}
        self.rows = {place: torch.tensor([self.slots + place * size], **whole) for place in places}

    def turn_history(self) -> None:
        if self.times:
            self.runtime.run("begin", {"keys": self.keys, "origin": self.origin, "lines": self.lines})
        self.count[:, self.slots : self.stop] = 1.0
        self._reset()

    def _merge(self, heads: slice, place: int, due: Tensor) -> None:
        size = self.shape.frame_tokens
        there, rows = (slice(start, start + size) for start in (place * size, self.slots + place * size))
        gone = torch.zeros(1, device=self.shape.device)
        held = {name: getattr(self, name)[heads] for name in ("keys", "values", "count", "stay", "first")}
        new = {"source": self.origin[heads, there], "new_value": self.values[heads, rows]}
        new["new_stay"] = due
        words = self.code[heads].view(torch.int32)
        new = {name: value.contiguous() for name, value in new.items()}
        self.runtime.run("update", held | new | {"code": words, "far": self.far[place : place + 1], "gone": gone})
        self.merged += gone[0] / len(self.keys)

    def layer(self, index: int) -> dict[str, Tensor]:
        """A pass's inputs from one layer's part."""
        heads = slice(index * self.shape.heads, (index + 1) * self.shape.heads)
        names = ("keys", "values", "count", "first", "origin")
        return {f"{name}.{index}": getattr(self, name)[heads] for name in names}

    def passed(self, sparse: bool) -> None:
        """Books of one pass of all layers."""
        work = self.work
        work.seen = self.stop
        if sparse:
            work.sparse_calls += len(self)
            work.sparse_pairs += self._pairs()
        else:
            work.dense_calls += len(self)

    def _pairs(self) -> Tensor:
        """Query-key pairs of a sparse pass, all layers: how many key blocks are chosen follows from how many are held,
        whichever they are."""
        chunk, wide = self.shape.chunk_tokens, self.keys.dtype == torch.float32
        held = (self.count > 0).unflatten(1, (-1, KEY_BLOCK)).any(-1)
        near = torch.zeros(held.shape, device=held.device).masked_fill(~held, -torch.inf)[:, None]
        density = self.config.sparse_density
        counts, _ = torch.ops.fastar.choose_blocks(near, self.rows[self.own], own=chunk, density=density)
        queries = OPERATORS["attend_sparse"].tiles(wide)["BLOCK_M"]
        return counts.sum() * (-(-chunk // queries) * queries * KEY_BLOCK / self.shape.heads)


def plan_for(world: World, attention: AttentionConfig, dtype: torch.dtype) -> step.Plan:
    """Of a stream that can be run here. Raises InvalidInput for what the graphs, or their statistics, do not know."""
    if attention.select_text:  # how many tokens it keeps stays within the graph
        raise InvalidInput("attention.select_text", "got True", "False where TensorRT runs the stream")
    return step.plan(world.config, attention, dtype)


class EngineRuntime:
    """Streams are run one by one: the caches of each lie where they lie."""

    def __init__(self, world: World, shape: CacheShape, attention: AttentionConfig, executors: Mapping[str, Executor]
                 ) -> None:  # fmt: skip
        """executors: of all `step.Plan.graphs` but the prompt's. Raises InvalidInput."""
        self.shape, self.attention = shape, attention
        self.plan = plan_for(world, attention, shape.dtype)
        missing = [graph for graph in self.plan.graphs if graph not in executors and graph != "prompt"]
        if missing:
            raise InvalidInput("engine_dir", f"has no {', '.join(missing)}", "an engine of `fastar engine build`")
        self.executors = executors
        self.wanted = {
            graph: [binding.name for binding in step.bindings(self.plan, graph) if not binding.alias]
            for graph in self.plan.graphs
        }

    def check(self, attention: AttentionConfig, field: str) -> None:
        for name in AttentionConfig.model_fields:
            got, built = getattr(attention, name), getattr(self.attention, name)
            if got != built:
                raise InvalidInput(f"{field}.{name}", f"got {got}", f"{built}, for which the engine was built")

    def caches(self, attention: AttentionConfig, portable: bool) -> EngineCaches:
        self.check(attention, "attention")
        if portable:
            raise InvalidInput("OPTIONS.measure_recall", "got true", "false where runtime is tensorrt")
        return EngineCaches(self, attention)

    def text(self, key: Tensor, value: Tensor, text: Tensor, attention: AttentionConfig) -> TextCache:
        cache = TextCache(key, value, text, attention)
        if cache.groups is None:
            if cache.bias is None:  # nothing is folded: each token is a group of one
                cache.bias = torch.zeros(len(key), device=key.device)
                cache.always = torch.zeros(len(key), dtype=torch.bool, device=key.device)
            cache.use_kernel()
        return cache

    def forward(self, streams: list[Stream], x: Tensor, sigma: float, actions: Tensor, *, progress: float,
                write: bool) -> Tensor:  # fmt: skip
        x, out = x.contiguous(), torch.empty_like(x)
        level = torch.full((1, x.shape[1]), sigma, device=x.device)
        sparse = self.plan.sparse and progress >= self.attention.dense_steps
        graph = ("write" if write else "denoise") + ("_sparse" if sparse else "")
        for row, stream in enumerate(streams):
            own, caches = slice(row, row + 1), stream.caches
            tensors = {"latents": x[own], "sigma": level, "row": caches.rows[caches.own], "output": out[own]}
            tensors["actions"] = actions[own].contiguous()
            tensors["origin_row"] = caches.origin_rows[caches.own]
            for index, text in enumerate(stream.text):
                tensors |= caches.layer(index)
                tensors[f"text_keys.{index}"], tensors[f"text_values.{index}"] = text.keys, text.values
                tensors[f"text_count.{index}"] = text.groups[0]
            self.run(graph, tensors)
            caches.passed(sparse)
        return out

    def run(self, graph: str, tensors: dict[str, Tensor]) -> None:
        """Hands on what the graph takes. tensors: more may be in it."""
        self.executors[graph].run({name: tensors[name] for name in self.wanted[graph]})


class TensorRTExecutor:
    """One engine. An execution context for each set of input shapes: a context's memory and, in a recording, its
    addresses stay."""

    def __init__(self, engine: Any, bindings: list[step.Binding], name: str) -> None:
        """engine: an ICudaEngine."""
        self.engine, self.bindings, self.name = engine, bindings, name
        self.contexts: dict[tuple, Any] = {}

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        given = [binding for binding in self.bindings if not binding.output]
        for name, tensor in tensors.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{self.name}: {name} is not contiguous")
        shapes = tuple(tuple(tensors[binding.name].shape) for binding in given)
        context = self._context(shapes, [binding.name for binding in given])
        copies = []
        for binding in self.bindings:
            if binding.copied:
                tensor = torch.empty_like(tensors[binding.alias])
                copies.append((tensors[binding.alias], tensor))
            else:
                tensor = tensors[binding.alias or binding.name]
            if not context.set_tensor_address(binding.name, tensor.data_ptr()):
                raise FastarError(f"tensorrt: {self.name} has no tensor {binding.name}; allowed: its own engine")
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise FastarError(f"tensorrt: {self.name} was not run; allowed: see the log of TensorRT")
        for target, made in copies:
            target.copy_(made)

    def _context(self, shapes: tuple, names: list[str]) -> Any:
        if shapes not in self.contexts:
            context = self.engine.create_execution_context()
            if context is None:
                raise FastarError(f"tensorrt: no context for {self.name}; allowed: more free memory of the GPU")
            for name, shape in zip(names, shapes, strict=True):
                if not context.set_input_shape(name, shape):
                    low, _, high = self.engine.get_tensor_profile_shape(name, 0)
                    raise FastarError(
                        f"tensorrt: {self.name}.{name} has shape {list(shape)}; allowed: {list(low)} to {list(high)}"
                    )
            self.contexts[shapes] = context
        return self.contexts[shapes]


def engine_dtype(folder: Path) -> torch.dtype:
    """Raises InvalidInput where TensorRT is missing or `folder` has no engine."""
    engines.tensorrt("runtime")
    precision = engines.read(folder).precision
    return next(dtype for dtype, name in engines.TYPES.items() if name == precision)


def load(world: World, shape: CacheShape, attention: AttentionConfig, folder: Path) -> EngineRuntime:
    """The engine in `folder`. world: as loaded, not tuned. Raises InvalidInput where TensorRT is missing or the engine
    is another world's, GPU's, TensorRT's or attention's."""
    trt = engines.tensorrt("runtime")
    if shape.device.type != "cuda":
        raise InvalidInput("device", f"got {shape.device}", "cuda where runtime is tensorrt")
    metadata = engines.read(folder)
    engines.check(metadata, folder, engines.here(trt), world, attention, shape.dtype)
    plan = plan_for(world, attention, shape.dtype)
    loaded = engines.deserialize(trt, folder, metadata)
    executors = {graph: TensorRTExecutor(engine, step.bindings(plan, graph), graph) for graph, engine in loaded.items()}
    return EngineRuntime(world, shape, attention, executors)
