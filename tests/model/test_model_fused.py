"""The blocks by kernels against the plain ones, with the same weights: interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import copy

import pytest
import random_world
import torch
from torch.nn import functional as F

from fastar_backend.config import ModelConfig
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.fused import fuse_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    "layers": 2, "text_dim": 20, "text_tokens": 7, "freq_dim": 32, "latent_height": 4, "latent_width": 6, "ffn_dim": 40,
}  # fmt: skip


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def output(dit: CausalDiT, batch: int, frames: int = 3) -> torch.Tensor:
    config, generator = dit.config, torch.Generator().manual_seed(batch)
    x = torch.randn(batch, frames, config.latent_channels, config.latent_height, config.latent_width,
                    generator=generator).to(DEVICE, dit.head.head.weight.dtype)  # fmt: skip
    sigma = torch.rand(batch, frames, generator=generator).to(DEVICE)
    text = torch.randn(batch, config.text_tokens, config.text_dim, generator=generator).to(x)
    pairs = dit.prompt_keys_values(text)
    cross = [lambda query, key=key, value=value: attend(query, key, value) for key, value in pairs]
    return dit(x, sigma, None, [attend] * config.layers, cross)


@pytest.mark.parametrize(("heads", "dim"), [(3, 96), (2, 128), (1, 16)])
@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_fused_blocks_are_the_blocks(heads, dim, batch):
    plain = CausalDiT(ModelConfig.wan_1_3b(**SMALL, dim=dim, heads=heads))
    random_world.randomise(plain, seed=heads)
    plain.to(DEVICE).requires_grad_(False)
    fused = copy.deepcopy(plain)
    assert fuse_blocks(fused)
    expected, got = output(plain, batch), output(fused, batch)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_names_and_values_of_weights_stay():
    dit = CausalDiT(ModelConfig.wan_1_3b(**SMALL, dim=64, heads=2))
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    assert fuse_blocks(dit)
    after = dit.state_dict()
    assert before.keys() == after.keys()
    assert all(value.equal(after[name]) for name, value in before.items())
    own = dit.blocks[0].self_attn
    assert own.q.weight.untyped_storage().data_ptr() == own.v.weight.untyped_storage().data_ptr(), "no second copy"


def test_sizes_that_the_kernels_do_not_take():
    dit = CausalDiT(ModelConfig.wan_1_3b(**SMALL, dim=72, heads=3))
    assert not fuse_blocks(dit)
    assert "before" not in vars(dit.blocks[0])
