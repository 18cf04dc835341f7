"""The causal video diffusion transformer: Wan2.1's architecture at any size, with actions.

The transformer does not know what its queries may attend to: both attentions are callables given to `forward`, one per
layer (`fastar_backend.attention` serves streams; `training` brings a whole-sequence block-causal mask), so one
implementation serves every attention policy and the training.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar_backend.config import ModelConfig
from fastar_backend.model.layers import RMSNorm, rotate, sinusoidal_embedding, spatial_angles


class SelfAttend(Protocol):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, tokens, heads, head_dim] each; query and key carry spatial rotary positions, no temporal ones."""


class CrossAttend(Protocol):
    def __call__(self, query: Tensor) -> Tensor:
        """query: [batch, tokens, heads, head_dim]; the caller holds the prompt's keys and values."""


class Steer(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """[B, F, tokens, C] between cross-attention and feed-forward of one block (Matrix-Game's action modules)."""


class _Projections(nn.Module):
    """Query, key, value, output projections; query and key RMS-normed over the full dim before the head split."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)

    def query(self, x: Tensor) -> Tensor:
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = (self.heads, -1)
        return self.norm_k(self.k(x)).unflatten(-1, heads), self.v(x).unflatten(-1, heads)

    def output(self, x: Tensor) -> Tensor:
        return self.o(x.flatten(-2))


class Block(nn.Module):
    """Self-attention (modulated), cross-attention (no gate), feed-forward (modulated)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn, self.cross_attn = _Projections(config), _Projections(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor, space: tuple[Tensor, Tensor], attend: SelfAttend,
                cross: CrossAttend, steer: Steer | None = None) -> Tensor:  # fmt: skip
        """x: [B, F, tokens, C]; e: [B, F, 6, C] timestep (and action) modulation per latent frame."""
        query, key, value = self.before(x, e, *space)
        x, query = self.between(x, e, attend(query, key, value))
        if steer is None:
            return self.after(x, e, cross(query))
        return self.feed_forward(steer(self.joined(x, cross(query))), e)

    # The pieces between the attentions are what `compile_blocks` compiles.

    def before(self, x: Tensor, e: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale, _ = self._modulation(e, x.dtype, 0)
        h = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift
        key, value = self.self_attn.key_value(h)
        query, key = rotate(self.self_attn.query(h), cos, sin), rotate(key, cos, sin)
        return query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2)

    def between(self, x: Tensor, e: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn.output(attended).view_as(x) * self._modulation(e, x.dtype, 0)[2]
        return x, self.cross_attn.query(self.norm3(x)).flatten(1, 2)

    def joined(self, x: Tensor, crossed: Tensor) -> Tensor:
        return x + self.cross_attn.output(crossed).view_as(x)

    def after(self, x: Tensor, e: Tensor, crossed: Tensor) -> Tensor:
        return self.feed_forward(self.joined(x, crossed), e)

    def feed_forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale, gate = self._modulation(e, x.dtype, 3)
        h = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift
        return x + self.ffn(h) * gate

    def _modulation(self, e: Tensor, dtype: torch.dtype, first: int) -> tuple[Tensor, ...]:
        """Shift, scale, gate [B, F, 1, C]: of the self-attention (first 0) or the feed-forward (3)."""
        parts = (self.modulation[:, first : first + 3] + e[:, :, first : first + 3]).to(dtype)
        return tuple(part.unsqueeze(2) for part in parts.unbind(-2))


class Head(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.latent_channels * config.patch[1] * config.patch[2])
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x: [B, F, tokens, C]; e: [B, F, C]."""
        shift, scale = (self.modulation + e.unsqueeze(-2)).to(x.dtype).unsqueeze(2).unbind(-2)
        return self.head(F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift)


class CausalDiT(nn.Module):
    """Predicts flow or clean latents of the frames given, whatever history the attention callables hold."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.latent_channels, dim, config.patch, stride=config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.action_dim:
            self.action_embedding = nn.Sequential(nn.Linear(config.action_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.head = Head(config)
        with torch.device("cpu"):  # real numbers, even where the module is built on the meta device
            angles = spatial_angles(config.grid, config.rope_split, config.rope_theta)[:, None]
        self.register_buffer("space_cos", angles.cos().float(), persistent=False)
        self.register_buffer("space_sin", angles.sin().float(), persistent=False)

    def prompt_keys_values(self, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cross-attention keys and values [B, text_tokens, heads, head_dim] per layer, computed once a prompt.

        text: [B, text_tokens, text_dim], zero-padded and, as in Wan, not masked.
        """
        embedded = self.text_embedding(text)
        return [block.cross_attn.key_value(embedded) for block in self.blocks]

    def forward(self, latents: Tensor, sigma: Tensor, actions: Tensor | None,
                attend: Sequence[SelfAttend], cross: Sequence[CrossAttend],
                steer: Sequence[Steer | None] | None = None) -> Tensor:  # fmt: skip
        """latents: [B, F, channels, height, width] at noise level sigma [B, F] in 0..1; actions: [B, F, action_dim];
        steer: one per block. Returns flow or clean latents (`config.prediction`), [B, F, latent_channels, height,
        width]."""
        config, (batch, frames) = self.config, latents.shape[:2]
        x = self.patch_embedding(latents.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1).contiguous()
        e = self.time_embedding(sinusoidal_embedding(sigma * 1000, config.freq_dim).to(x.dtype))
        if config.action_dim:
            e = e + self.action_embedding(actions.to(x.dtype))
        e6 = self.time_projection(e).unflatten(-1, (6, -1))
        wide = torch.promote_types(x.dtype, torch.float32)
        space = self.space_cos.to(wide), self.space_sin.to(wide)
        steer = steer or [None] * config.layers
        for block, attend_self, attend_text, steer_block in zip(self.blocks, attend, cross, steer, strict=True):
            x = block(x, e6, space, attend_self, attend_text, steer_block)
        x = self.head(x, e)
        rows, columns = config.grid
        return x.reshape(batch, frames, rows, columns, config.patch[1], config.patch[2], -1).permute(
            0, 1, 6, 2, 4, 3, 5
        ).reshape(batch, frames, config.latent_channels, *latents.shape[3:])  # fmt: skip

    def compile_blocks(self) -> None:
        """Compiles the blocks' pieces between the attentions, once for all blocks (their weights are arguments)."""
        for name in ("before", "between", "after"):
            piece = getattr(Block, name)
            # Of its own code: what is compiled for another model is not looked up. So only the tensors that go in have
            # to be checked at a call; checking all of a block costs the host more time than a GPU needs for it.
            own = types.FunctionType(piece.__code__.replace(), piece.__globals__, name)
            compiled = torch.compile(own, options={"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe})
            for block in self.blocks:
                setattr(block, name, functools.partial(compiled, block))
