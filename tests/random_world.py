"""A world with random weights: everything of the real engine, in milliseconds a chunk. See tests/conftest.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fastar_backend.model.autoencoder import FrameAutoencoder
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.text import HashedWords
from fastar_backend.model.world import WorldConfig

CONFIG: dict[str, Any] = {
    "name": "random",
    "native_fps": 17.5,
    "frames_per_latent": 2,
    "buttons": ["forward", "turn_left", "attack"],
    "scenarios": {
        "maze": {"prompt": "a dark maze", "keywords": ["maze", "labyrinth"]},
        "arena": {"prompt": "a round arena", "keywords": ["arena", "round"]},
    },
    "starts": {
        "maze": {"scenario": "maze", "actions": ["", "", "forward", "forward"]},
        "arena": {"scenario": "arena", "actions": ["attack", "turn_left"]},
    },
    "model": {
        "dim": 32,
        "layers": 2,
        "heads": 2,
        "ffn_dim": 48,
        "freq_dim": 16,
        "text_dim": 12,
        "text_tokens": 9,
        "latent_channels": 8,
        "latent_height": 4,
        "latent_width": 6,
        "patch": [1, 1, 1],
        "action_dim": 3,
        "rope_theta": 100.0,
        "rope_max_distance": 3,
        "prediction": "x0",
    },
    "sampler": {
        "steps": [1000.0, 500.0],
        "shift": 3.0,
        "context_noise": 0.1,
        "latent_frames_per_chunk": 2,
        "unit_latents": True,
    },
}


def randomise(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Gives every parameter random values of the size that keeps activations near 1; returns the state dict."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in module.state_dict().items():
        norm = name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight"))
        fan_in = value[0].numel() if value.dim() > 1 else len(value)
        state[name] = torch.randn(value.shape, generator=generator) * fan_in**-0.5 + float(norm)
    module.load_state_dict(state)
    return state


def write(folder: Path, config: dict[str, Any] = CONFIG) -> Path:
    """A world's folder."""
    parsed = WorldConfig.model_validate(config)
    model = parsed.model
    parts = {
        "dit": CausalDiT(model),
        "text": HashedWords(model.text_dim, model.text_tokens),
        "autoencoder": FrameAutoencoder(model.latent_channels, parsed.frames_per_latent),
    }
    state = {
        f"{part}.{key}": value for part, module in parts.items() for key, value in randomise(module, seed=3).items()
    }
    state["text.table.weight"][0] = 0  # the padding
    (folder / "starts").mkdir(parents=True)
    (folder / "world.json").write_text(json.dumps(config))
    save_file(state, folder / "weights.safetensors")
    pixels = np.random.default_rng(4)
    for name, start in parsed.starts.items():
        shape = (parsed.height, parsed.width * parsed.frames_per_latent * len(start.actions), 3)
        Image.fromarray(pixels.integers(0, 256, shape, np.uint8)).save(folder / "starts" / f"{name}.png")
    return folder
