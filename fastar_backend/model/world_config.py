"""What a world.json says: which model, of what parts, where their weights come from, and what it can show."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fastar_backend.config import Config, ModelConfig, SamplerConfig
from fastar_backend.model.autoencoder import FrameAutoencoder
from fastar_backend.model.decoder import TIME_STRIDE
from fastar_backend.model.wan_vae import CHANNELS


class Scenario(Config):
    prompt: str  # an example that works
    keywords: tuple[str, ...]  # words by which start="auto" recognises it in a prompt


class Start(Config):
    """Real first frames: `<name>.png`, the frames side by side, and the action of each latent frame."""

    scenario: str
    actions: tuple[str, ...]


class Sources(Config):
    """Where weights come from that are not in the folder's weights.safetensors: each a file or folder (relative: to the
    world's folder) or a hub id (org/name, org/name:path/in/repo). See the loaders for the layouts that they know."""

    transformer: str | None = None
    lora: str | None = None  # merged into the transformer
    ema: bool = True  # of a training checkpoint: its running average, if it has one
    text: str | None = None  # umT5's encoder and tokenizer
    release_text: bool = False  # the encoder is in memory only while it works, and read again for every new prompt
    decoder: str | None = None  # the video autoencoder's


class WorldConfig(Config):
    name: str
    native_fps: float = Field(gt=0)
    frames_per_latent: int = Field(gt=0)
    buttons: tuple[str, ...]
    scenarios: dict[str, Scenario]
    starts: dict[str, Start]
    model: ModelConfig
    sampler: SamplerConfig
    text: Literal["words", "umt5"] = "words"
    decoder: Literal["frames", "wan", "taehv"] = "frames"
    dtype: Literal["float32", "bfloat16"] = "float32"  # that it is served in
    sources: Sources = Sources()

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

    @model_validator(mode="after")
    def _parts(self) -> WorldConfig:
        sources = self.sources
        if (self.text == "umt5") != (sources.text is not None):
            raise ValueError('text "umt5" and sources.text go together')
        if (self.decoder != "frames") != (sources.decoder is not None):
            raise ValueError('decoder "wan" or "taehv" and sources.decoder go together')
        if sources.lora and not sources.transformer:
            raise ValueError("sources.lora needs sources.transformer, the base that it is merged into")
        if self.decoder == "frames":
            return self
        if self.starts:
            raise ValueError('starts need the frame autoencoder, decoder "frames": no other encodes')
        if self.frames_per_latent != TIME_STRIDE:
            raise ValueError(f"frames_per_latent must be {TIME_STRIDE} with decoder {self.decoder!r}")
        if self.model.latent_channels != CHANNELS:
            raise ValueError(f"model.latent_channels must be {CHANNELS} with decoder {self.decoder!r}")
        if self.sampler.unit_latents:
            raise ValueError('sampler.unit_latents is for the frame autoencoder, decoder "frames"')
        return self

    @property
    def height(self) -> int:
        return self.model.latent_height * FrameAutoencoder.stride  # which is the Wan family's, too

    @property
    def width(self) -> int:
        return self.model.latent_width * FrameAutoencoder.stride

    @property
    def chunk_frames(self) -> int:
        """Video frames of one chunk; of a Wan-family stream's first one, 3 less."""
        return self.frames_per_latent * self.sampler.latent_frames_per_chunk
