"""A world: a trained model with what it needs to be played (configuration, weights, first frames)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastar_backend.config import parse
from fastar_backend.errors import InvalidInput, WeightsError
from fastar_backend.model.autoencoder import FrameAutoencoder, FrameDecoder
from fastar_backend.model.checkpoint import load_transformer
from fastar_backend.model.decoder import Decoder, load_decoder
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.text import HashedWords, words
from fastar_backend.model.umt5 import UMT5Text
from fastar_backend.model.world_config import Scenario, Sources, Start, WorldConfig

__all__ = ["Scenario", "Sources", "Start", "World", "WorldConfig", "load_world"]
_Part = TypeVar("_Part", bound=nn.Module)
EMBEDDED = Path(__file__).parent.parent / "worlds"


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
                known = ", ".join(self.config.buttons) or '"" alone, for this world has no buttons'
                raise InvalidInput(field, f"unknown button {button!r:.40}", known)
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


def load_world(name: str, device: torch.device | str, dtype: torch.dtype | None = None) -> World:
    """Loads an embedded world by name, or any by folder: world.json, weights.safetensors (of the parts that its
    `sources` do not name), starts/<name>.png. dtype: None is the world's own.

    Raises WeightsError when something is missing, corrupt, does not fit, or is too large for the device.
    """
    folder = Path(name) if "/" in name or Path(name).is_dir() else EMBEDDED / name
    if not folder.is_dir():
        known = ", ".join(sorted(path.parent.name for path in EMBEDDED.glob("*/world.json")))
        raise WeightsError(f"world: no folder {folder}; allowed: {known}, or the path of a world's folder")
    try:
        config: WorldConfig = parse(WorldConfig, json.loads((folder / "world.json").read_text()), "world.json")
    except (OSError, ValueError, InvalidInput) as error:
        raise WeightsError(f"world: cannot read {folder / 'world.json'}: {error}") from None
    try:
        return _Loader(folder, config, device, dtype or getattr(torch, config.dtype)).world()
    except torch.OutOfMemoryError:
        raise WeightsError(
            f"world: the weights of {config.name} do not fit the free memory of {device}; allowed: a device with more, "
            "or the same with less in its memory"
        ) from None


class _Loader:
    """Each part from its source, or from the folder's weights.safetensors."""

    def __init__(self, folder: Path, config: WorldConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        self.folder, self.config, self.device, self.dtype = folder, config, device, dtype
        self.path = folder / "weights.safetensors"
        self.state: dict[str, Tensor] = {}
        if config.text == "words" or config.decoder == "frames" or not config.sources.transformer:
            try:
                self.state = load_file(self.path)
            except (OSError, SafetensorError, ValueError) as error:
                raise WeightsError(f"world: cannot read {self.path}: {error}") from None

    def world(self) -> World:
        """What is wrong with the small parts is said before the large ones are read."""
        config, autoencoder = self.config, None
        text = self.text()
        if config.decoder == "frames":
            autoencoder = FrameAutoencoder(config.model.latent_channels, config.frames_per_latent)
            self.own(autoencoder, "autoencoder")
            decoder: Decoder = FrameDecoder(autoencoder)
        else:
            decoder = load_decoder(config.decoder, self.source(config.sources.decoder), self.device, self.dtype)
        dit = self.transformer()
        if config.text == "umt5":
            text(["a world"])  # reads the encoder: a wrong one is told now, and its memory is not free any more
        world = World(config, dit, text, decoder, autoencoder, {})
        for start in config.starts:
            world.starts[start] = _load_start(world, self.folder / "starts" / f"{start}.png", config.starts[start])
        return world

    def text(self) -> HashedWords | UMT5Text:
        model, sources = self.config.model, self.config.sources
        if self.config.text == "words":
            return self.own(HashedWords(model.text_dim, model.text_tokens), "text")
        text = UMT5Text(
            self.source(sources.text), model.text_tokens, self.device, self.dtype, release=sources.release_text
        )
        if text.dim != model.text_dim:
            raise WeightsError(
                f"world: {sources.text} makes {text.dim} numbers of a token, and model.text_dim is {model.text_dim}; "
                f"allowed: model.text_dim {text.dim}, or an encoder that fits the transformer"
            )
        return text

    def transformer(self) -> CausalDiT:
        model, sources = self.config.model, self.config.sources
        if not sources.transformer:
            return self.own(CausalDiT(model), "dit")
        lora = self.source(sources.lora) if sources.lora else None
        return load_transformer(
            self.source(sources.transformer), model, device=self.device, dtype=self.dtype, ema=sources.ema, lora=lora
        )

    def own(self, module: _Part, name: str) -> _Part:
        """The part with the weights that the folder has for it."""
        prefix = f"{name}."
        part = {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}
        _fill(module, part, f"{self.path} ({name})")
        return module.to(self.device, self.dtype).eval().requires_grad_(False)

    def source(self, source: str) -> str:
        """A path in the world's folder, whatever the working directory holds; else what may be a hub id."""
        path = self.folder / Path(source).expanduser()
        return str(path) if path.exists() or "/" not in source or source.startswith((".", "/", "~")) else source


def _fill(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
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
