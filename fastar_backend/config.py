"""Frozen configuration. Files and requests are parsed into these once, at the edge; derived values are properties."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastar_backend.errors import InvalidInput

SECRET = re.compile(r"://[^/@\s]*@")  # user and password of a URL


class Config(BaseModel):
    """Immutable; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


def parse(kind: type[Config], values: Any, field: str) -> Any:
    """Validate `values` (a dict) as `kind`; raises InvalidInput naming the first offending field under `field`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([field, *(str(part) for part in first["loc"])])
        for part in first["loc"][:-1]:  # into nested settings
            inner = kind.model_fields[part].annotation if part in kind.model_fields else None
            kind = inner if isinstance(inner, type) and issubclass(inner, Config) else kind
        known = ", ".join(sorted(kind.model_fields))
        allowed = (
            f"one of {known}" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        )
        given = SECRET.sub("://***@", repr(first["input"]))  # also settings as a whole, where they do not go together
        raise InvalidInput(path, f"got {given:.80}", allowed) from None


class ModelConfig(Config):
    """Shape of a causal video diffusion transformer. The defaults are Wan2.1-1.3B's (480x832: latent 60x104)."""

    dim: int = Field(1536, gt=0)
    layers: int = Field(30, gt=0)
    heads: int = Field(12, gt=0)
    ffn_dim: int = Field(8960, gt=0)
    freq_dim: int = Field(256, gt=0)
    text_dim: int = Field(4096, gt=0)
    text_tokens: int = Field(512, gt=0)  # prompts are zero-padded to this length and, as in Wan, not masked
    latent_channels: int = Field(16, gt=0)
    latent_height: int = Field(60, gt=0)
    latent_width: int = Field(104, gt=0)
    patch: tuple[int, int, int] = (1, 2, 2)
    action_dim: int = Field(0, ge=0)  # 0: no action conditioning
    eps: float = 1e-6
    rope_theta: float = 10000.0
    # Temporal distance is clamped here (latent frames), so that no position beyond the trained ones ever occurs.
    rope_max_distance: int = Field(18, gt=0)
    prediction: Literal["flow", "x0"] = "flow"

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        if self.dim % self.heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError("dim must be a multiple of heads, and the head dimension even and at least 6")
        if self.patch[0] != 1 or min(self.patch) < 1:
            raise ValueError(f"patch must be (1, height, width), and is {self.patch}")
        for name, step in (("latent_height", self.patch[1]), ("latent_width", self.patch[2])):
            if (size := getattr(self, name)) % step:
                below = size // step * step
                fit = f"{below} or {below + step}" if below else f"{step}"
                raise ValueError(f"{name} must be a multiple of the patch's {step}: {fit}, not {size}")
        return self

    @classmethod
    def wan_1_3b(cls, **changes: Any) -> ModelConfig:
        """Wan2.1-T2V-1.3B and what was distilled from it (Self-Forcing, Rolling-Forcing, LongLive), 480x832."""
        return cls.model_validate({"dim": 1536, "layers": 30, "heads": 12, "ffn_dim": 8960} | changes)

    @classmethod
    def wan_14b(cls, **changes: Any) -> ModelConfig:
        """Wan2.1-T2V-14B, 480x832."""
        return cls.model_validate({"dim": 5120, "layers": 40, "heads": 40, "ffn_dim": 13824} | changes)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of one latent frame."""
        return self.latent_height // self.patch[1], self.latent_width // self.patch[2]

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def rope_split(self) -> tuple[int, int, int]:
        """Head dimensions rotated by time, height, width (Wan: 44, 42, 42 of 128)."""
        spatial = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * spatial, spatial, spatial


class SamplerConfig(Config):
    """Few-step flow matching: sigmas visited from noise to data, and the noise level of the cached clean pass."""

    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)  # of 1000, before the shift
    shift: float = Field(5.0, gt=0)
    context_noise: float = Field(0.0, ge=0, lt=1)  # sigma of the pass that writes the cache (0: the clean t=0 pass)
    latent_frames_per_chunk: int = Field(3, gt=0)
    unit_latents: bool = False  # the autoencoder's latents have unit rms per token: project predictions onto that

    @property
    def sigmas(self) -> tuple[float, ...]:
        """sigma' = shift s / (1 + (shift - 1) s), s = step / 1000 (method of Wan and Self-Forcing)."""
        return tuple(self.shift * s / (1 + (self.shift - 1) * s) for s in (t / 1000 for t in self.steps))


class BaselineConfig(Config):
    """The baselines' parameters, with the values of their papers and public code (attention/baselines/,
    engine/reuse.py)."""

    dense_layers: int = Field(1, ge=0)  # first layers that stay dense (radial, svg1, svg2); and see `dense_steps`
    block: int = Field(128, ge=1, le=4096)  # tokens, of a frame of 1560; in proportion in smaller ones (radial, svg1)
    radial_decay: float = Field(0.2, gt=0)  # of the window's width
    svg1_share: float = Field(0.3, gt=0, le=1)  # of the keys that a head attends to
    svg1_rows: int = Field(64, ge=1)  # queries of a chunk whose dense output decides what kind a head is
    svg2_query_clusters: int = Field(300, ge=1)
    svg2_key_clusters: int = Field(1000, ge=1)
    svg2_top_p: float = Field(0.9, ge=0, le=1)  # attention between centroids that is kept
    svg2_least: float = Field(0.1, ge=0, le=1)  # share of the key clusters that is kept in any case
    svg2_first_rounds: int = Field(50, ge=1)  # of k-means, from nothing; then from the last pass's centroids:
    svg2_rounds: int = Field(2, ge=1)
    flowcache_mix: float = Field(0.07, ge=0, le=1)  # weight of a token's importance; the rest is its redundancy's
    # Outputs are reused while the input's relative L1 changes since the last pass computed add up to less than this.
    flowcache_change: float = Field(0.015, ge=0)
    teacache_change: float = Field(0.08, ge=0)
    reuse_warm_up: int = Field(5, ge=1)  # first passes of a chunk that are always computed; the last one is, too


class AttentionConfig(Config):
    """What a query may attend to. The defaults are what measured best on the embedded world (docs/decisions.md);
    `paper_recipe` is the published one."""

    # dense, radial, svg1, svg2: the whole history, without a bound. With a `sparse_density`, dense is AnnSA over it.
    kind: Literal["dense", "window", "fastar", "radial", "svg1", "svg2", "flowcache"] = "fastar"
    # Hard cap of cached tokens per stream, layer and head, in latent frames' worth of tokens (the other kinds).
    budget_frames: int = Field(12, ge=1, le=4096)
    sink_frames: int = Field(0, ge=0, le=64)  # first latent frames, never dropped nor merged
    recent_frames: int = Field(6, ge=1, le=4096)  # newest latent frames, never dropped nor merged (fastar)
    # TempCache
    merge_threshold: float = Field(0.95, ge=-1, le=1)  # cosine of two keys above which they are one group
    merge_early: bool = False  # also while the memory has room for a whole frame: nothing would have to be merged yet
    representative: Literal["last", "mean"] = "last"
    weight: Literal["count", "effective", "none"] = "count"  # log of it is the group's logit bias
    match: Literal["key", "query"] = "key"  # what looks for its group: the new keys (ours) or the queries (paper)
    # Tokens and groups beyond the budget go into the nearest group if the keys' cosine is above; else they are lost. 1:
    # all are; -1: none.
    fold_threshold: float = Field(0.7, ge=-1, le=1)
    index: Literal["exact", "lsh", "quantised"] = "quantised"
    index_bits: int = Field(8, ge=1, le=16)  # LSH: sign bits a table
    index_tables: int = Field(4, ge=1, le=32)
    # AnnSA: share of cached keys that a block of queries attends to; 1 = off
    sparse_density: float = Field(1.0, gt=0, le=1)
    sparse_block: int = Field(48, ge=1, le=4096)  # queries that share one selection
    sparse_order: Literal["place", "bucket"] = "place"  # those near each other in the picture, or of like content
    dense_steps: float = Field(0.3, ge=0, le=1)  # first share of the denoising steps that stays dense
    # The quality guard: AnnSA's recall is sampled in every chunk (observe); the density is moved so that it stays above
    # the floor, and not far above (hold; sparse_density is then where that begins).
    guard: Literal["off", "observe", "hold"] = "off"
    recall_floor: float = Field(0.95, ge=0, le=1)
    # AnnCA. Off: equal prompt tokens are folded all the same, which is exact.
    select_text: bool = False
    # Share of its attention to the prompt that a head's kept tokens hold at least; the others become one group. None,
    # and always with the index lsh: the paper's bucket test.
    text_mass: float | None = Field(0.95, gt=0, le=1)
    # Denoising passes whose output is taken from an earlier one (TeaCache, FlowCache; not of fastar nor window).
    reuse: Literal["off", "teacache", "flowcache"] = "off"
    baseline: BaselineConfig = BaselineConfig()

    @classmethod
    def paper_recipe(cls, budget_frames: int, chunk_frames: int) -> AttentionConfig:
        """Section on TempCache: the last chunk whole, correspondence by the queries, cosine threshold .9, the last
        key as representative, log-count bias; AnnSA at the paper's density of 28 % after 30 % of the steps; AnnCA by
        buckets. The hard budget is ours: the paper has none."""
        return cls(
            budget_frames=budget_frames, recent_frames=chunk_frames, merge_threshold=0.9, representative="last",
            weight="count", match="query", fold_threshold=1.0, merge_early=True, index="quantised", sparse_density=0.28,
            dense_steps=0.3, sparse_order="bucket", select_text=True, text_mass=None,
        )  # fmt: skip

    @model_validator(mode="after")
    def _budget(self) -> AttentionConfig:
        if self.bounded and self.sink_frames + 1 > self.budget_frames:
            raise ValueError("budget_frames must exceed sink_frames")
        if self.kind == "fastar" and self.sink_frames + self.recent_frames > self.budget_frames:
            raise ValueError("budget_frames must hold sink_frames + recent_frames")
        if self.kind != "fastar" and self.guard != "off":
            raise ValueError(f"guard must be off where kind is {self.kind}: it watches fastar's AnnSA")
        if self.kind in ("fastar", "window") and self.reuse != "off":
            raise ValueError(f"reuse must be off where kind is {self.kind}: got {self.reuse}")
        return self

    @property
    def bounded(self) -> bool:
        """Whether a stream's memory has a budget."""
        return self.kind in ("window", "fastar", "flowcache")


class ExecutionConfig(Config):
    """How the transformer of a world is run. The defaults change no number beyond rounding."""

    precision: Literal["auto", "fp8"] = "auto"  # auto: the world's own; fp8: its blocks' linear layers in e4m3
    # The decoder (and blocks in fp8) by torch.compile, chunks as CUDA graphs; None ("auto"): on a GPU, in half
    # precision.
    compile: bool | None = None
    # What computes the transformer's passes: PyTorch, or the engine in `engine_dir` (`fastar engine build`).
    runtime: Literal["torch", "tensorrt"] = "torch"
    engine_dir: Path | None = None

    @field_validator("compile", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @field_validator("engine_dir", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="after")
    def _engine(self) -> ExecutionConfig:
        if (self.runtime == "tensorrt") != (self.engine_dir is not None):
            raise ValueError("runtime tensorrt and engine_dir, the folder of its engine, go together")
        if self.runtime == "tensorrt" and self.precision != "auto":
            raise ValueError(f"precision must be auto where runtime is tensorrt, and is {self.precision}")
        return self
