"""Matrix-Game 2.0's world model: the causal transformer, steered by keyboard and mouse, shown one image.

Three things differ from Wan's text-to-video model. The input carries, beside the noisy latents, a mask and the image's
latents. Cross-attention is over the image's CLIP tokens, not over text. The first blocks have an action module between
cross-attention and feed-forward: the mouse's branch attends over time at every position of the picture, the keyboard's
lets the picture attend to the keys pressed. Both look a few latent frames back; what they need of the past is an
`ActionState`, so memory is bounded. Names of parameters are those of the public checkpoints (SkyworkAI/Matrix-Game,
folder Matrix-Game-2) after their prefix "model.".

Which actions a latent frame sees. Video frame t is of latent frame ceil(t / 4), and its action is what is pressed from
frame t to t + 1. Latent frame i sees the actions of video frames 4 i - 12 to 4 i - 1: what leads up to its last
video frame. Before frame 0 the first action counts as held.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fastar_backend.config import Config, ModelConfig
from fastar_backend.errors import InvalidInput
from fastar_backend.model.dit import CausalDiT, CrossAttend, SelfAttend
from fastar_backend.model.layers import rotate_time

BRANCHES = ("keyboard", "mouse")


class ActionConfig(Config):
    """The defaults are the universal model's. GTA: keyboard_dim 2, local_frames 4. Temple Run: keyboard_dim 7,
    mouse_dim 0."""

    keyboard_dim: int = Field(4, ge=0)  # keys, 1 while pressed; 0: no keyboard
    mouse_dim: int = Field(2, ge=0)  # camera speed up, right; 0: no mouse
    blocks: tuple[int, ...] = Field(tuple(range(15)), min_length=1)  # of the transformer, that have a module
    heads: int = Field(16, gt=0)
    embed_dim: int = Field(128, gt=0)  # of the keys of one video frame
    keyboard_hidden_dim: int = Field(1024, gt=0)
    mouse_hidden_dim: int = Field(1024, gt=0)
    frames_per_latent: int = Field(4, gt=0)
    window: int = Field(3, gt=0)  # a latent frame sees the actions of so many latent frames
    local_frames: int = Field(6, gt=0)  # latent frames that a chunk attends to in time, itself included
    rope_dim: int = Field(8, gt=0, multiple_of=2)  # leading head dimensions that are rotated by time
    rope_theta: float = Field(256.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> ActionConfig:
        if not self.action_dim:
            raise ValueError("keyboard_dim or mouse_dim must be positive")
        for branch in self.branches:
            hidden = self.hidden_dim(branch)
            if hidden % self.heads or hidden // self.heads < self.rope_dim:
                raise ValueError(f"{branch}_hidden_dim must be a multiple of heads, a head no smaller than rope_dim")
        return self

    @property
    def action_dim(self) -> int:
        """Numbers an action has: the keys, then the mouse."""
        return self.keyboard_dim + self.mouse_dim

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(branch for branch in BRANCHES if getattr(self, f"{branch}_dim"))

    @property
    def window_frames(self) -> int:
        """Video frames whose actions a latent frame sees."""
        return self.window * self.frames_per_latent

    @property
    def history_frames(self) -> int:
        """Video frames whose actions the next chunk needs of those before."""
        return self.window_frames - self.frames_per_latent + 1

    def hidden_dim(self, branch: str) -> int:
        return self.keyboard_hidden_dim if branch == "keyboard" else self.mouse_hidden_dim


class MatrixGameConfig(ModelConfig):
    """The defaults are the universal model's, 352x640 pixels. `text_dim` and `text_tokens` are those of the image's
    CLIP tokens, which take the prompt's place; `latent_channels` are those that come out. The public models attend
    to `actions.local_frames` latent frames, the chunk included: window attention with so many less a chunk."""

    text_dim: int = Field(1280, gt=0)
    text_tokens: int = Field(257, gt=0)
    latent_height: int = Field(44, gt=0)
    latent_width: int = Field(80, gt=0)
    rope_max_distance: int = Field(3, gt=0)  # of 6 latent frames 3 are the chunk; GTA: 1
    image_channels: int = Field(20, gt=0)  # mask (4), latents of the image (16)
    actions: ActionConfig = ActionConfig()

    @model_validator(mode="after")
    def _modules(self) -> MatrixGameConfig:
        if self.action_dim:
            raise ValueError("action_dim must be 0: actions go to the action modules")
        if sorted(set(self.actions.blocks)) != list(self.actions.blocks) or not (
            0 <= self.actions.blocks[0] <= self.actions.blocks[-1] < self.layers
        ):
            raise ValueError(f"actions.blocks must ascend within 0..{self.layers - 1}")
        return self

    def action_bytes(self, chunk_frames: int, itemsize: int) -> int:
        """What an `ActionState` may hold at most, in bytes."""
        actions, kept = self.actions, max(self.actions.local_frames - chunk_frames, 0)
        rows = {"keyboard": 1, "mouse": self.frame_tokens}
        numbers = sum(2 * kept * rows[branch] * actions.hidden_dim(branch) for branch in actions.branches)
        return itemsize * (len(actions.blocks) * numbers + actions.history_frames * actions.action_dim)


@dataclasses.dataclass(frozen=True)
class ActionState:
    """What the action modules of one stream remember. Nobody writes to the tensors, so forks and snapshots share them.

    tensors: "actions" [video frames, action_dim], the newest; per block with a module "<block>.keyboard.keys" and
    ".values" [latent frames, heads, head_dim], "<block>.mouse.keys" and ".values" [tokens, latent frames, heads,
    head_dim]. Latent frames: the newest `local_frames` less a chunk; 0 at the start. Keys are not rotated.
    """

    tensors: dict[str, Tensor]

    @classmethod
    def empty(cls, config: MatrixGameConfig, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Of a new stream."""
        shapes = cls._shapes(config, 0, 0)
        return cls({name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()})

    @classmethod
    def load(cls, config: MatrixGameConfig, tensors: dict[str, Tensor], like: Tensor) -> Self:
        """From a snapshot, to the device of `like`. Raises ValueError where names, shapes or the type do not fit."""
        if problem := next(iter(cls._shapes(config, 0, 0).keys() ^ tensors.keys()), None):
            raise ValueError(f"{problem} is missing or unknown")
        actions = config.actions
        some = tensors[f"{actions.blocks[0]}.{actions.branches[0]}.keys"]
        latent_frames = min(some.shape[-3], actions.local_frames - 1) if some.ndim > 2 else 0
        want = cls._shapes(config, actions.history_frames if tensors["actions"].numel() else 0, latent_frames)
        for name, value in tensors.items():
            if tuple(value.shape) != want[name] or value.dtype != like.dtype:
                raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, not {like.dtype} {list(want[name])}")
        return cls({name: value.to(like.device) for name, value in tensors.items()})

    @staticmethod
    def _shapes(config: MatrixGameConfig, history: int, latent_frames: int) -> dict[str, tuple[int, ...]]:
        actions = config.actions
        shapes: dict[str, tuple[int, ...]] = {"actions": (history, actions.action_dim)}
        for block in actions.blocks:
            for branch in actions.branches:
                one = (latent_frames, actions.heads, actions.hidden_dim(branch) // actions.heads)
                shape = one if branch == "keyboard" else (config.frame_tokens, *one)
                shapes |= {f"{block}.{branch}.{what}": shape for what in ("keys", "values")}
        return shapes

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.tensors.values())


@dataclasses.dataclass
class Conditions:
    """What steers one pass over a chunk of F latent frames of B streams.

    actions: [B, frames_per_latent * F, action_dim], one per video frame up to the last one of each latent frame (the
    stream's very first latent frame has one video frame: repeat its action). image: [B, F, image_channels, height,
    width]. states: one per stream. write: `forward` replaces `states` by those for the next chunk (the clean pass).
    """

    actions: Tensor
    image: Tensor
    states: list[ActionState]
    write: bool = False


class _HeadNorm(nn.Module):
    """x / rms(x) over a head. The public model has a weight and never multiplies by it: it is loaded, and not used."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, 1e-6).to(x.dtype)


class ActionModule(nn.Module):
    """Adds to x what mouse and keyboard have to say. Parameter names follow the checkpoints, where `mouse_attn_q` is
    the keyboard's."""

    def __init__(self, dim: int, config: ActionConfig) -> None:
        super().__init__()
        self.config = config
        if config.keyboard_dim:
            embed, hidden = config.embed_dim, config.keyboard_hidden_dim
            self.keyboard_embed = nn.Sequential(
                nn.Linear(config.keyboard_dim, embed), nn.SiLU(), nn.Linear(embed, embed)
            )
            self.mouse_attn_q = nn.Linear(dim, hidden, bias=False)
            self.keyboard_attn_kv = nn.Linear(config.window_frames * embed, 2 * hidden, bias=False)
            self.key_attn_q_norm, self.key_attn_k_norm = (_HeadNorm(hidden // config.heads) for _ in range(2))
            self.proj_keyboard = nn.Linear(hidden, dim, bias=False)
        if config.mouse_dim:
            hidden = config.mouse_hidden_dim
            self.mouse_mlp = nn.Sequential(
                nn.Linear(config.window_frames * config.mouse_dim + dim, hidden), nn.GELU(approximate="tanh"),
                nn.Linear(hidden, hidden), nn.LayerNorm(hidden),
            )  # fmt: skip
            self.t_qkv = nn.Linear(hidden, 3 * hidden, bias=False)
            self.img_attn_q_norm, self.img_attn_k_norm = (_HeadNorm(hidden // config.heads) for _ in range(2))
            self.proj_mouse = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, windows: Tensor, past: dict[str, Tensor], seen: Tensor | None = None
                ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """x: [B, F, tokens, dim]; windows: [B, F, window_frames, action_dim], the actions each latent frame sees.
        past: "keyboard.keys", "keyboard.values" [B, n, heads, head_dim] and "mouse.keys", "mouse.values" [B, tokens,
        n, heads, head_dim] of the n latent frames before, as far as there are such branches. seen: bool [B, n + F],
        False where past is only padding. Returns x and `past` with the F frames appended."""
        keys, mouse = windows.split([self.config.keyboard_dim, self.config.mouse_dim], dim=-1)
        now: dict[str, Tensor] = {}
        if self.config.mouse_dim:
            x = x + self._mouse(x, mouse, past, seen, now)
        if self.config.keyboard_dim:
            x = x + self._keyboard(x, keys, past, seen, now)
        return x, now

    def _mouse(self, x: Tensor, mouse: Tensor, past: dict[str, Tensor], seen: Tensor | None, now: dict[str, Tensor]
               ) -> Tensor:  # fmt: skip
        """Attention over time, each token position alone."""
        tokens = x.shape[2]
        x = x.transpose(1, 2)  # [B, tokens, F, dim]
        x = torch.cat([x, mouse.flatten(2)[:, None].expand(-1, tokens, -1, -1)], -1)
        query, key, value = self.t_qkv(self.mouse_mlp(x)).unflatten(-1, (3, self.config.heads, -1)).unbind(-3)
        now["mouse.keys"] = key = torch.cat([past["mouse.keys"], self.img_attn_k_norm(key)], 2)
        now["mouse.values"] = value = torch.cat([past["mouse.values"], value], 2)
        query, key = self._turn(self.img_attn_q_norm(query), key)
        query, key, value = (part.flatten(0, 1).transpose(1, 2) for part in (query, key, value))
        mask = None if seen is None else seen.repeat_interleave(tokens, 0)[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, mask)  # [B * tokens, heads, F, head_dim]
        return self.proj_mouse(out.transpose(1, 2).flatten(2).unflatten(0, (-1, tokens)).transpose(1, 2))

    def _keyboard(self, x: Tensor, keys: Tensor, past: dict[str, Tensor], seen: Tensor | None,
                  now: dict[str, Tensor]) -> Tensor:  # fmt: skip
        """Cross-attention of all tokens to one key and value per latent frame."""
        frames, tokens = x.shape[1:3]
        embedded = self.keyboard_embed(keys).flatten(2)
        key, value = self.keyboard_attn_kv(embedded).unflatten(-1, (2, self.config.heads, -1)).unbind(-3)
        now["keyboard.keys"] = key = torch.cat([past["keyboard.keys"], self.key_attn_k_norm(key)], 1)
        now["keyboard.values"] = value = torch.cat([past["keyboard.values"], value], 1)
        query = self.key_attn_q_norm(self.mouse_attn_q(x).unflatten(-1, (self.config.heads, -1))).transpose(1, 2)
        query, key = self._turn(query, key)
        query = query.transpose(1, 2).flatten(1, 2).transpose(1, 2)  # [B, heads, F * tokens, head_dim]
        mask = None if seen is None else seen[:, None, None]
        out = F.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2), mask)
        return self.proj_keyboard(out.transpose(1, 2).flatten(2).unflatten(1, (frames, tokens)))

    def _turn(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates [..., latent frames, heads, head_dim] in time; the chunk's first frame is at 0. Only distances
        matter to attention, so this is the public model's rotation by absolute time, and has no last frame."""
        config, frames = self.config, query.shape[-3]
        times = torch.arange(frames - key.shape[-3], frames, device=key.device)[:, None]
        span = max(config.local_frames, key.shape[-3])
        key = rotate_time(key, times, config.rope_dim, config.rope_theta, span)
        return rotate_time(query, times[-frames:], config.rope_dim, config.rope_theta, span), key


class _ImageProjection(nn.Module):
    """CLIP tokens [B, tokens, image dim] -> [B, tokens, dim]."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim), nn.Linear(image_dim, image_dim), nn.GELU(), nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(tokens)


class MatrixGameDiT(CausalDiT):
    """`forward` as CausalDiT's, with `Conditions` in the place of actions."""

    config: MatrixGameConfig

    def __init__(self, config: MatrixGameConfig) -> None:
        super().__init__(config)
        del self.text_embedding
        self.img_emb = _ImageProjection(config.text_dim, config.dim)
        channels = config.latent_channels + config.image_channels
        self.patch_embedding = nn.Conv3d(channels, config.dim, config.patch, stride=config.patch)
        for block in config.actions.blocks:
            self.blocks[block].action_model = ActionModule(config.dim, config.actions)

    def prompt_keys_values(self, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """As CausalDiT's; text: the CLIP tokens of the image [B, text_tokens, text_dim]."""
        embedded = self.img_emb(text)
        return [block.cross_attn.key_value(embedded) for block in self.blocks]

    def forward(self, latents: Tensor, sigma: Tensor, actions: Conditions, attend: Sequence[SelfAttend],
                cross: Sequence[CrossAttend]) -> Tensor:  # fmt: skip
        """latents: [B, F, latent_channels, height, width] at noise level sigma [B, F] in 0..1. Returns the flow, of
        the same shape. Raises InvalidInput where the conditions do not fit the latents."""
        self._check(latents, actions)
        config, frames = self.config.actions, latents.shape[1]
        history = torch.stack([
            state.tensors["actions"] if len(state.tensors["actions"]) else new[:1].expand(config.history_frames, -1)
            for state, new in zip(actions.states, actions.actions, strict=True)
        ])  # fmt: skip
        history = torch.cat([history, actions.actions], 1).to(latents.dtype)
        windows = history[:, :-1].unfold(1, config.window_frames, config.frames_per_latent).transpose(2, 3)
        kept = config.local_frames - frames
        # Own storage, here and below: a view would keep the whole batch's alive.
        after = [{"actions": own[-config.history_frames :].clone()} for own in history]
        steer = [
            functools.partial(self._steer, index, windows, actions, kept, after) if index in config.blocks else None
            for index in range(self.config.layers)
        ]
        image = actions.image.to(latents.dtype)
        out = super().forward(torch.cat([latents, image], 2), sigma, None, attend, cross, steer)
        if actions.write:
            actions.states = [ActionState(tensors) for tensors in after]
        return out

    def _steer(self, index: int, windows: Tensor, actions: Conditions, kept: int, after: list[dict[str, Tensor]],
               x: Tensor) -> Tensor:  # fmt: skip
        """The action module of one block on all streams; notes what each stream must remember in `after`."""
        frames = x.shape[1]
        names = [f"{branch}.{what}" for branch in self.config.actions.branches for what in ("keys", "values")]
        held = {name: [state.tensors[f"{index}.{name}"] for state in actions.states] for name in names}
        lengths = [one.shape[-3] for one in held[names[0]]]
        longest = max(lengths)
        past = {
            name: torch.stack([F.pad(one, (0, 0, 0, 0, longest - one.shape[-3], 0)) for one in parts])
            for name, parts in held.items()
        }
        seen = None
        if min(lengths) < longest:  # streams of different age: the younger are padded in front
            age = torch.arange(longest, -frames, -1, device=x.device)  # latent frames before the chunk
            seen = age <= torch.tensor(lengths, device=x.device)[:, None]
        x, now = self.blocks[index].action_model(x, windows, past, seen)
        if actions.write:
            for name, value in now.items():
                for row, length in enumerate(lengths):
                    newest = min(kept, length + frames)
                    after[row][f"{index}.{name}"] = value[row].narrow(-3, value.shape[-3] - newest, newest).clone()
        return x

    def _check(self, latents: Tensor, actions: Conditions) -> None:
        config, (batch, frames) = self.config, latents.shape[:2]
        if frames > config.actions.local_frames:
            raise InvalidInput("latents", f"{frames} frames", f"1..{config.actions.local_frames}, the local attention")
        wanted = {
            "actions": (batch, config.actions.frames_per_latent * frames, config.actions.action_dim),
            "image": (batch, frames, config.image_channels, *latents.shape[3:]),
        }
        for name, shape in wanted.items():
            if (have := tuple(getattr(actions, name).shape)) != shape:
                raise InvalidInput(f"conditions.{name}", f"shape {list(have)}", f"{list(shape)}")
        if len(actions.states) != batch:
            raise InvalidInput("conditions.states", f"{len(actions.states)} of them", f"{batch}, one per stream")
