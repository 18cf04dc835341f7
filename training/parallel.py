"""The whole-sequence form of the causal transformer: every chunk of a window is denoised in one pass.

The sequence is [clean frames | noisy frames]; noisy chunk i sees the clean chunks before it and itself, clean chunk i
sees clean chunks up to itself: exactly what the cached sampler computes chunk by chunk (tests compare the two).
Temporal distance is counted from the query's chunk and clamped (`rope_max_distance`). So a chunk's keys are needed in a
few rotations only: as the own chunk's, as those of 1, 2, ... chunks ago, and as far ones. Attention over each of these
parts is one dense call for all chunks (for the far part, one a chunk); the parts are merged by their log-sum-exp, and
differentiated with the merged one, as ring attention does (Liu et al. 2023, arXiv 2310.01889)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar_backend.config import ModelConfig
from fastar_backend.model.layers import rope_rates, rotate

aten = torch.ops.aten


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple]:
    """[N, heads, length, D] each -> output, log-sum-exp [N, heads, length], and what the backward pass wants."""
    if q.is_cuda:
        out, lse, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)
        return out, lse, tuple(rest[:6])
    return *aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False), ()


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: tuple):
    if q.is_cuda:
        lengths, seed = rest[:4], rest[4:]
        return aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, lse, *lengths, 0.0, False, *seed)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)


def _parts(own: Tensor, near: Tensor, far: Tensor, v: Tensor, past: Tensor) -> Iterator[tuple]:
    """(query chunks, their heads, key view, value view, far?) of each dense call; also of the gradients."""
    chunks, heads = own.shape[1:3]
    yield slice(0, chunks), 2 * heads, own, v, False  # clean and noisy chunks as heads of their own
    for distance in range(1, min(near.shape[2], chunks - 1) + 1):
        yield slice(distance, chunks), heads, near[:, :-distance, distance - 1], v[:, :-distance, :, 0], False
    for chunk in range(near.shape[2] + 1, chunks):
        seen = slice(0, (chunk - near.shape[2]) * own.shape[-2])
        yield slice(chunk, chunk + 1), heads, far[:, :, seen], past[:, :, seen], True


class _ChunkAttention(torch.autograd.Function):
    """q, own, v: [B, chunks, heads, 2, n, D], clean and noisy; near: [B, chunks, distances, heads, n, D], the clean
    keys as seen 1, 2, ... chunks later; far: [B, heads, chunks * n, D]; far_bias: [B], added to far keys' logits."""

    @staticmethod
    def forward(ctx, q, own, near, far, v, far_bias):
        past = v[:, :, :, 0].transpose(1, 2).flatten(2, 3)
        out, total, rests = torch.zeros_like(q, dtype=torch.float32), None, []
        for chunks, heads, keys, values, is_far in _parts(own, near, far, v, past):
            here = q[:, chunks]
            size = (-1, heads, here[0, 0].numel() // heads // q.shape[-1], q.shape[-1])
            keys, values = (t.reshape(-1, heads, t.shape[-2], t.shape[-1]) for t in (keys, values))
            part, lse, rest = _flash(here.reshape(size), keys, values)
            part, lse = part.reshape(here.shape), lse.reshape(here.shape[:-1]).float()
            rests.append(rest)
            if total is None:
                out, total = part.float(), lse.clone()
                continue
            if is_far:
                lse = lse + far_bias[:, None, None, None, None]
            before, merged = total[:, chunks], torch.logaddexp(total[:, chunks], lse)
            out[:, chunks] *= (before - merged).exp()[..., None]
            out[:, chunks] += (lse - merged).exp()[..., None] * part
            total[:, chunks] = merged
        out = out.to(q.dtype)
        ctx.save_for_backward(q, own, near, far, v, far_bias, out, total)
        ctx.rests = rests
        return out

    @staticmethod
    def backward(ctx, grad):
        q, own, near, far, v, far_bias, out, total = ctx.saved_tensors
        past = v[:, :, :, 0].transpose(1, 2).flatten(2, 3)
        grads = [torch.zeros_like(t, dtype=torch.float32) for t in (own, near, far, v, past)]
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        parts = zip(_parts(own, near, far, v, past), _parts(*grads), ctx.rests, strict=True)
        for (chunks, heads, keys, values, is_far), (_, _, grad_keys, grad_values, _), rest in parts:
            here = q[:, chunks]
            length = here[0, 0].numel() // heads // q.shape[-1]
            lse = total[:, chunks]
            if is_far:
                lse = lse - far_bias[:, None, None, None, None]
            by_query = (t[:, chunks].reshape(-1, heads, length, t.shape[-1]) for t in (grad, q, out))
            by_key = (t.reshape(-1, heads, t.shape[-2], t.shape[-1]) for t in (keys, values))
            (d_out, queries, outputs), (k, w) = by_query, by_key
            lse = lse.reshape(-1, heads, length)
            d_q, d_k, d_v = _flash_backward(d_out.contiguous(), queries, k, w, outputs, lse, rest)
            grad_q[:, chunks] += d_q.reshape(here.shape)
            grad_keys += d_k.reshape(grad_keys.shape)
            grad_values += d_v.reshape(grad_values.shape)
        grad_own, grad_near, grad_far, grad_v, grad_past = grads
        grad_v[:, :, :, 0] += grad_past.unflatten(2, (-1, v.shape[-2])).transpose(1, 2)
        results = zip((grad_q, grad_own, grad_near, grad_far, grad_v), (q, own, near, far, v), strict=True)
        return *(g.to(t.dtype) for g, t in results), None


@torch.compiler.disable
def _attend(*tensors: Tensor) -> Tensor:
    return _ChunkAttention.apply(*tensors)


class Prompts:
    """`CrossAttend` of one layer to several prompts; a mask says which frame sees which."""

    def __init__(self, key: Tensor, value: Tensor, mask: Tensor) -> None:
        self.key, self.value, self.mask = key, value, mask

    def __call__(self, query: Tensor) -> Tensor:
        q, k, v = (t.to(self.value.dtype).transpose(1, 2) for t in (query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2)


class WholeSequence:
    """`SelfAttend` for windows of `frames` latent frames; q, k, v: [B, 2 * frames * tokens, heads, D]. The clamp must
    be a whole number of chunks."""

    def __init__(self, config: ModelConfig, frames: int, chunk: int, device: torch.device) -> None:
        self.config, self.chunks = config, frames // chunk
        self.time_dim, tokens = config.rope_split[0], config.frame_tokens
        self.distances, rest = divmod(config.rope_max_distance, chunk)
        if rest:
            raise ValueError(f"rope_max_distance: got {config.rope_max_distance}; allowed: a multiple of {chunk}")
        within = torch.arange(chunk, device=device).repeat_interleave(tokens)
        seen = [within - distance * chunk for distance in range(self.distances + 1)]
        seen.append(torch.full_like(within, -config.rope_max_distance))
        rates = rope_rates(self.time_dim, config.rope_theta).to(device)
        angles = torch.stack(seen).double()[..., None] * rates  # [own, 1, 2, ... chunks ago, far]
        self.cos, self.sin = angles.cos().float(), angles.sin().float()
        self.far_bias = torch.zeros((), device=device)  # or [B]: log(n) acts as if far keys had been seen n times

    def _turn(self, x: Tensor, as_seen: int) -> Tensor:
        """x: [..., chunk tokens, D] with its temporal dimensions rotated."""
        time, space = x[..., : self.time_dim], x[..., self.time_dim :]
        return torch.cat([rotate(time, self.cos[as_seen], self.sin[as_seen]).to(x.dtype), space], -1)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            t.to(value.dtype).unflatten(1, (2, self.chunks, -1)).permute(0, 2, 4, 1, 3, 5) for t in (query, key, value)
        )  # [B, chunks, heads, 2, n, D]
        clean = k[:, :, :, 0]
        near = torch.stack([self._turn(clean, distance + 1) for distance in range(self.distances)], 2)
        far = self._turn(clean, -1).transpose(1, 2).flatten(2, 3)
        bias = self.far_bias.expand(len(q)).float()
        out = _attend(self._turn(q, 0), self._turn(k, 0), near, far, v.contiguous(), bias)
        return out.permute(0, 3, 1, 4, 2, 5).flatten(1, 3)

    def prompts(self, keys_values: list[tuple[Tensor, Tensor]], which: Tensor) -> list[Prompts]:
        """keys_values per layer: [B, prompts * text_tokens, heads, D]; which: [B, frames], the prompt each frame
        sees."""
        count = keys_values[0][0].shape[1] // self.config.text_tokens
        of_query = which.repeat_interleave(self.config.frame_tokens, dim=1).repeat(1, 2)
        of_key = torch.arange(count, device=which.device).repeat_interleave(self.config.text_tokens)
        mask = (of_query[:, :, None] == of_key)[:, None]
        return [Prompts(key, value, mask) for key, value in keys_values]
