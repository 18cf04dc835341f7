"""Shapes, sizes and names: Wan2.1's, where it has them."""

from __future__ import annotations

import pytest
import torch

from fastar_backend.config import AttentionConfig, ModelConfig, SamplerConfig, parse
from fastar_backend.errors import InvalidInput
from fastar_backend.model.autoencoder import FrameAutoencoder, unit_rms
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.layers import RMSNorm, rope_rates, sinusoidal_embedding, spatial_angles
from fastar_backend.model.text import BUCKETS, HashedWords, tokenise, words

WAN_1_3B_PARAMETERS = 1_418_996_800  # of Wan-AI/Wan2.1-T2V-1.3B
LINEAR = ("weight", "bias")


@pytest.fixture(scope="module")
def wan() -> CausalDiT:
    with torch.device("meta"):
        return CausalDiT(ModelConfig())


def test_defaults_are_wan_1_3b(wan):
    config = ModelConfig()
    assert (config.dim, config.layers, config.heads, config.ffn_dim, config.head_dim) == (1536, 30, 12, 8960, 128)
    assert (config.freq_dim, config.text_dim, config.text_tokens, config.latent_channels) == (256, 4096, 512, 16)
    assert (config.frame_tokens, config.rope_theta, config.eps) == (1560, 10000.0, 1e-6)
    assert config.rope_split == (44, 42, 42)
    assert sum(parameter.numel() for parameter in wan.parameters()) == WAN_1_3B_PARAMETERS


def test_state_dict_names_are_wans(wan):
    names = {f"{layer}.{part}" for layer in ("patch_embedding", "head.head") for part in LINEAR}
    names |= {f"{kind}_embedding.{index}.{part}" for kind in ("text", "time") for index in (0, 2) for part in LINEAR}
    names |= {f"time_projection.1.{part}" for part in LINEAR} | {"head.modulation"}
    for block in range(30):
        inside = {f"{kind}_attn.{x}.{part}" for kind in ("self", "cross") for x in "qkvo" for part in LINEAR}
        inside |= {f"{kind}_attn.norm_{x}.weight" for kind in ("self", "cross") for x in "qk"}
        inside |= {f"{layer}.{part}" for layer in ("norm3", "ffn.0", "ffn.2") for part in LINEAR} | {"modulation"}
        names |= {f"blocks.{block}.{name}" for name in inside}
    assert set(wan.state_dict()) == names


def test_state_dict_shapes_are_wans(wan):
    shapes = {name: tuple(value.shape) for name, value in wan.state_dict().items()}
    assert shapes["patch_embedding.weight"] == (1536, 16, 1, 2, 2)
    assert shapes["blocks.29.modulation"] == (1, 6, 1536)
    assert shapes["head.modulation"] == (1, 2, 1536)
    assert shapes["head.head.weight"] == (64, 1536)
    assert shapes["time_projection.1.weight"] == (9216, 1536)
    assert shapes["blocks.0.self_attn.norm_q.weight"] == (1536,)


def test_self_forcing_sigmas():
    assert SamplerConfig().sigmas == pytest.approx((1.0, 0.9375, 5 / 6, 0.625))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"dim": 1537}, "model"),
        ({"heads": 0}, "model.heads"),
        ({"latent_height": 61}, "model"),
        ({"patch": [2, 2, 2]}, "model"),
        ({"prediction": "noise"}, "model.prediction"),
        ({"depth": 3}, "model.depth"),
    ],
)
def test_bad_model_config(values, field):
    with pytest.raises(InvalidInput) as caught:
        parse(ModelConfig, values, "model")
    assert caught.value.field == field
    assert "allowed:" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "window", "budget_frames": 2, "sink_frames": 2},
        {"kind": "fastar", "budget_frames": 4, "sink_frames": 2, "recent_frames": 3},
        {"budget_frames": 0},
        {"merge_threshold": 1.5},
        {"index": "faiss"},
        {"sparse_density": 0},
    ],
)
def test_bad_attention_config(values):
    with pytest.raises(InvalidInput, match="^OPTIONS.attention.*; allowed: "):
        parse(AttentionConfig, values, "OPTIONS.attention")


def test_sinusoidal_embedding_is_wans():
    """cos first, then sin, of position * 10000^(-i / half)."""
    out = sinusoidal_embedding(torch.tensor([[0.0, 500.0]]), 6)
    angles = 500 * 10000.0 ** (-torch.arange(3) / 3)
    torch.testing.assert_close(out[0, 0], torch.tensor([1.0, 1, 1, 0, 0, 0]))
    torch.testing.assert_close(out[0, 1], torch.cat([angles.cos(), angles.sin()]), atol=1e-4, rtol=0)


def test_rotary_rates_and_grid():
    torch.testing.assert_close(rope_rates(4, 100.0), torch.tensor([1.0, 0.1], dtype=torch.float64))
    angles = spatial_angles((2, 3), (6, 2, 2), 100.0)
    assert angles.shape == (6, 5)
    assert angles[:, :3].eq(0).all(), "time is turned by the attention, not here"
    assert angles[:, 3].tolist() == [0, 0, 0, 1, 1, 1]
    assert angles[:, 4].tolist() == [0, 1, 2, 0, 1, 2]


def test_rms_norm():
    norm = RMSNorm(7, 1e-6)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)) * 5
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3))


@pytest.mark.parametrize(("channels", "frames", "height", "width"), [(16, 2, 64, 96), (4, 1, 8, 24), (48, 4, 32, 40)])
def test_autoencoder_shapes(channels, frames, height, width):
    torch.manual_seed(4)
    model = FrameAutoencoder(channels, frames).requires_grad_(False)
    video = torch.rand(3, frames, 3, height, width) * 2 - 1
    latents = model.encode(video)
    assert latents.shape == (3, channels, height // 8, width // 8)
    torch.testing.assert_close(latents.square().mean(1), torch.ones(3, height // 8, width // 8), rtol=1e-2, atol=0)
    decoded = model.decode(latents)
    assert decoded.shape == video.shape
    torch.testing.assert_close(model.decode(latents[1:2]), decoded[1:2], msg="latent frames decode alone")


def test_unit_rms():
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(unit_rms(x, 2).square().mean(2), torch.ones(2, 3, 7), rtol=1e-4, atol=1e-4)
    assert unit_rms(torch.zeros(2, 3), 1).eq(0).all()


def test_words_and_tokens():
    assert words("A dark, STEEL maze: don't stop!") == ["a", "dark", "steel", "maze", "don't", "stop"]
    rows = tokenise("a maze and a maze", 16)
    assert rows[0] == rows[3]
    assert rows[1] == rows[4]
    assert all(1 <= row < BUCKETS for row in rows)
    assert tokenise("a maze and a maze", 2) == rows[:2]
    assert tokenise("迷宫 !!", 16) == []
    assert tokenise("maze", 1) == [870], "trained tables rely on it"


def test_hashed_words_pads_with_zeros():
    table = HashedWords(dim=4, length=6).requires_grad_(False)
    out = table(["a maze", "", "one two three four five six seven"])
    assert out.shape == (3, 6, 4)
    assert out[0, 2:].eq(0).all()
    assert out[1].eq(0).all()
    assert out[2].abs().sum(-1).gt(0).all()
    assert out[0, :2].equal(table.table.weight[tokenise("a maze", 6)])
