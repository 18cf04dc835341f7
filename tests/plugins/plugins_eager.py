"""An executor for tests: a graph's module, run by PyTorch on the CPU; and a recorder that does as CUDA graphs do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastar_backend.attention.flat_cache import FlatCaches
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.model.dit import CausalDiT
from plugins import ops, step

assert ops


class EagerExecutor:
    def __init__(self, plan: step.Plan, dit: CausalDiT, graph: str) -> None:
        self.bindings, self.module = step.bindings(plan, graph), step.make(plan, dit, graph)
        self.runs = 0

    @torch.inference_mode()
    def run(self, tensors: Mapping[str, Tensor]) -> None:
        self.runs += 1
        made = self.module.run({binding.name: tensors[binding.name] for binding in self.bindings if not binding.output})
        for binding in self.bindings:
            if binding.output:
                tensors[binding.alias or binding.name].copy_(made[binding.name])


class Recorder:
    """Recording does no work; a replay does it, on the same tensors."""

    def __init__(self, engine: StreamEngine) -> None:
        self.engine, self.count = engine, 0

    def record(self, act: Callable[[], tuple[Tensor, ...]]) -> Rerun:
        self.count += 1
        caches = [stream.caches for stream in self.engine.streams.values()]
        return Rerun(act, [getattr(cache, name) for cache in caches for name in FlatCaches.TENSORS])


class Rerun:
    def __init__(self, act: Callable[[], tuple[Tensor, ...]], state: list[Tensor]) -> None:
        before = [tensor.clone() for tensor in state]
        self.act, self.outputs = act, act()
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        for output in self.outputs:
            output.fill_(-1)

    def replay(self) -> None:
        for mine, fresh in zip(self.outputs, self.act(), strict=True):
            mine.copy_(fresh)
