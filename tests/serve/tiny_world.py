"""A world with random weights: everything of the real engine, in milliseconds a chunk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from fastar_backend.model.autoencoder import FrameAutoencoder
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.text import HashedWords
from fastar_backend.model.world import WorldConfig

CONFIG = {
    "name": "tiny",
    "native_fps": 10.0,
    "frames_per_latent": 2,
    "buttons": ["forward", "turn_left"],
    "scenarios": {"maze": {"prompt": "a maze", "keywords": ["maze"]}},
    "starts": {"maze-1": {"scenario": "maze", "actions": ["", "forward"]}},
    "model": {
        "dim": 48,
        "layers": 2,
        "heads": 2,
        "ffn_dim": 96,
        "freq_dim": 32,
        "text_dim": 32,
        "text_tokens": 16,
        "latent_channels": 8,
        "latent_height": 6,
        "latent_width": 8,
        "action_dim": 2,
    },
    "sampler": {"steps": [1000.0, 500.0], "latent_frames_per_chunk": 2},
}


def write(folder: Path, values: dict = CONFIG) -> Path:
    config = WorldConfig.model_validate(values)
    generator = torch.Generator().manual_seed(1)
    parts = {
        "dit": CausalDiT(config.model),
        "text": HashedWords(config.model.text_dim, config.model.text_tokens),
        "autoencoder": FrameAutoencoder(config.model.latent_channels, config.frames_per_latent),
    }
    state = {
        f"{part}.{key}": torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5
        for part, module in parts.items()
        for key, value in module.state_dict().items()
    }
    (folder / "starts").mkdir(parents=True)
    (folder / "world.json").write_text(json.dumps(values))
    save_file(state, folder / "weights.safetensors")
    for name, start in config.starts.items():
        width = config.width * config.frames_per_latent * len(start.actions)
        pixels = np.random.default_rng(1).integers(0, 256, (config.height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "starts" / f"{name}.png")
    return folder
