"""The whole-sequence form of the causal transformer: every chunk of a window is denoised in one pass.

The sequence is [clean frames | noisy frames]; noisy chunk i sees the clean chunks before it and itself, clean chunk i
sees clean chunks up to itself: exactly what the cached sampler computes chunk by chunk (tests compare the two).
Temporal distance is counted from the query's chunk and clamped (`rope_max_distance`), which rotary positions alone
cannot express; so each key stands there twice, once with its own position for near queries and once with none for far
ones, the query carrying both rotations in separate head dimensions. One more dimension can add a bias to all far keys:
log(n) acts as if each of them had been seen n times."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.config import ModelConfig
from fastar_backend.model.layers import rope_rates, rotate


def visible(query: Tensor, key: Tensor, frames: int, tokens: int, chunk: int, reach: int) -> Tensor:
    """Whether `query` (index into [clean | noisy], 2 * frames * tokens) may see `key` (index into [clean near | noisy
    near | clean far])."""
    length = frames * tokens
    query_noisy, key_noisy, key_far = query >= length, (key >= length) & (key < 2 * length), key >= 2 * length
    query_frame, key_frame = (query % length) // tokens, (key % length) // tokens
    query_chunk, key_chunk = query_frame // chunk, key_frame // chunk
    far = query_chunk * chunk - key_frame > reach
    clean = (
        ~key_noisy
        & ((key_far & far) | (~key_far & ~far))
        & torch.where(query_noisy, key_chunk < query_chunk, key_chunk <= query_chunk)
    )
    return clean | (query_noisy & key_noisy & (key_chunk == query_chunk))


class Prompts:
    """`CrossAttend` of one layer to several prompts; a mask says which frame sees which."""

    def __init__(self, key: Tensor, value: Tensor, mask: Tensor) -> None:
        self.key, self.value, self.mask = key, value, mask

    def __call__(self, query: Tensor) -> Tensor:
        q, k, v = (t.to(self.value.dtype).transpose(1, 2) for t in (query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2)


class WholeSequence:
    """`SelfAttend` for windows of `frames` latent frames; q, k, v: [B, 2 * frames * tokens, heads, D]."""

    def __init__(self, config: ModelConfig, frames: int, chunk: int, device: torch.device) -> None:
        self.config, self.frames, self.chunk = config, frames, chunk
        tokens, reach = config.frame_tokens, config.rope_max_distance
        self.time_dim = config.rope_split[0]
        self.far_bias: Tensor | None = None  # [B], added to the logits of keys beyond the clamp
        frame = torch.arange(frames, device=device).repeat_interleave(tokens).repeat(2)
        far = frame % chunk + reach
        rates = rope_rates(self.time_dim, config.rope_theta).to(device)
        angles = torch.stack([frame, far]).double()[..., None, None] * rates
        self.cos, self.sin = angles.cos().float(), angles.sin().float()
        lengths = 2 * frames * tokens, 3 * frames * tokens
        visibility = functools.partial(visible, frames=frames, tokens=tokens, chunk=chunk, reach=reach)
        if device.type == "cuda":
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            torch._dynamo.config.cache_size_limit = 64  # each window length compiles its own
            self.block_mask = create_block_mask(
                lambda b, h, q, k: visibility(q, k), None, None, *lengths, device=device, _compile=True
            )
            self.flex = flex_attention
        else:
            self.mask = visibility(torch.arange(lengths[0])[:, None], torch.arange(lengths[1])[None, :])

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        time, length = self.time_dim, self.frames * self.config.frame_tokens
        kind = value.dtype
        q_time, q_space = query[..., :time], query[..., time:]
        k_time, k_space = key[..., :time], key[..., time:]
        scale = self.config.head_dim**-0.5
        one = torch.ones_like(q_time[..., :1])
        q = torch.cat(
            [q_space, rotate(q_time, self.cos[0], self.sin[0]), rotate(q_time, self.cos[1], self.sin[1]), one], -1
        )
        near = torch.cat([k_space, rotate(k_time, self.cos[0], self.sin[0]), torch.zeros_like(k_time), 0 * one], -1)
        bias = 0 * one if self.far_bias is None else one * (self.far_bias / scale).to(one.dtype)[:, None, None, None]
        far = torch.cat([k_space, torch.zeros_like(k_time), k_time, bias], -1)[:, :length]
        k = torch.cat([near, far], 1)
        v = torch.cat([value, value[:, :length]], 1)
        if value.device.type == "cuda":
            pad = -q.shape[-1] % 128
            q, k, v = (t.to(kind).transpose(1, 2) for t in (F.pad(q, (0, pad)), F.pad(k, (0, pad)), v))
            return self.flex(q, k, v, block_mask=self.block_mask, scale=scale).transpose(1, 2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, self.mask, scale=scale).transpose(1, 2)

    def prompts(self, keys_values: list[tuple[Tensor, Tensor]], which: Tensor) -> list[Prompts]:
        """keys_values per layer: [B, prompts * text_tokens, heads, D]; which: [B, frames], the prompt each frame
        sees."""
        count = keys_values[0][0].shape[1] // self.config.text_tokens
        of_query = which.repeat_interleave(self.config.frame_tokens, dim=1).repeat(1, 2)
        of_key = torch.arange(count, device=which.device).repeat_interleave(self.config.text_tokens)
        mask = (of_query[:, :, None] == of_key)[:, None]
        return [Prompts(key, value, mask) for key, value in keys_values]
