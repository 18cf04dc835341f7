"""TAEHV, a tiny decoder of Wan2.1's latents (madebyollin/taehv, taew2_1.pth): a twenty-fifth of the VAE's work.

A convolutional network over single frames, but for its memory blocks, which see the frame before, too. A stream's
state is that frame for each of them. The frames of a chunk go through together, channels-last. Names are the file's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar_backend.model.wan_vae import CHANNELS, State, lay_channels_last, split_frames

FRAMES = (1, 2, 2)  # that each stage makes of one
TRIMMED = 3  # first frames of a stream, which the first latent does not hold
BLOCKS = 3  # memory blocks of a stage


class MemoryBlock(nn.Module):
    """x + three convolutions of x and the frame before x (zero before a stream's first)."""

    name = ""  # of its memory; TinyDecoder sets it

    def __init__(self, channels: int, scale: int) -> None:
        """scale: how many times larger than the latent its frames are in height and width."""
        super().__init__()
        self.channels, self.scale = channels, scale
        self.conv = nn.ModuleDict(
            {str(2 * i): nn.Conv2d(channels * (2 if i == 0 else 1), channels, 3, padding=1) for i in range(3)}
        )

    def forward(self, x: Tensor, past: State, after: State) -> Tensor:
        memory = past[self.name] if past else torch.zeros_like(x[:1])
        after[self.name] = x[-1:].clone()  # a view would keep all frames alive
        h = torch.cat([x, torch.cat([memory, x[:-1]])], 1)
        h = self.conv["2"](F.relu(self.conv["0"](h)))
        return F.relu(x + self.conv["4"](F.relu(h)))


class Grow(nn.Module):
    """Twice the height and width, `frames` frames of one. The published network scales up first: with a 1x1
    convolution that commutes, so it is done on a quarter of the pixels."""

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(channels, channels * frames, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(split_frames(self.conv(x), self.frames), scale_factor=2.0, mode="nearest-exact")


class TinyDecoder(nn.Module):
    """Latents of the diffusion model (normalised) -> pixels. Stateless itself: streams hold the state."""

    def __init__(self, dim: int = 256) -> None:
        """dim: channels at the latent's resolution, 256 in the published weights."""
        super().__init__()
        widths = [dim, dim // 2, dim // 4, dim // 4]
        layers: dict[str, nn.Module] = {"1": nn.Conv2d(CHANNELS, dim, 3, padding=1)}
        for stage, frames in enumerate(FRAMES):
            width, at = widths[stage], 3 + stage * (BLOCKS + 3)
            for block in range(BLOCKS):
                layers[str(at + block)] = MemoryBlock(width, 2**stage)
            layers[str(at + BLOCKS + 1)] = Grow(width, frames)
            layers[str(at + BLOCKS + 2)] = nn.Conv2d(width, widths[stage + 1], 3, padding=1, bias=False)
        layers["22"] = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.decoder = nn.ModuleDict(layers)
        self.blocks = {name: module for name, module in self.named_modules() if isinstance(module, MemoryBlock)}
        for name, module in self.blocks.items():
            module.name = name
        lay_channels_last(self)

    def state(self) -> State:
        """A fresh stream's."""
        return {}

    def state_shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int, int]]:
        """The state after any chunk of latents of that height and width: the shape of each of its tensors."""
        return {
            name: (1, block.channels, height * block.scale, width * block.scale) for name, block in self.blocks.items()
        }

    def decode(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        """latents: [F, 16, h, w], F >= 1, the next ones of one stream; state: `state()` or what the last call returned.
        Returns pixels [frames, 3, 8 h, 8 w] in -1..1, not clamped, and the new state; `state` is not written to.
        frames: 4 F, and 4 F - 3 on a fresh stream, whose first latent holds one frame."""
        after: State = {}
        *layers, last = self.decoder.values()
        first = layers[0]
        x = (3 * torch.tanh(latents.float() / 3)).to(first.weight.dtype, memory_format=torch.channels_last)
        x = F.relu(first(x))
        for layer in layers[1:]:
            x = layer(x, state, after) if isinstance(layer, MemoryBlock) else layer(x)
        if not state:
            x = x[TRIMMED:]
        return 2 * last(F.relu(x)) - 1, after
