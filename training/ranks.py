"""Training on several GPUs: a process each, with its own games and windows; gradients are averaged after every step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import torch
from torch import Tensor, distributed

EVERY = 10  # steps between two looks at the first process's clock


class Ranks:
    """Of one process, unless `torchrun` started it. The device is this process's."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.count > 1:
            distributed.init_process_group("nccl" if cuda else "gloo")
        self.done = 0.0

    def same(self, tensors: Iterable[Tensor]) -> None:
        """The first process's values, in all."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.data, 0)

    def average(self, parameters: Iterable[Tensor]) -> None:
        """Their gradients, over all processes."""
        if self.count == 1:
            return
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(flat)
        flat /= self.count
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])

    def progress(self, step: int, began: float, seconds: float) -> float:
        """Share of the time that is gone, the same in all processes: 1 or more ends the work."""
        if self.count == 1:
            return (time.monotonic() - began) / seconds
        if step % EVERY == 0:
            now = torch.tensor((time.monotonic() - began) / seconds, device=self.device)
            distributed.broadcast(now, 0)
            self.done = now.item()
        return self.done
