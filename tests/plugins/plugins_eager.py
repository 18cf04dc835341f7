"""An executor for tests: a graph's module, run by PyTorch on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

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
