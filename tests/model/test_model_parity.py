"""`CausalDiT` against diffusers' `WanTransformer3DModel`, which shares no code with it, with the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import random_world
import torch

from fastar_backend.attention import CacheShape, FrameCache, TextCache, make_cache
from fastar_backend.attention.batch import StreamsAttend, StreamsAttendText
from fastar_backend.config import AttentionConfig, ModelConfig
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.wan_names import native

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

DENSE = AttentionConfig(kind="dense")
CHUNK = 3  # latent frames
TOLERANCE = 1e-5  # largest error over largest value; 5e-7 is usual, and the other kind of GELU would be 5e-5
SMALL = {"layers": 2, "text_dim": 20, "text_tokens": 7, "freq_dim": 32}
# Two heads of Wan's 128 dimensions (44 of time, 42 and 42 of space), and as many as 14B has per 1.3B's; odd grids.
SHAPES = {
    "1.3B": ModelConfig.wan_1_3b(**SMALL, dim=256, heads=2, ffn_dim=384, latent_height=12, latent_width=20),
    "14B": ModelConfig.wan_14b(**SMALL, dim=640, heads=5, ffn_dim=448, latent_height=6, latent_width=14),
}


def of_diffusers(config: ModelConfig) -> WanTransformer3DModel:
    from diffusers import WanTransformer3DModel  # here, as every test process collects this file

    return WanTransformer3DModel(
        patch_size=config.patch, num_attention_heads=config.heads, attention_head_dim=config.head_dim,
        in_channels=config.latent_channels, out_channels=config.latent_channels, text_dim=config.text_dim,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.layers, eps=config.eps,
        cross_attn_norm=True,
    ).eval().requires_grad_(False)  # fmt: skip


@pytest.fixture(scope="module", params=SHAPES)
def pair(request) -> tuple[CausalDiT, WanTransformer3DModel]:
    """Both models with the same random weights."""
    theirs = of_diffusers(SHAPES[request.param])
    random_world.randomise(theirs, seed=1)
    ours = CausalDiT(SHAPES[request.param]).requires_grad_(False)
    ours.load_state_dict({native(name): value for name, value in theirs.state_dict().items()})
    return ours, theirs


class Streams:
    """The engine's dense caches of a batch of streams."""

    def __init__(self, model: CausalDiT, text: torch.Tensor) -> None:
        config = model.config
        self.model = model
        self.shape = CacheShape(
            config.heads, config.head_dim, config.frame_tokens, CHUNK, config.rope_max_distance, config.rope_split,
            config.rope_theta, torch.device("cpu"), text.dtype,
        )  # fmt: skip
        self.caches: list[list[FrameCache]] = [
            [make_cache(self.shape, DENSE) for _ in text] for _ in range(config.layers)
        ]
        self.cross = [
            StreamsAttendText([TextCache(k, v, t, DENSE) for k, v, t in zip(*layer, text, strict=True)])
            for layer in model.prompt_keys_values(text)
        ]

    def begin(self, start: int) -> None:
        for cache in (cache for layer in self.caches for cache in layer):
            cache.begin(start)

    def step(self, latents: torch.Tensor, sigma: torch.Tensor, *, write: bool = False) -> torch.Tensor:
        probes = [None] * len(latents)
        attend = [StreamsAttend(self.shape, layer, probes, progress=1.0, write=write) for layer in self.caches]
        return self.model(latents, sigma, None, attend, self.cross)


def inputs(config: ModelConfig, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    latents = torch.randn(2, frames, config.latent_channels, config.latent_height, config.latent_width)
    text = torch.randn(2, config.text_tokens, config.text_dim)
    text[1, 3:] = 0  # padding, which Wan does not mask
    return latents, text


def run_theirs(model: WanTransformer3DModel, latents: torch.Tensor, timestep: torch.Tensor,
               text: torch.Tensor) -> torch.Tensor:  # fmt: skip
    return model(latents.transpose(1, 2), timestep, text, return_dict=False)[0].transpose(1, 2)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def test_one_chunk_without_history(pair):
    """Both stock uses: one timestep for all frames."""
    ours, theirs = pair
    assert ours.config.rope_split == (44, 42, 42)
    latents, text = inputs(ours.config, CHUNK)
    sigma = torch.tensor([0.9375, 0.25])
    streams = Streams(ours, text)
    streams.begin(0)
    got = streams.step(latents, sigma[:, None].expand(2, CHUNK))
    assert error(got, run_theirs(theirs, latents, sigma * 1000, text)) < TOLERANCE


def test_a_timestep_for_each_frame(pair):
    ours, theirs = pair
    latents, text = inputs(ours.config, CHUNK)
    sigma = torch.rand(2, CHUNK)
    streams = Streams(ours, text)
    streams.begin(0)
    by_token = (sigma * 1000).repeat_interleave(ours.config.frame_tokens, 1)
    want = run_theirs(theirs, latents, by_token, text)
    assert error(streams.step(latents, sigma), want) < TOLERANCE
    assert error(streams.step(latents, sigma.flip(1)), want) > 1e-2, "this test must not be blind to the timesteps"


def block_causal(chunk_tokens: int):
    """diffusers' self-attention, each chunk seeing itself and what was before."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class BlockCausal(WanAttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            chunk = torch.arange(hidden_states.shape[1]) // chunk_tokens
            return super().__call__(attn, hidden_states, None, chunk[:, None] >= chunk[None], rotary_emb)

    return BlockCausal()


@pytest.mark.parametrize("chunks", [2, 4])
def test_streamed_chunks_are_the_whole_block_causal_sequence(pair, chunks):
    """A noisy chunk over a cache of clean ones = the last chunk of diffusers' [clean, ..., clean, noisy], which counts
    positions from the first frame; and so is what the clean passes give."""
    ours, theirs = pair
    config, frames = ours.config, CHUNK * chunks
    assert frames <= config.rope_max_distance, "no distance is clamped here"
    clean, text = inputs(config, frames)
    noisy = torch.randn_like(clean)
    sigma = torch.rand(2, frames)
    streams = Streams(ours, text)
    usual = [block.attn1.processor for block in theirs.blocks]
    for block in theirs.blocks:
        block.attn1.set_processor(block_causal(CHUNK * config.frame_tokens))
    try:
        for start in range(0, frames, CHUNK):
            here = slice(start, start + CHUNK)
            streams.begin(start)
            passes = ((noisy[:, here], sigma[:, here], False), (clean[:, here], torch.zeros(2, CHUNK), True))
            for latents, level, write in passes:
                whole = torch.cat([clean[:, :start], latents], 1)
                levels = torch.cat([torch.zeros(2, start), level], 1)
                timestep = (levels * 1000).repeat_interleave(config.frame_tokens, 1)
                want = run_theirs(theirs, whole, timestep, text)[:, here]
                got = streams.step(latents, level, write=write)
                assert error(got, want) < TOLERANCE, f"frames {here}, write {write}"
    finally:
        for block, processor in zip(theirs.blocks, usual, strict=True):
            block.attn1.set_processor(processor)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(ModelConfig.wan_1_3b(), 1_418_996_800), (ModelConfig.wan_14b(), 14_288_491_584)],
    ids=["1.3B", "14B"],
)
def test_full_size_names_and_shapes(config, parameters):
    with torch.device("meta"):
        ours, theirs = CausalDiT(config), of_diffusers(config)
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    want = {native(name): value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == want
    assert config.head_dim == 128


def test_defaults_are_wan_1_3b():
    assert ModelConfig() == ModelConfig.wan_1_3b()


def test_a_model_built_on_the_meta_device_has_its_rotary_tables():
    """And does not leave meta tensors in the cache of tables, where models of the same grid would find them."""
    config = SHAPES["14B"].model_copy(update={"latent_width": 22})
    with torch.device("meta"):
        on_meta = CausalDiT(config)
    assert on_meta.head.head.weight.is_meta
    usual = CausalDiT(config)
    for name in ("space_cos", "space_sin"):
        table = getattr(usual, name)
        assert table.device.type == "cpu"
        assert getattr(on_meta, name).equal(table)
