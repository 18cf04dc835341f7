"""Matrix-Game's backbone: streamed chunks are a slow float64 reference of the whole sequence; states; public names."""

from __future__ import annotations

import dataclasses
import math

import pytest
import random_world
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar_backend.attention import CacheShape, TextCache, make_cache
from fastar_backend.attention.batch import StreamsAttend, StreamsAttendText
from fastar_backend.config import AttentionConfig, parse
from fastar_backend.errors import InvalidInput
from fastar_backend.model.matrix_game import ActionConfig, ActionState, Conditions, MatrixGameConfig, MatrixGameDiT

SIGMA = 0.3
KEYBOARD, MOUSE = 4, 2


def model_of(past: int = 3, **values) -> MatrixGameDiT:
    """past: latent frames before the chunk that self-attention sees."""
    actions = {
        "keyboard_dim": KEYBOARD, "mouse_dim": MOUSE, "blocks": [0, 2], "heads": 3, "embed_dim": 5,
        "keyboard_hidden_dim": 24, "mouse_hidden_dim": 36, "rope_dim": 6, "rope_theta": 16.0,
    }  # fmt: skip
    config = MatrixGameConfig.model_validate(
        {
            "dim": 36, "layers": 3, "heads": 2, "ffn_dim": 48, "freq_dim": 16, "text_dim": 12, "text_tokens": 7,
            "latent_channels": 3, "latent_height": 6, "latent_width": 10, "image_channels": 5, "rope_theta": 100.0,
            "rope_max_distance": past, "actions": actions | values,
        }
    )  # fmt: skip
    model = MatrixGameDiT(config).requires_grad_(False)
    random_world.randomise(model, seed=1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight += 1
    return model


@dataclasses.dataclass
class Film:
    """Random inputs of one stream, whole. actions: one per video frame, public numbering: frame 0 first."""

    latents: Tensor  # [frames, channels, height, width]
    image: Tensor
    clip: Tensor
    actions: Tensor

    @classmethod
    def random(cls, config: MatrixGameConfig, frames: int, seed: int) -> Film:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        video = 1 + config.actions.frames_per_latent * (frames - 1)
        picture = (config.latent_height, config.latent_width)
        keys = draw(video, config.actions.keyboard_dim).gt(0).float()
        return cls(
            draw(frames, config.latent_channels, *picture), draw(frames, config.image_channels, *picture),
            draw(config.text_tokens, config.text_dim), torch.cat([keys, draw(video, config.actions.mouse_dim)], 1),
        )  # fmt: skip


class Streams:
    """Films played chunk by chunk, side by side, as an engine would."""

    def __init__(self, model: MatrixGameDiT, films: list[Film], chunk: int, past: int = 3) -> None:
        config = model.config
        self.model, self.films, self.chunk, self.starts = model, films, chunk, [0] * len(films)
        self.dtype = model.head.head.weight.dtype
        self.shape = CacheShape(
            config.heads, config.head_dim, config.frame_tokens, chunk, config.rope_max_distance, config.rope_split,
            config.rope_theta, torch.device("cpu"), self.dtype,
        )  # fmt: skip
        window = AttentionConfig(kind="window", budget_frames=past)
        self.caches = [[make_cache(self.shape, window) for _ in films] for _ in range(config.layers)]
        clip = torch.stack([film.clip for film in films]).to(self.dtype)
        dense = AttentionConfig(kind="dense")
        self.prompts = [
            [TextCache(k[row], v[row], clip[row], dense) for row in range(len(films))]
            for k, v in model.prompt_keys_values(clip)
        ]
        self.states = [ActionState.empty(config, "cpu", self.dtype) for _ in films]

    def step(self, rows: list[int], *, write: bool = True) -> Tensor:
        """The next chunk of the streams `rows`: [rows, chunk, channels, height, width]."""
        each = self.model.config.actions.frames_per_latent
        latents, image, actions = [], [], []
        for row in rows:
            film, start = self.films[row], self.starts[row]
            here = slice(start, start + self.chunk)
            latents.append(film.latents[here])
            image.append(film.image[here])
            last = each * (start + self.chunk - 1) + 1
            actions.append(film.actions[[max(t, 0) for t in range(last - each * self.chunk, last)]])
            for layer in self.caches:
                layer[row].begin(start)
        conditions = Conditions(
            torch.stack(actions), torch.stack(image), [self.states[row] for row in rows], write=write
        )
        attend = [
            StreamsAttend(self.shape, [layer[r] for r in rows], [None] * len(rows), progress=1.0, write=write)
            for layer in self.caches
        ]
        cross = [StreamsAttendText([layer[row] for row in rows]) for layer in self.prompts]
        level = torch.full((len(rows), self.chunk), SIGMA)
        out = self.model(torch.stack(latents).to(self.dtype), level, conditions, attend, cross)
        for row, state in zip(rows, conditions.states, strict=True):
            self.states[row] = state
            self.starts[row] += self.chunk if write else 0
        return out

    def play(self, row: int = 0) -> Tensor:
        """All that is left: [frames, channels, height, width]."""
        frames = len(self.films[row].latents)
        return torch.cat([self.step([row])[0] for _ in range(self.starts[row], frames, self.chunk)])


# The reference: float64, one frame, position and head at a time, from the state dict alone.


def turn(vector: Tensor, position: int, dim: int, theta: float) -> Tensor:
    """Rotates the first `dim` numbers of a vector, in adjacent pairs."""
    out = vector.clone()
    for pair in range(dim // 2):
        angle = position * theta ** (-2 * pair / dim)
        even, odd = vector[2 * pair], vector[2 * pair + 1]
        out[2 * pair] = even * math.cos(angle) - odd * math.sin(angle)
        out[2 * pair + 1] = even * math.sin(angle) + odd * math.cos(angle)
    return out


def unit(vector: Tensor) -> Tensor:
    return vector / (vector.square().mean() + 1e-6).sqrt()


def mix(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    weights = torch.stack([query @ key for key in keys]).div(len(query) ** 0.5).softmax(0)
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


class Reference:
    def __init__(self, model: MatrixGameDiT, chunk: int, past: int) -> None:
        self.config, self.chunk, self.past = model.config, chunk, past
        self.w = {name: value.double() for name, value in model.state_dict().items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def window(self, actions: Tensor, frame: int) -> Tensor:
        """[window_frames, action_dim]: what latent frame `frame` sees of the actions [video frames, action_dim]."""
        config = self.config.actions
        last = config.frames_per_latent * frame
        return actions[[max(t, 0) for t in range(last - config.window_frames, last)]]

    def seen(self, frame: int, reach: int) -> range:
        """Latent frames that attention from `frame` covers: its chunk, and what else is within `reach` of its end."""
        end = (frame // self.chunk + 1) * self.chunk
        return range(max(0, end - reach), end)

    def mouse(self, name: str, x: Tensor, actions: Tensor) -> Tensor:
        config, out = self.config.actions, x.clone()
        dim = config.mouse_hidden_dim // config.heads
        for place in range(x.shape[1]):
            q, k, v = {}, {}, {}
            for frame in range(len(x)):
                moves = self.window(actions, frame)[:, config.keyboard_dim :].flatten()
                h = self.linear(f"{name}.mouse_mlp.0", torch.cat([x[frame, place], moves]))
                h = self.linear(f"{name}.mouse_mlp.2", F.gelu(h, approximate="tanh"))
                h = self.linear(f"{name}.t_qkv", self.norm(f"{name}.mouse_mlp.3", h))
                for head in range(config.heads):
                    parts = [h[(j * config.heads + head) * dim :][:dim] for j in range(3)]
                    rope = (frame, config.rope_dim, config.rope_theta)
                    q[frame, head], k[frame, head] = turn(unit(parts[0]), *rope), turn(unit(parts[1]), *rope)
                    v[frame, head] = parts[2]
            for frame in range(len(x)):
                span = self.seen(frame, config.local_frames)
                heads = [
                    mix(q[frame, head], [k[f, head] for f in span], [v[f, head] for f in span])
                    for head in range(config.heads)
                ]
                out[frame, place] += self.linear(f"{name}.proj_mouse", torch.cat(heads))
        return out

    def keyboard(self, name: str, x: Tensor, actions: Tensor) -> Tensor:
        config, out, k, v = self.config.actions, x.clone(), {}, {}
        dim = config.keyboard_hidden_dim // config.heads
        for frame in range(len(x)):
            keys = self.window(actions, frame)[:, : config.keyboard_dim]
            h = self.linear(f"{name}.keyboard_embed.2", F.silu(self.linear(f"{name}.keyboard_embed.0", keys)))
            h = self.linear(f"{name}.keyboard_attn_kv", h.flatten())
            for head in range(config.heads):
                parts = [h[(j * config.heads + head) * dim :][:dim] for j in range(2)]
                k[frame, head] = turn(unit(parts[0]), frame, config.rope_dim, config.rope_theta)
                v[frame, head] = parts[1]
        for frame in range(len(x)):
            span = self.seen(frame, config.local_frames)
            for place in range(x.shape[1]):
                h, heads = self.linear(f"{name}.mouse_attn_q", x[frame, place]), []
                for head in range(config.heads):
                    q = turn(unit(h[head * dim :][:dim]), frame, config.rope_dim, config.rope_theta)
                    heads.append(mix(q, [k[f, head] for f in span], [v[f, head] for f in span]))
                out[frame, place] += self.linear(f"{name}.proj_keyboard", torch.cat(heads))
        return out

    def qkv(self, name: str, x: Tensor, context: Tensor) -> list[Tensor]:
        """[heads, tokens, head_dim] each; query and key normed over all heads."""
        q, k, v = self.linear(f"{name}.q", x), self.linear(f"{name}.k", context), self.linear(f"{name}.v", context)
        q, k = (
            t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.norm_{part}.weight"]
            for t, part in ((q, "q"), (k, "k"))
        )
        return [t.unflatten(-1, (self.config.heads, -1)).transpose(0, 1) for t in (q, k, v)]

    def place(self, x: Tensor) -> Tensor:
        """Wan's rotary positions: absolute time, row, column; x: [heads, frames * tokens, head_dim]."""
        config, out = self.config, x.clone()
        (rows, columns), split = config.grid, config.rope_split
        for token in range(x.shape[1]):
            frame, rest = divmod(token, rows * columns)
            begin = 0
            for position, dim in zip((frame, *divmod(rest, columns)), split, strict=True):
                for head in range(config.heads):
                    part = slice(begin, begin + dim)
                    out[head, token, part] = turn(x[head, token, part], position, dim, config.rope_theta)
                begin += dim
        return out

    def block(self, index: int, x: Tensor, e: Tensor, clip: Tensor, actions: Tensor) -> Tensor:
        """x: [frames, tokens, dim]; e: [6, dim]."""
        name = f"blocks.{index}"
        e = self.w[f"{name}.modulation"][0] + e
        shape, plain = x.shape, lambda h: F.layer_norm(h, h.shape[-1:], eps=1e-6)
        q, k, v = self.qkv(f"{name}.self_attn", *[(plain(x) * (1 + e[1]) + e[0]).flatten(0, 1)] * 2)
        logits = self.place(q) @ self.place(k).mT / self.config.head_dim**0.5
        for frame in range(shape[0]):
            span = self.seen(frame, self.past + self.chunk)
            tokens = slice(frame * shape[1], (frame + 1) * shape[1])
            logits[:, tokens, : span.start * shape[1]] = -math.inf
            logits[:, tokens, span.stop * shape[1] :] = -math.inf
        h = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + self.linear(f"{name}.self_attn.o", h).view(shape) * e[2]
        q, k, v = self.qkv(f"{name}.cross_attn", self.norm(f"{name}.norm3", x, 1e-6).flatten(0, 1), clip)
        h = ((q @ k.mT / self.config.head_dim**0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + self.linear(f"{name}.cross_attn.o", h).view(shape)
        if index in self.config.actions.blocks:
            if self.config.actions.mouse_dim:
                x = self.mouse(f"{name}.action_model", x, actions)
            if self.config.actions.keyboard_dim:
                x = self.keyboard(f"{name}.action_model", x, actions)
        h = self.linear(f"{name}.ffn.0", plain(x) * (1 + e[4]) + e[3])
        return x + self.linear(f"{name}.ffn.2", F.gelu(h, approximate="tanh")) * e[5]

    def __call__(self, film: Film) -> Tensor:
        config = self.config
        (rows, columns), (_, ph, pw) = config.grid, config.patch
        full = torch.cat([film.latents, film.image], 1).double()
        kernel = self.w["patch_embedding.weight"].flatten(1)
        x = torch.stack([
            torch.stack([
                kernel @ frame[:, r * ph : (r + 1) * ph, c * pw : (c + 1) * pw].flatten()
                for r in range(rows) for c in range(columns)
            ])
            for frame in full
        ]) + self.w["patch_embedding.bias"]  # fmt: skip
        half = config.freq_dim // 2
        angles = 1000 * SIGMA * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        e = F.silu(self.linear("time_embedding.0", torch.cat([angles.cos(), angles.sin()])))
        e = self.linear("time_embedding.2", e)
        e6 = self.linear("time_projection.1", F.silu(e)).view(6, -1)
        clip = self.linear("img_emb.proj.1", self.norm("img_emb.proj.0", film.clip.double()))
        clip = self.norm("img_emb.proj.4", self.linear("img_emb.proj.3", F.gelu(clip)))
        for index in range(config.layers):
            x = self.block(index, x, e6, clip, film.actions.double())
        shift, scale = self.w["head.modulation"][0] + e
        x = self.linear("head.head", F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        out = torch.empty(film.latents.shape, dtype=torch.float64)
        for token in range(rows * columns):
            r, c = divmod(token, columns)
            patch = x[:, token].view(len(x), ph, pw, -1).permute(0, 3, 1, 2)
            out[:, :, r * ph : (r + 1) * ph, c * pw : (c + 1) * pw] = patch
        return out


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("chunk", "past", "changes"),
    [
        (3, 3, {}),
        (3, 1, {"local_frames": 4, "keyboard_dim": 2}),  # GTA's window
        (3, 3, {"keyboard_dim": 7, "mouse_dim": 0}),  # Temple Run
        (2, 3, {"keyboard_dim": 0, "local_frames": 5, "blocks": [1]}),
        (1, 2, {"local_frames": 7, "frames_per_latent": 3, "window": 2}),
        (2, 1, {"local_frames": 2, "frames_per_latent": 1, "window": 1}),  # nothing is kept but one action
    ],
)
def test_streamed_chunks_are_the_whole_sequence(chunk, past, changes):
    model = model_of(past, **changes)
    film = Film.random(model.config, frames=4 * chunk, seed=2)
    got = Streams(model, [film], chunk, past).play()
    assert error(got.double(), Reference(model, chunk, past)(film)) < 1e-4


def test_every_input_matters():
    """What is compared above is not blind: frames before, the image, CLIP tokens, keys and mouse change the output."""
    model = model_of()
    film = Film.random(model.config, frames=6, seed=3)
    want = Streams(model, [film], 3).play()
    for name in ("latents", "image", "clip"):
        other = dataclasses.replace(film, **{name: getattr(film, name).clone()})
        getattr(other, name)[0].neg_()
        assert error(Streams(model, [other], 3).play()[3:], want[3:]) > 1e-3, name
    for column in (0, KEYBOARD - 1, KEYBOARD, KEYBOARD + MOUSE - 1):
        other = dataclasses.replace(film, actions=film.actions.clone())
        other.actions[:, column] += 1
        assert error(Streams(model, [other], 3).play(), want) > 1e-3, column


@pytest.mark.parametrize("column", [0, KEYBOARD])
def test_an_action_changes_nothing_before_the_next_video_frame(column):
    """The action of video frame t first counts in the latent frame of video frame t + 1, in all of its chunk."""
    chunk = 2
    model = model_of()
    film = Film.random(model.config, frames=4 * chunk, seed=4)
    want = Streams(model, [film], chunk).play()
    for t in (7, 8, 11, 12, 15, 19, 20, 23, 24, 28):
        other = dataclasses.replace(film, actions=film.actions.clone())
        other.actions[t:, column] += 1
        got = Streams(model, [other], chunk).play()
        first = t // 4 + 1  # latent frame of video frame t + 1
        unchanged = first // chunk * chunk
        assert got[:unchanged].equal(want[:unchanged]), t
        if first < len(want):
            assert not got[unchanged : unchanged + chunk].allclose(want[unchanged : unchanged + chunk]), t


def test_only_the_clean_pass_is_remembered():
    model = model_of()
    film = Film.random(model.config, frames=6, seed=5)
    streams = Streams(model, [film], 3)
    for _ in range(2):
        before = streams.states[0]
        noisy = streams.step([0], write=False)
        assert streams.states[0] is before
        assert streams.step([0], write=True).equal(noisy)
        assert streams.states[0] is not before


def test_streams_of_any_age_share_a_step():
    model = model_of()
    films = [Film.random(model.config, frames=12, seed=seed) for seed in range(3)]
    alone = [Streams(model, [film], 3).play() for film in films]
    together = Streams(model, films, 3)
    parts: list[list[Tensor]] = [[], [], []]
    for rows in ([0], [1, 0], [2, 1, 0], [0, 2], [1], [2, 1], [2]):
        for row, chunk in zip(rows, together.step(rows), strict=True):
            parts[row].append(chunk)
    for row, want in enumerate(alone):
        assert error(torch.cat(parts[row]), want) < 1e-5, row


def test_forks_and_snapshots_share_and_part():
    model = model_of()
    film = Film.random(model.config, frames=9, seed=6)
    streams = Streams(model, [film], 3)
    streams.step([0])
    state, caches = streams.states[0], [[cache.fork() for cache in layer] for layer in streams.caches]
    kept = {name: value.clone() for name, value in state.tensors.items()}
    want = streams.play()
    assert all(value.equal(kept[name]) for name, value in state.tensors.items()), "nobody writes to a state"
    again = Streams(model, [film], 3)
    again.caches, again.starts = caches, [3]
    again.states = [ActionState.load(model.config, kept, like=model.head.head.weight)]
    assert again.play().equal(want)


@pytest.mark.parametrize("changes", [{}, {"keyboard_dim": 0}, {"mouse_dim": 0}, {"local_frames": 4}])
def test_memory_is_bounded_and_owned(changes):
    model = model_of(**changes)
    films = [Film.random(model.config, frames=18, seed=seed) for seed in (7, 8)]
    streams = Streams(model, films, 3)
    sizes = []
    for _ in range(6):
        streams.step([0, 1])
        tensors = streams.states[0].tensors.values()
        assert sum(value.untyped_storage().nbytes() for value in tensors) == streams.states[0].nbytes
        sizes.append(streams.states[0].nbytes)
    assert sizes[0] > 0
    assert set(sizes[1:]) == {model.config.action_bytes(3, 4)}


def test_states_that_do_not_fit_are_refused():
    model = model_of()
    config, weight = model.config, model.head.head.weight
    streams = Streams(model, [Film.random(config, frames=3, seed=9)], 3)
    fresh = dict(streams.states[0].tensors)
    streams.step([0])
    good = streams.states[0].tensors
    for tensors in (fresh, good):
        loaded = ActionState.load(config, tensors, like=weight)
        assert all(loaded.tensors[name].equal(tensors[name]) for name in tensors)
    damage = {
        "2.mouse.keys is missing": {name: value for name, value in good.items() if name != "2.mouse.keys"},
        "1.mouse.keys is .* unknown": good | {"1.mouse.keys": good["2.mouse.keys"]},
        "actions is": good | {"actions": good["actions"][1:]},
        "0.mouse.values is .*, not": good | {"0.mouse.values": good["0.mouse.values"][:, :2]},
        "2.keyboard.keys is torch.float64": good | {"2.keyboard.keys": good["2.keyboard.keys"].double()},
        "0.* is .*9, 3, .*not .*5, 3, ": {name: torch.cat([value] * 3, -3) if value.ndim > 2 else value
                               for name, value in good.items()},
    }  # fmt: skip
    for pattern, tensors in damage.items():
        with pytest.raises(ValueError, match=pattern):
            ActionState.load(config, tensors, like=weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": torch.zeros(1, 3, 6)}, "conditions.actions: shape [1, 3, 6]; allowed: [1, 12, 6]"),
        ({"actions": torch.zeros(1, 12, 4)}, "conditions.actions: shape [1, 12, 4]; allowed: [1, 12, 6]"),
        ({"image": torch.zeros(1, 3, 4, 6, 10)}, "conditions.image: shape [1, 3, 4, 6, 10]; allowed: [1, 3, 5, 6, 10]"),
        ({"states": []}, "conditions.states: 0 of them; allowed: 1, one per stream"),
        ({"frames": 7}, "latents: 7 frames; allowed: 1..6, the local attention"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(change, message):
    model = model_of()
    state = ActionState.empty(model.config, "cpu", torch.float32)
    latents = torch.zeros(1, change.pop("frames", 3), 3, 6, 10)
    conditions = Conditions(torch.zeros(1, 12, 6), torch.zeros(1, 3, 5, 6, 10), [state])
    with pytest.raises(InvalidInput) as caught:
        model(latents, torch.zeros(latents.shape[:2]), dataclasses.replace(conditions, **change), [], [])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"action_dim": 6}, "model"),
        ({"layers": 14}, "model"),
        ({"actions": {"blocks": [1, 0]}}, "model"),
        ({"actions": {"blocks": []}}, "model.actions.blocks"),
        ({"actions": {"keyboard_dim": 0, "mouse_dim": 0}}, "model.actions"),
        ({"actions": {"heads": 15}}, "model.actions"),
        ({"actions": {"rope_dim": 66}}, "model.actions"),
        ({"actions": {"keys": 4}}, "model.actions.keys"),
    ],
)
def test_bad_config(values, field):
    with pytest.raises(InvalidInput, match="allowed: ") as caught:
        parse(MatrixGameConfig, values, "model")
    assert caught.value.field == field


def test_bfloat16_is_near():
    model = model_of()
    film = Film.random(model.config, frames=9, seed=10)
    want = Streams(model, [film], 3).play()
    half = Streams(model.to(torch.bfloat16), [film], 3)
    assert error(half.play().float(), want) < 0.05
    assert {value.dtype for value in half.states[0].tensors.values()} == {torch.bfloat16}


PUBLIC = {  # parameters of SkyworkAI/Matrix-Game's CausalWanModel, by the configurations in its folder
    "universal": (1_619_242_304, {}),
    "gta_drive": (1_619_238_464, {"keyboard_dim": 2, "local_frames": 4}),
    "templerun": (1_508_715_584, {"keyboard_dim": 7, "mouse_dim": 0}),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_have_as_many_parameters(name):
    count, changes = PUBLIC[name]
    with torch.device("meta"):
        model = MatrixGameDiT(MatrixGameConfig(actions=ActionConfig(**changes)))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.config.frame_tokens == 880


def test_state_dict_names_and_shapes_are_the_public_ones():
    with torch.device("meta"):
        model = MatrixGameDiT(MatrixGameConfig())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    prefix = "blocks.14.action_model."
    assert {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)} == {
        "keyboard_embed.0.weight": (128, 4), "keyboard_embed.0.bias": (128,),
        "keyboard_embed.2.weight": (128, 128), "keyboard_embed.2.bias": (128,),
        "mouse_mlp.0.weight": (1024, 1560), "mouse_mlp.0.bias": (1024,),
        "mouse_mlp.2.weight": (1024, 1024), "mouse_mlp.2.bias": (1024,),
        "mouse_mlp.3.weight": (1024,), "mouse_mlp.3.bias": (1024,),
        "t_qkv.weight": (3072, 1024), "proj_mouse.weight": (1536, 1024),
        "img_attn_q_norm.weight": (64,), "img_attn_k_norm.weight": (64,),
        "key_attn_q_norm.weight": (64,), "key_attn_k_norm.weight": (64,),
        "mouse_attn_q.weight": (1024, 1536), "keyboard_attn_kv.weight": (2048, 1536),
        "proj_keyboard.weight": (1536, 1024),
    }  # fmt: skip
    assert {name: shape for name, shape in shapes.items() if name.startswith("img_emb.")} == {
        "img_emb.proj.0.weight": (1280,), "img_emb.proj.0.bias": (1280,),
        "img_emb.proj.1.weight": (1280, 1280), "img_emb.proj.1.bias": (1280,),
        "img_emb.proj.3.weight": (1536, 1280), "img_emb.proj.3.bias": (1536,),
        "img_emb.proj.4.weight": (1536,), "img_emb.proj.4.bias": (1536,),
    }  # fmt: skip
    assert shapes["patch_embedding.weight"] == (1536, 36, 1, 2, 2)
    assert shapes["head.head.weight"] == (64, 1536)
    assert not [name for name in shapes if name.startswith(("text_embedding", "action_embedding"))]
    assert {name.split(".")[1] for name in shapes if ".action_model." in name} == {str(block) for block in range(15)}
