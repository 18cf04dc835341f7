"""The streamed transformer against the whole-sequence form that it is trained in."""

from __future__ import annotations

import pytest
import random_world
import torch

from fastar_backend.attention import CacheShape, TextCache, make_cache
from fastar_backend.attention.batch import StreamsAttend, StreamsAttendText
from fastar_backend.config import AttentionConfig, ModelConfig
from fastar_backend.model.dit import CausalDiT
from training.parallel import WholeSequence, _ChunkAttention

SIGMA, CONTEXT_SIGMA = 0.7, 0.1


def model_of(**values) -> CausalDiT:
    config = ModelConfig.model_validate(
        {
            "dim": 36, "layers": 3, "heads": 2, "ffn_dim": 48, "freq_dim": 16, "text_dim": 12, "text_tokens": 5,
            "latent_channels": 4, "latent_height": 6, "latent_width": 10, "action_dim": 3, "rope_theta": 100.0,
            **values,
        }
    )  # fmt: skip
    model = CausalDiT(config).requires_grad_(False)
    random_world.randomise(model, seed=1)
    return model


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("chunk", "chunks", "reach"), [(1, 7, 3), (2, 5, 4), (2, 6, 2), (3, 4, 3), (2, 2, 18)])
@pytest.mark.parametrize("action_dim", [3, 0])
def test_streaming_is_the_whole_sequence(chunk, chunks, reach, action_dim):
    """Noisy chunk i over a cache of clean chunks < i = the noisy half of [clean | noisy] under the training mask."""
    model = model_of(rope_max_distance=reach, action_dim=action_dim)
    config, frames = model.config, chunk * chunks
    torch.manual_seed(2)
    clean, noisy = torch.randn(2, 2, frames, config.latent_channels, config.latent_height, config.latent_width)
    actions = torch.randn(2, frames, action_dim) if action_dim else None
    text = torch.randn(2, config.text_tokens, config.text_dim)
    keys_values = model.prompt_keys_values(text)

    whole = WholeSequence(config, frames, chunk, torch.device("cpu"))
    level = torch.full((2, 2 * frames), SIGMA)
    level[:, :frames] = CONTEXT_SIGMA
    both_actions = None if actions is None else torch.cat([actions, actions], 1)
    cross = whole.prompts(keys_values, torch.zeros(2, frames, dtype=torch.long))
    want = model(torch.cat([clean, noisy], 1), level, both_actions, [whole] * config.layers, cross)

    shape = CacheShape(config.heads, config.head_dim, config.frame_tokens, chunk, reach, config.rope_split,
                       config.rope_theta, torch.device("cpu"), torch.float32)  # fmt: skip
    dense = AttentionConfig(kind="dense")
    caches = [[make_cache(shape, dense) for _ in range(2)] for _ in range(config.layers)]
    prompts = [StreamsAttendText([TextCache(k[i], v[i], text[i], dense) for i in range(2)]) for k, v in keys_values]

    def step(latents: torch.Tensor, sigma: float, start: int, write: bool) -> torch.Tensor:
        attend = [StreamsAttend(shape, layer, [None, None], progress=1.0, write=write) for layer in caches]
        now = None if actions is None else actions[:, start : start + chunk]
        return model(latents, torch.full((2, chunk), sigma), now, attend, prompts)

    for start in range(0, frames, chunk):
        for cache in (cache for layer in caches for cache in layer):
            cache.begin(start)
        here = slice(start, start + chunk)
        got = step(noisy[:, here], SIGMA, start, write=False)
        assert error(got, want[:, frames + start : frames + start + chunk]) < 1e-4, f"noisy frames {here}"
        got = step(clean[:, here], CONTEXT_SIGMA, start, write=True)
        assert error(got, want[:, here]) < 1e-4, f"clean frames {here}"


def test_history_actions_text_and_noise_level_all_matter():
    """What the test above compares is not blind to any input."""
    model = model_of()
    config = model.config
    torch.manual_seed(3)
    whole = WholeSequence(config, 2, 1, torch.device("cpu"))
    latents = torch.randn(1, 4, config.latent_channels, config.latent_height, config.latent_width)
    inputs = {"latents": latents, "sigma": torch.full((1, 4), 0.5), "actions": torch.randn(1, 4, 3)}
    text = torch.randn(1, config.text_tokens, config.text_dim)

    def run(text: torch.Tensor = text, **changed: torch.Tensor) -> torch.Tensor:
        cross = whole.prompts(model.prompt_keys_values(text), torch.zeros(1, 2, dtype=torch.long))
        return model(**(inputs | changed), attend=[whole] * config.layers, cross=cross)[:, 3]

    first_clean, last_clean = latents.clone(), latents.clone()
    first_clean[:, 0] += 1
    last_clean[:, 1] += 1
    assert error(run(latents=first_clean), run()) > 1e-3
    assert run(latents=last_clean).equal(run()), "a noisy frame must not see its own clean twin"
    assert error(run(sigma=inputs["sigma"] + 0.1), run()) > 1e-3
    assert error(run(actions=-inputs["actions"]), run()) > 1e-3
    assert error(run(text=-text), run()) > 1e-3


def plain_chunks(q, own, near, far, v, far_bias):
    """What `_ChunkAttention` computes, query chunk by query chunk, one softmax over all it may see."""
    outputs = []
    reach = near.shape[2]
    for chunk in range(q.shape[1]):
        rows = []
        for half in range(2):
            recent = range(max(chunk - reach, 0), chunk)
            keys = [near[:, c, chunk - c - 1] for c in recent] + [own[:, chunk, :, half]]
            values = [v[:, c, :, 0] for c in recent] + [v[:, chunk, :, half]]
            biases = [torch.zeros(len(q), 1, 1, k.shape[-2], dtype=q.dtype) for k in keys]
            seen = max(chunk - reach, 0)
            if seen:
                keys.append(far[:, :seen].transpose(1, 2).flatten(2, 3))
                values += [v[:, c, :, 0] for c in range(seen)]
                biases.append(far_bias[:, None, None, None].expand(-1, 1, 1, keys[-1].shape[-2]))
            logits = q[:, chunk, :, half] @ torch.cat(keys, -2).mT * q.shape[-1] ** -0.5 + torch.cat(biases, -1)
            rows.append(logits.softmax(-1) @ torch.cat(values, -2))
        outputs.append(torch.stack(rows, 2))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(
    ("chunks", "reach", "n"), [(6, 3, 10), (5, 1, 7), (2, 3, 4), (13, 2, 3), (20, 3, 2), (4, 3, 5)]
)
def test_merged_parts_are_one_softmax_and_so_are_their_gradients(chunks, reach, n):
    torch.manual_seed(4)
    batch, heads, dim = 2, 3, 8
    shapes = {
        "q": (batch, chunks, heads, 2, n, dim), "own": (batch, chunks, heads, 2, n, dim),
        "near": (batch, chunks, reach, heads, n, dim), "far": (batch, chunks, heads, n, dim),
        "v": (batch, chunks, heads, 2, n, dim),
    }  # fmt: skip
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes.values()]
    bias, weight = torch.tensor([0.0, 2.0]), torch.randn(shapes["q"])
    got = _ChunkAttention.apply(*inputs, bias)
    got_grads = torch.autograd.grad((got * weight).sum(), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = plain_chunks(*exact, bias.double())
    grads = torch.autograd.grad((want * weight).sum(), exact, allow_unused=True)
    assert error(got, want) < 1e-5
    for name, a, b in zip(shapes, got_grads, grads, strict=True):
        if b is not None:
            assert error(a, b) < 1e-5, name


def test_a_clamp_that_cuts_a_chunk_is_refused():
    with pytest.raises(ValueError, match="got 3; allowed: a multiple of 2"):
        WholeSequence(model_of(rope_max_distance=3).config, 4, 2, torch.device("cpu"))
