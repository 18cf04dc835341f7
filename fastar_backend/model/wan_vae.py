"""The decoder of the Wan2.1 video autoencoder, streamed: chunk by chunk it makes the frames that the whole clip would.

All its temporal convolutions are causal with kernels of 3 frames. A stream's state is the last two input frames of each
of them: constant in size, and nothing is computed twice or approximated. The frames of a chunk go through together.

Layout: [frames, channels, height, width] in channels-last memory, which is the memory of one NDHWC clip: 2-D layers
take the frames as a batch, 3-D convolutions as depth, without copies in between. Names follow Wan2.1_VAE.pth
(Wan-Video/Wan2.1, wan/modules/vae.py), so that it loads directly; `native_name` renames an AutoencoderKLWan
(huggingface/diffusers).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]  # a stream's memory, named by the layer that reads it; empty before the first chunk

CHANNELS = 16  # of a latent
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip
MULTIPLES = (4, 4, 4, 2, 1)  # channels by stage, in multiples of `dim`: the middle's, then what each stage makes
DOUBLES_TIME = (True, True, False)  # does the step after a stage double the frames, too
BLOCKS = 3  # residual blocks of a stage


def split_frames(x: Tensor, count: int) -> Tensor:
    """[n, count C, H, W] -> [n count, C, H, W]: the first C channels are the earliest frame. Channels-last."""
    n, channels, height, width = x.shape
    parts = x.permute(0, 2, 3, 1).unflatten(-1, (count, channels // count)).permute(0, 3, 1, 2, 4)
    return parts.reshape(n * count, height, width, channels // count).permute(0, 3, 1, 2)


def lay_channels_last(module: nn.Module) -> None:
    """The memory of its 4-D and 5-D weights: else convolutions would rearrange their channels-last inputs."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in module.parameters():
        if weight.ndim in formats:
            weight.data = weight.data.contiguous(memory_format=formats[weight.ndim])


class ChannelNorm(nn.Module):
    """x / rms(x) * gamma over the channels."""

    def __init__(self, channels: int, dims: int) -> None:
        """dims: trailing ones in gamma's shape, 3 or 2; only the checkpoint cares."""
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        # 1e-24: Wan divides by max(|x|, 1e-12).
        return F.rms_norm(x.permute(0, 2, 3, 1), x.shape[1:2], self.gamma.flatten(), 1e-24).permute(0, 3, 1, 2)


class CausalConv(nn.Conv3d):
    """Kernel (3, k, k): a frame sees itself and the two before it; before a stream's first frame all is zero."""

    name = ""  # of its memory; WanDecoder sets it

    def __init__(self, channels: int, out: int, kernel: int, scale: int) -> None:
        """scale: how many times larger than the latent its frames are in height and width."""
        super().__init__(channels, out, (3, kernel, kernel))
        self.scale = scale

    def join(self, x: Tensor, past: State, after: State) -> Tensor:
        """[2 + frames, C, H, W]: the memory, then x; remembers the last two frames in `after`."""
        memory = past[self.name] if past else x.new_zeros(2, *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        joined = torch.cat([memory, x]).contiguous(memory_format=torch.channels_last)
        after[self.name] = joined[-2:].clone()  # a view would keep all frames alive
        return joined

    def convolve(self, joined: Tensor) -> Tensor:
        """[2 + frames, C, H, W] -> [frames, out, H, W]."""
        pad, clip = self.kernel_size[1] // 2, joined[None].transpose(1, 2)
        return F.conv3d(clip, self.weight, self.bias, padding=(0, pad, pad)).transpose(1, 2)[0]

    def forward(self, x: Tensor, past: State, after: State) -> Tensor:
        return self.convolve(self.join(x, past, after))


class PointConv(nn.Conv3d):
    """Kernel 1: frames are independent. Three-dimensional in the checkpoint only."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, 0], self.bias)


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, scale: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(channels, 3), "2": CausalConv(channels, out, 3, scale),
                "3": ChannelNorm(out, 3), "6": CausalConv(out, out, 3, scale),
            }
        )  # fmt: skip
        self.shortcut = PointConv(channels, out) if channels != out else nn.Identity()

    def forward(self, x: Tensor, past: State, after: State) -> Tensor:
        h = self.residual["2"](F.silu(self.residual["0"](x)), past, after)
        h = self.residual["6"](F.silu(self.residual["3"](h)), past, after)
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Of the pixels of one frame, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, past: State, after: State) -> Tensor:
        query, key, value = self.to_qkv(self.norm(x)).flatten(2).mT[:, None].chunk(3, -1)
        found = F.scaled_dot_product_attention(query, key, value)[:, 0].unflatten(1, x.shape[2:])
        return x + self.proj(found.permute(0, 3, 1, 2))


class Upsample(nn.Module):
    """Twice the height and width, half the channels; with `time` also twice the frames, but the stream's first frame
    stays one, and later frames do not see it here."""

    def __init__(self, channels: int, scale: int, time: bool) -> None:
        super().__init__()
        self.time_conv = CausalConv(channels, 2 * channels, 1, scale) if time else None
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})

    def forward(self, x: Tensor, past: State, after: State) -> Tensor:
        if self.time_conv is not None:
            x = self._double(x, past, after)
        return self.resample["1"](F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))

    def _double(self, x: Tensor, past: State, after: State) -> Tensor:
        if past:
            return split_frames(self.time_conv(x, past, after), 2)
        first, x = x[:1], x[1:]
        joined = self.time_conv.join(x, past, after)
        return torch.cat([first, split_frames(self.time_conv.convolve(joined), 2)]) if len(x) else first


class _Stages(nn.Module):
    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        widths = [dim * multiple for multiple in MULTIPLES]
        self.conv1 = CausalConv(channels, widths[0], 3, 1)
        self.middle = nn.ModuleList(
            [Residual(widths[0], widths[0], 1), Attention(widths[0]), Residual(widths[0], widths[0], 1)]
        )
        self.upsamples, width, scale = nn.ModuleList(), widths[0], 1
        for stage, out in enumerate(widths[1:]):
            for _ in range(BLOCKS):
                self.upsamples.append(Residual(width, out, scale))
                width = out
            if stage < len(DOUBLES_TIME):
                self.upsamples.append(Upsample(out, scale, DOUBLES_TIME[stage]))
                width, scale = out // 2, 2 * scale
        self.head = nn.ModuleDict({"0": ChannelNorm(width, 3), "2": CausalConv(width, 3, 3, scale)})

    def forward(self, x: Tensor, past: State, after: State) -> Tensor:
        x = self.conv1(x, past, after)
        for layer in [*self.middle, *self.upsamples]:
            x = layer(x, past, after)
        return self.head["2"](F.silu(self.head["0"](x)), past, after)


class WanDecoder(nn.Module):
    """Latents of the diffusion model (normalised) -> pixels. Stateless itself: streams hold the state."""

    def __init__(self, dim: int = 96) -> None:
        """dim: channels at full resolution, 96 in the published weights."""
        super().__init__()
        self.conv2 = PointConv(CHANNELS, CHANNELS)
        self.decoder = _Stages(dim, CHANNELS)
        # As bits, for a later .to(bfloat16) would round them.
        self.register_buffer("scale", torch.tensor([STD, MEAN]).view(torch.int32), persistent=False)
        self.causal = {name: module for name, module in self.named_modules() if isinstance(module, CausalConv)}
        for name, module in self.causal.items():
            module.name = name
        lay_channels_last(self)

    def state(self) -> State:
        """A fresh stream's."""
        return {}

    def state_shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int, int]]:
        """The state after any chunk of latents of that height and width: the shape of each of its tensors."""
        return {
            name: (2, conv.in_channels, height * conv.scale, width * conv.scale) for name, conv in self.causal.items()
        }

    def decode(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        """latents: [F, 16, h, w], F >= 1, the next ones of one stream; state: `state()` or what the last call returned.
        Returns pixels [frames, 3, 8 h, 8 w] in -1..1, not clamped, and the new state; `state` is not written to.
        frames: 4 F, and 4 F - 3 on a fresh stream, whose first latent holds one frame."""
        std, mean = self.scale.view(torch.float32)[..., None, None]
        x = (latents.float() * std + mean).to(self.conv2.weight.dtype, memory_format=torch.channels_last)
        after: State = {}
        return self.decoder(self.conv2(x), state, after), after


_RENAMED = {  # diffusers' names, as far as they are not the same
    "post_quant_conv": "conv2", "decoder.conv_in": "decoder.conv1", "decoder.norm_out": "decoder.head.0",
    "decoder.conv_out": "decoder.head.2", "decoder.mid_block.attentions.0": "decoder.middle.1",
    "decoder.mid_block.resnets.0": "decoder.middle.0", "decoder.mid_block.resnets.1": "decoder.middle.2",
    ".norm1.": ".residual.0.", ".conv1.": ".residual.2.", ".norm2.": ".residual.3.", ".conv2.": ".residual.6.",
    ".conv_shortcut.": ".shortcut.",
}  # fmt: skip


def native_name(name: str) -> str:
    """Of a decoder's tensor in a diffusers folder; names that are native already stay."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "up_blocks"] and len(parts) > 4 and parts[2].isdecimal() and parts[4].isdecimal():
        at = int(parts[2]) * (BLOCKS + 1) + (int(parts[4]) if parts[3] == "resnets" else BLOCKS)
        name = ".".join(["decoder", "upsamples", str(at), *parts[5:]])
    inner = name.startswith(("decoder.upsamples.", "decoder.mid_block."))
    for theirs, ours in _RENAMED.items():
        if theirs.startswith(".") and inner:
            name = name.replace(theirs, ours)
        elif name.startswith(theirs + "."):
            name = ours + name.removeprefix(theirs)
    return name
