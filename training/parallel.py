"""The whole-sequence form of the causal transformer: every chunk of a window is denoised in one pass.

The sequence is [clean frames | noisy frames]; noisy chunk i sees the clean chunks before it and itself, clean chunk i
sees clean chunks up to itself: exactly what the cached sampler computes chunk by chunk (tests compare the two).
Temporal distance is counted from the query's chunk and clamped (`rope_max_distance`). So a chunk's keys are needed in a
few rotations only: as the own chunk's, as those of 1, 2, ... chunks ago, and as far ones. Attention over each of these
parts is one dense call for all chunks (over the far part, a few); the parts are merged by their log-sum-exp, and
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


def _windows(x: Tensor, start: int, size: int, apart: int, count: int) -> Tensor:
    """View [B, count, size, ...] of x [B, chunks, ...]: `size` chunks from start, start + apart, ..."""
    stop = start + (count - 1) * apart + size
    return x[:, start:stop].unfold(1, size, apart).movedim(-1, 2)


def _parts(chunks: int, distances: int) -> Iterator[tuple[str, int, tuple, tuple]]:
    """(name of the keys, distance in chunks, queries, keys) of each dense call; the last two are the arguments of
    `_windows`. Far keys, all those more than `distances` chunks ago, come as a triangle is cut into squares: first the
    newest of them alone, then by twos, fours, ...: calls grow with the logarithm of the window."""
    yield "own", 0, (0, 1, 1, chunks), (0, 1, 1, chunks)
    for distance in range(1, min(distances, chunks - 1) + 1):
        count = chunks - distance
        yield "near", distance, (distance, 1, 1, count), (0, 1, 1, count)
    first = distances + 1  # the first chunk that sees far keys
    seen = chunks - first  # so many chunks are far keys of some chunk
    if seen < 1:
        return
    yield "far", 0, (first, 1, 1, seen), (0, 1, 1, seen)
    size = 1
    while size < seen:
        count = seen // (2 * size)
        if count:
            yield "far", 0, (first + size, size, 2 * size, count), (0, size, 2 * size, count)
        if (rest := seen - (2 * count + 1) * size) > 0:
            yield "far", 0, (chunks - rest, rest, rest, 1), (2 * count * size, size, size, 1)
        size *= 2


def _keys(name: str, distance: int, window: tuple, own: Tensor, near: Tensor, far: Tensor, v: Tensor, past: Tensor):
    """Views of the keys and values of a part: [B, count, size, heads, 2, n, D] where clean and noisy queries have their
    own, else [B, count, size, heads, n, D]."""
    keys = {"own": own, "near": near[:, :, distance - 1], "far": far}[name]
    return _windows(keys, *window), _windows(v if name == "own" else past, *window)


def _sequences(x: Tensor, own: bool, queries: bool) -> Tensor:
    """[B, count, size, heads, (2,) n, ...] -> [B * count, heads, length, ...]; `own`: clean and noisy chunks are heads
    of their own, else the length has both."""
    lead, n = 4 + (own or queries), x.shape[4 + (own or queries)]
    if own:  # of size 1
        return x.reshape(-1, 2 * x.shape[3], n, *x.shape[lead + 1 :])
    x = x.transpose(2, 3)
    return x.reshape(-1, x.shape[2], x.shape[3] * n * (2 if queries else 1), *x.shape[lead + 1 :])


def _chunks_of(x: Tensor, like: Tensor, own: bool) -> Tensor:
    """The inverse of `_sequences`, to the shape of `like`."""
    if own:
        return x.reshape(like.shape)
    return x.reshape(like.transpose(2, 3).shape).transpose(2, 3)


class _ChunkAttention(torch.autograd.Function):
    """q, own, v: [B, chunks, heads, 2, n, D], clean and noisy; near: [B, chunks, distances, heads, n, D], the clean
    keys as seen 1, 2, ... chunks later; far: [B, chunks, heads, n, D]; far_bias: [B], added to far keys' logits."""

    @staticmethod
    def forward(ctx, q, own, near, far, v, far_bias):
        past = v[:, :, :, 0]
        out, total, rests = torch.zeros_like(q, dtype=torch.float32), None, []
        for name, distance, queries, keys in _parts(q.shape[1], near.shape[2]):
            alone = name == "own"
            pair = _keys(name, distance, keys, own, near, far, v, past)
            here = _windows(q, *queries)
            part, lse, rest = _flash(_sequences(here, alone, True), *(_sequences(x, alone, False) for x in pair))
            part, lse = _chunks_of(part, here, alone), _chunks_of(lse.float(), here[..., 0], alone)
            rests.append(rest)
            if total is None:
                out, total = part.float().squeeze(2), lse.squeeze(2).clone()
                continue
            if name == "far":
                lse = lse + far_bias[:, None, None, None, None, None]
            there = _windows(total, *queries)
            merged = torch.logaddexp(there, lse)
            _windows(out, *queries).mul_((there - merged).exp()[..., None]).addcmul_(
                (lse - merged).exp()[..., None], part
            )
            there.copy_(merged)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, own, near, far, v, far_bias, out, total)
        ctx.rests = rests
        return out

    @staticmethod
    def backward(ctx, grad):
        q, own, near, far, v, far_bias, out, total = ctx.saved_tensors
        grads = [torch.zeros_like(t, dtype=torch.float32) for t in (own, near, far, v)]
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        for (name, distance, queries, keys), rest in zip(_parts(q.shape[1], near.shape[2]), ctx.rests, strict=True):
            alone = name == "own"
            pair = [_sequences(x, alone, False) for x in _keys(name, distance, keys, own, near, far, v, v[:, :, :, 0])]
            d_out, here, outputs = (_sequences(_windows(x, *queries), alone, True) for x in (grad, q, out))
            lse = _windows(total, *queries)
            if name == "far":
                lse = lse - far_bias[:, None, None, None, None, None]
            lse = _sequences(lse, alone, True)
            d_q, d_k, d_v = _flash_backward(d_out.contiguous(), here, *pair, outputs, lse.contiguous(), rest)
            window = _windows(grad_q, *queries)
            window += _chunks_of(d_q, window, alone)
            for gradient, found in zip(
                _keys(name, distance, keys, *grads, grads[3][:, :, :, 0]), (d_k, d_v), strict=True
            ):
                gradient += _chunks_of(found, gradient, alone)
        results = zip((grad_q, *grads), (q, own, near, far, v), strict=True)
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
        far = self._turn(clean, -1)
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
