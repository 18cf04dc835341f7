"""TeaCache and FlowCache: denoising passes that are skipped, their output taken from the last pass computed.

A pass is skipped if the model's input has hardly changed: the relative L1 change of a feature of it, summed over the
passes since the last one computed, is below a threshold. TeaCache (Liu et al., arXiv 2411.19108, equations 3 to 6)
looks at the first block's input as the timestep modulates it; FlowCache (arXiv 2602.10825, section on chunk-wise
caching, and `cache/cachereuse.py`) at the embedded patches, for each chunk by itself. A chunk's first passes and its
last are always computed, as in both public codes; so is the pass that writes the caches. Each stream decides for
itself, and only those that need the pass are in its batch. Nothing is carried over to the next chunk.

Ported: what is reused is the model's output (flow or clean latents), by both; TeaCache's public code keeps the blocks'
residual. TeaCache's polynomial, fitted to a model's schedule of 50 steps, is left out: none was fitted to ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.stream import Stream
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.layers import sinusoidal_embedding

Forward = Callable[[list[Stream], Tensor, float, Tensor], Tensor]  # streams, noisy latents, sigma, actions -> output


def embedded(dit: CausalDiT, x: Tensor) -> Tensor:
    """x: [streams, latent frames, C, h, w] -> patches [streams, latent frames, tokens, dim]."""
    return dit.patch_embedding(x.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)


def modulated(dit: CausalDiT, x: Tensor, sigma: float, actions: Tensor) -> Tensor:
    """The first block's normalised input, shifted and scaled for noise level and actions. Shapes as `embedded`."""
    patches, block = embedded(dit, x), dit.blocks[0]
    level = torch.full(x.shape[:2], sigma * 1000, device=x.device)
    e = dit.time_embedding(sinusoidal_embedding(level, dit.config.freq_dim).to(patches.dtype))
    if dit.config.action_dim:
        e = e + dit.action_embedding(actions.to(patches.dtype))
    e6 = dit.time_projection(e).unflatten(-1, (6, -1))
    shift, scale = (block.modulation[:, :2] + e6[:, :, :2]).to(patches.dtype).unsqueeze(3).unbind(2)
    return F.layer_norm(patches, patches.shape[-1:], eps=block.eps) * (1 + scale) + shift


@dataclasses.dataclass
class Passes:
    """One stream's passes of a chunk so far. steps: denoising passes of a chunk."""

    config: AttentionConfig
    steps: int
    done: int = 0
    changed: float = 0.0  # relative L1, summed since the last pass computed
    feature: Tensor | None = None  # of the last pass
    output: Tensor | None = None  # of the last pass computed

    def skips(self, feature: Tensor) -> bool:
        """Whether the next pass, with this feature of its input, takes the last output. To be asked once a pass."""
        settings = self.config.baseline
        limit = settings.teacache_change if self.config.reuse == "teacache" else settings.flowcache_change
        before, self.feature = self.feature, feature
        self.done += 1
        if self.done <= settings.reuse_warm_up or self.done == self.steps:
            self.changed = 0.0
            return False
        change = (feature - before).float().abs().mean() / before.float().abs().mean().clamp(min=1e-12)
        self.changed += float(change)
        if self.changed < limit:
            return True
        self.changed = 0.0
        return False


class Reuse:
    """Of one chunk of some streams."""

    def __init__(self, dit: CausalDiT, streams: Sequence[Stream], steps: int) -> None:
        self.dit, self.streams = dit, list(streams)
        self.passes = [Passes(stream.attention, steps) for stream in streams]

    def run(self, x: Tensor, sigma: float, actions: Tensor, forward: Forward) -> Tensor:
        """The model's output [streams, ...] at noise level sigma, computed by `forward` for those that need it. x,
        actions: [streams, ...]."""
        if all(one.config.reuse == "off" for one in self.passes):
            return forward(self.streams, x, sigma, actions)
        rows = [row for row in range(len(self.passes)) if not self._skips(row, x, sigma, actions)]
        if rows:
            at = torch.tensor(rows, device=x.device)
            outputs = forward([self.streams[row] for row in rows], x[at], sigma, actions[at])
            for row, output in zip(rows, outputs, strict=True):
                self.passes[row].output = output
        for row in set(range(len(self.streams))) - set(rows):
            self.streams[row].caches.skip()
        return torch.stack([one.output for one in self.passes])

    def _skips(self, row: int, x: Tensor, sigma: float, actions: Tensor) -> bool:
        one, own = self.passes[row], slice(row, row + 1)
        if one.config.reuse == "off":
            return False
        if one.config.reuse == "teacache":
            return one.skips(modulated(self.dit, x[own], sigma, actions[own]))
        return one.skips(embedded(self.dit, x[own]))
