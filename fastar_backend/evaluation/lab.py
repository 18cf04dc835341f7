"""One engine, and what all measurements do with it: open a stream in a scene, tell it true frames, compare videos."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import Stream, StreamOptions
from fastar_backend.evaluation import metrics
from fastar_backend.evaluation.scenes import CONTEXT, Scene, load
from fastar_backend.evaluation.store import Store, Unit
from fastar_backend.evaluation.suites import Settings

STREAM = 1  # the number of the one stream
TWIN = 2  # of its fork
SAMPLED = 4  # one frame in so many is compared by the metrics that cost


class Lab:
    """lpips: of two videos the distance of each frame, or None where there are no weights."""

    def __init__(self, engine: StreamEngine, store: Store, settings: Settings, policies: dict[str, AttentionConfig],
                 lpips: Callable[[np.ndarray, np.ndarray], list[float]] | None = None) -> None:  # fmt: skip
        self.engine, self.store, self.settings, self.policies, self.lpips = engine, store, settings, policies, lpips
        engine.stream_bytes = 1 << 62  # dense attention ends where memory does
        self.seed = 0  # of the stream's noise

    def scene(self, unit: Unit) -> Scene:
        from fastar_backend.evaluation.scenes import scene_name

        return load(self.store.scenes, scene_name(unit.kind, unit.scenario, unit.seed))

    @property
    def chunk_latents(self) -> int:
        return self.engine.shape.chunk_frames

    @property
    def context(self) -> int:
        """Latent frames of true history that a rollout begins from: whole chunks."""
        return -(-CONTEXT // self.chunk_latents) * self.chunk_latents

    def open(self, scene: Scene, policy: str, *, recall: bool = False, start: str = "nothing") -> Stream:
        """The one stream, anew; equal noise for equal scenes."""
        self.engine.close(STREAM)
        self.seed = int.from_bytes(hashlib.sha256(f"{self.settings.seed} {scene.name}".encode()).digest()[:6], "big")
        options = StreamOptions(seed=self.seed, start=start, attention=self.policies[policy], measure_recall=recall)
        self.engine.open(STREAM, scene.prompt, options)
        return self.engine.streams[STREAM]

    def actions(self, names: Sequence[str]) -> Tensor:
        """[1, latent frames, buttons]."""
        vectors = torch.stack([self.engine.world.action_vector(name, "actions") for name in names])
        return vectors[None].to(self.engine.device, self.engine.dtype)

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> Tensor:
        """True frames uint8 [n, frames of a latent one, height, width, 3] -> latents [1, n, C, h, w]."""
        video = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        return self.engine.world.autoencoder.encode(video.to(self.engine.device, self.engine.dtype))[None]

    @torch.inference_mode()
    def tell(self, stream: Stream, latents: Tensor, actions: Tensor, begun: bool = False) -> None:
        """Writes one chunk that the stream did not make: [1, latent frames of a chunk, ...]. begun: after
        `predict`."""
        if not begun:
            stream.begin_chunk()
        self.engine.write([stream], latents, actions)
        stream.latent_frame += self.chunk_latents

    @torch.inference_mode()
    def predict(self, stream: Stream, actions: Tensor) -> tuple[Tensor, np.ndarray]:
        """The next chunk, not yet written: its latents [1, ...] and its frames uint8 [n, height, width, 3]. The noise
        depends on the place in the scene, not on what was drawn before; a decoder that remembers begins anew."""
        stream.noise.manual_seed(self.seed + stream.latent_frame)
        stream.begin_chunk()
        latents, stream.decoded = self.engine.sample([stream], actions), self.engine.world.decoder.state()
        return latents, self.engine.decode([stream], latents)[0].numpy()

    def compare(self, video: np.ndarray, reference: np.ndarray, every: int = SAMPLED) -> dict[str, list[float]]:
        """As far as both go: the squared error of each frame; of every `every`th frame SSIM, FLIP, LPIPS."""
        count = min(len(video), len(reference))
        video, reference = video[:count], reference[:count]
        found = {"squared_error": [round(x, 4) for x in metrics.squared_errors(video, reference).tolist()]}
        some, same = (np.ascontiguousarray(x[every - 1 :: every]) for x in (video, reference))
        costly: dict[str, Callable[[np.ndarray, np.ndarray], list[float]] | None]
        costly = {"ssim": metrics.similarities, "flip": metrics.flips, "lpips": self.lpips}
        found |= {name: rounded(measure(some, same)) for name, measure in costly.items() if measure is not None}
        return found


def rounded(values: Sequence[float], digits: int = 5) -> list[float]:
    return [round(float(value), digits) for value in values]


def flat(frames: np.ndarray) -> np.ndarray:
    """[latent frames, n, height, width, 3] -> [frames, height, width, 3]."""
    return frames.reshape(-1, *frames.shape[2:])


def numbers(stats: Sequence[Any], name: str, digits: int = 5) -> list[float]:
    """One field of the chunks' stats."""
    return rounded([getattr(row, name) for row in stats], digits)
