"""A world: a trained model with what it needs to be played (configuration, weights, first frames)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastar_backend.config import Config, ModelConfig, SamplerConfig, parse
from fastar_backend.errors import InvalidInput, WeightsError
from fastar_backend.model.autoencoder import FrameAutoencoder, FrameDecoder
from fastar_backend.model.decoder import Decoder
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.text import HashedWords, words

EMBEDDED = Path(__file__).parent.parent / "worlds"


class Scenario(Config):
    prompt: str  # an example that works
    keywords: tuple[str, ...]  # words by which start="auto" recognises it in a prompt


class Start(Config):
    """Real first frames: `<name>.png`, the frames side by side, and the action of each latent frame."""

    scenario: str
    actions: tuple[str, ...]


class WorldConfig(Config):
    name: str
    native_fps: float = Field(gt=0)
    frames_per_latent: int = Field(gt=0)
    buttons: tuple[str, ...]
    scenarios: dict[str, Scenario]
    starts: dict[str, Start]
    model: ModelConfig
    sampler: SamplerConfig

    @model_validator(mode="after")
    def _consistent(self) -> WorldConfig:
        if self.model.action_dim not in (0, len(self.buttons)):
            raise ValueError(f"model.action_dim must be 0 or the number of buttons, {len(self.buttons)}")
        for name, start in self.starts.items():
            if start.scenario not in self.scenarios:
                raise ValueError(f"starts.{name}.scenario must be one of {', '.join(self.scenarios)}")
            if not start.actions or len(start.actions) % self.sampler.latent_frames_per_chunk:
                raise ValueError(f"starts.{name}.actions must fill whole chunks")
            if unknown := {b for action in start.actions for b in action.split("+") if b} - set(self.buttons):
                raise ValueError(f"starts.{name}.actions has unknown buttons {', '.join(sorted(unknown))}")
        return self

    @property
    def height(self) -> int:
        return self.model.latent_height * FrameAutoencoder.stride

    @property
    def width(self) -> int:
        return self.model.latent_width * FrameAutoencoder.stride

    @property
    def chunk_frames(self) -> int:
        """Video frames of one chunk."""
        return self.frames_per_latent * self.sampler.latent_frames_per_chunk


@dataclasses.dataclass
class World:
    config: WorldConfig
    dit: CausalDiT
    text: Callable[[list[str]], Tensor]  # prompts -> [prompts, text_tokens, text_dim], zero-padded
    decoder: Decoder
    autoencoder: FrameAutoencoder | None  # what encodes the starts
    starts: dict[str, tuple[Tensor, Tensor]]  # name -> latents [n, C, h, w], actions [n, buttons]

    def info(self) -> dict:
        """What a client may want to know; part of the wire protocol (docs/structure.md)."""
        config = self.config
        return {
            "name": config.name, "height": config.height, "width": config.width, "chunk_frames": config.chunk_frames,
            "latent_frames_per_chunk": config.sampler.latent_frames_per_chunk, "buttons": list(config.buttons),
            "starts": list(config.starts), "native_fps": config.native_fps,
            "scenarios": {name: scenario.prompt for name, scenario in config.scenarios.items()},
        }  # fmt: skip

    def action_vector(self, action: str, field: str) -> Tensor:
        """Multi-hot float [buttons] of e.g. "forward+turn_left"; raises InvalidInput naming `field`."""
        vector = torch.zeros(len(self.config.buttons))
        for button in filter(None, action.split("+")):
            if button not in self.config.buttons:
                raise InvalidInput(field, f"unknown button {button!r:.40}", ", ".join(self.config.buttons))
            vector[self.config.buttons.index(button)] = 1
        return vector

    def find_start(self, name: str, prompt: str) -> str | None:
        """The start's name, or None for "nothing". "auto": the scenario most of whose keywords the prompt has."""
        if name == "nothing":
            return None
        if name != "auto":
            if name not in self.starts:
                raise InvalidInput("OPTIONS.start", f"got {name!r:.60}", ", ".join(["auto", "nothing", *self.starts]))
            return name
        said = set(words(prompt))
        hits = {key: len(said & set(value.keywords)) for key, value in self.config.scenarios.items()}
        best = max(hits, key=lambda key: hits[key], default=None)
        if best is None or not hits[best]:
            return None
        return next((key for key, start in self.config.starts.items() if start.scenario == best), None)


def load_world(name: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> World:
    """Loads an embedded world by name, or any by folder: world.json, weights.safetensors, starts/<name>.png.

    Raises WeightsError when something is missing, corrupt or does not fit.
    """
    folder = Path(name) if "/" in name or Path(name).is_dir() else EMBEDDED / name
    if not folder.is_dir():
        known = ", ".join(sorted(path.parent.name for path in EMBEDDED.glob("*/world.json")))
        raise WeightsError(f"world: no folder {folder}; allowed: {known}, or the path of a world's folder")
    try:
        config: WorldConfig = parse(WorldConfig, json.loads((folder / "world.json").read_text()), "world.json")
    except (OSError, ValueError, InvalidInput) as error:
        raise WeightsError(f"world: cannot read {folder / 'world.json'}: {error}") from None
    path = folder / "weights.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"world: cannot read {path}: {error}") from None
    autoencoder = FrameAutoencoder(config.model.latent_channels, config.frames_per_latent)
    world = World(
        config,
        CausalDiT(config.model),
        HashedWords(config.model.text_dim, config.model.text_tokens),
        FrameDecoder(autoencoder),
        autoencoder,
        {},
    )
    for prefix, module in (("dit.", world.dit), ("text.", world.text), ("autoencoder.", world.autoencoder)):
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        _load(module, part, f"{path} ({prefix[:-1]})")
        module.to(device, dtype).eval().requires_grad_(False)
    for start in config.starts:
        world.starts[start] = _load_start(world, folder / "starts" / f"{start}.png", config.starts[start])
    return world


def _load(module: torch.nn.Module, state: dict[str, Tensor], where: str) -> None:
    want = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    have = {key: tuple(value.shape) for key, value in state.items()}
    problems = [f"missing {key}" for key in want.keys() - have.keys()]
    problems += [f"unexpected {key}" for key in have.keys() - want.keys()]
    problems += [
        f"{key} is {have[key]}, not {want[key]}" for key in want.keys() & have.keys() if want[key] != have[key]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8])
        raise WeightsError(f"world: {where} does not fit world.json: {len(problems)} problems: {shown}")
    module.load_state_dict({key: value.float() for key, value in state.items()})


def _load_start(world: World, path: Path, start: Start) -> tuple[Tensor, Tensor]:
    config = world.config
    try:
        with Image.open(path) as image:
            strip = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them Pillow's
        raise WeightsError(f"world: cannot read {path}: {error}") from None
    count = len(start.actions) * config.frames_per_latent
    if strip.shape != (config.height, config.width * count, 3):
        raise WeightsError(f"world: {path} is {strip.shape}, not {(config.height, config.width * count, 3)}")
    frames = strip.reshape(config.height, count, config.width, 3).transpose(1, 0, 2, 3)
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
    weight = next(world.autoencoder.parameters())
    with torch.inference_mode():
        latents = world.autoencoder.encode(video.unflatten(0, (-1, config.frames_per_latent)).to(weight))
    actions = torch.stack([world.action_vector(action, "world.json: starts") for action in start.actions])
    return latents.to(weight), actions.to(weight)
