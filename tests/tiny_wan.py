"""Files of the Wan2.1 family at reduced size, random: checkpoints, umT5 with its tokenizer, video decoders, and a world
made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import random_world
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from fastar_backend.config import ModelConfig
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.taehv import TinyDecoder
from fastar_backend.model.wan_vae import WanDecoder

TEXT_DIM = 20
WORDS = [*"abcdefghijklmnopqrstuvwxyz'\"&.", "maze", "metal", "rooms", "dark", "of", "hall", "grey", "<b>"]
DECODER_FILES = {"wan": "Wan2.1_VAE.pth", "taehv": "taew2_1.pth"}
MODEL: dict[str, Any] = {
    "dim": 36, "layers": 2, "heads": 2, "ffn_dim": 52, "freq_dim": 16, "text_dim": TEXT_DIM, "text_tokens": 11,
    "latent_height": 4, "latent_width": 6,
}  # fmt: skip


def renamed(weights: dict[str, Tensor], pattern: str) -> dict[str, Tensor]:
    return {pattern.format(name): value for name, value in weights.items()}


def shaken(module: nn.Module, gain: float = 1.5) -> nn.Module:
    """Random weights, no two alike, large enough that the input shows in the output."""
    for name, weight in module.named_parameters():
        if name.endswith("gamma"):
            weight.data = 1 + 0.3 * torch.randn_like(weight)
        elif name.endswith("bias"):
            weight.data = 0.1 * torch.randn_like(weight)
        else:
            weight.data = gain * torch.randn_like(weight) / math.sqrt(weight[0].numel())
    return module.eval().requires_grad_(False)


def write_text(folder: Path) -> Path:
    """umT5's encoder and tokenizer, in diffusers' layout."""
    import transformers  # here, as every test process collects files that import this one

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder / "tokenizer")
    torch.manual_seed(31)
    config = transformers.UMT5Config(
        vocab_size=len(vocabulary),
        d_model=TEXT_DIM,
        d_kv=5,
        d_ff=28,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    encoder = transformers.UMT5EncoderModel(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    encoder.save_pretrained(folder / "text_encoder")
    return folder


def write_vae(folder: Path) -> tuple[nn.Module, Path]:
    """As Wan2.1_VAE.pth: both halves in one."""
    decoder, path = shaken(WanDecoder(8)), folder / DECODER_FILES["wan"]
    others = {"encoder.conv1.weight": torch.ones(2), "conv1.weight": torch.ones(3)}
    torch.save(dict(decoder.state_dict()) | others, path)
    return decoder, path


def write_taehv(folder: Path) -> tuple[nn.Module, Path]:
    decoder, path = shaken(TinyDecoder(16)), folder / DECODER_FILES["taehv"]
    torch.save(dict(decoder.state_dict()) | {"encoder.0.weight": torch.ones(2)}, path)
    return decoder, path


def write_transformer(path: Path, model: ModelConfig) -> dict[str, Tensor]:
    """As self_forcing_dmd.pt; returns the weights of its running average."""
    weights, other = (random_world.randomise(CausalDiT(model), seed) for seed in (11, 12))
    torch.save({"generator": renamed(other, "model.{}"), "generator_ema": renamed(weights, "model.{}")}, path)
    return weights


def world_json(decoder: str) -> dict[str, Any]:
    return {
        "name": f"tiny-{decoder}", "native_fps": 16, "frames_per_latent": 4, "buttons": [], "scenarios": {},
        "starts": {}, "model": dict(MODEL), "sampler": {"steps": [1000, 500]}, "text": "umt5", "decoder": decoder,
        "sources": {"transformer": "dmd.pt", "text": "umt5", "decoder": DECODER_FILES[decoder]},
    }  # fmt: skip


def write(folder: Path, decoder: str = "wan") -> Path:
    """A world's folder, all its parts in it: 32x48 pixels, 3 latent frames a chunk."""
    folder.mkdir(parents=True)
    values = world_json(decoder)
    write_transformer(folder / "dmd.pt", ModelConfig.model_validate(values["model"]))
    write_text(folder / "umt5")
    torch.manual_seed(32)
    {"wan": write_vae, "taehv": write_taehv}[decoder](folder)
    (folder / "world.json").write_text(json.dumps(values))
    return folder
