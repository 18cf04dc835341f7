"""Video decoders: streamed equals whole, both equal the published networks, and a stream's state is all there is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_wan import shaken, write_taehv, write_vae
from torch import Tensor, nn
from torch.nn import functional as F

from fastar_backend.errors import WeightsError
from fastar_backend.model.decoder import check_state, load_decoder, pixel_frames, state_bytes
from fastar_backend.model.taehv import TinyDecoder
from fastar_backend.model.wan_vae import MEAN, STD, CausalConv, ChannelNorm, State, WanDecoder, native_name

CHUNKINGS = ([7], [3, 3, 1], [1] * 7, [2, 5])
HEIGHT, WIDTH = 3, 5
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "wan": lambda: WanDecoder(8), "taehv": lambda: TinyDecoder(16),
}  # fmt: skip


@pytest.fixture(params=DECODERS)
def decoder(request) -> nn.Module:
    return shaken(DECODERS[request.param]())


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(7, 16, HEIGHT, WIDTH)


def stream(decoder: nn.Module, latents: Tensor, chunks: list[int]) -> tuple[Tensor, State]:
    state, parts = decoder.state(), []
    for part in latents.split(chunks):
        pixels, state = decoder.decode(part, state)
        parts.append(pixels)
    return torch.cat(parts), state


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


# Laws


@pytest.mark.parametrize("chunks", CHUNKINGS[1:], ids=str)
def test_streamed_is_whole(decoder, latents, chunks):
    whole, end = stream(decoder, latents, [7])
    got, state = stream(decoder, latents, chunks)
    assert whole.shape == (25, 3, 8 * HEIGHT, 8 * WIDTH)
    assert error(got, whole) < 1e-5
    assert all(error(state[name], end[name]) < 1e-5 for name in end)


def test_frames_of_chunks(decoder, latents):
    state = decoder.state()
    for first, count in ((True, 3), (False, 3), (False, 1)):
        pixels, state = decoder.decode(latents[:count], state)
        assert len(pixels) == pixel_frames(count, first) == 4 * count - 3 * first


def test_later_latents_do_not_change_earlier_frames(decoder, latents):
    whole, _ = stream(decoder, latents, [7])
    latents[4:] += 1
    changed, _ = stream(decoder, latents, [7])
    assert error(changed[:13], whole[:13]) < 1e-6
    assert (changed[13:] - whole[13:]).abs().amax((1, 2, 3)).min() > 1e-4


def test_the_first_frames_reach_far(decoder, latents):
    """Memory matters: without it, the chunk would be another."""
    _, state = stream(decoder, latents[:3], [3])
    with_memory, _ = decoder.decode(latents[3:6], state)
    zero, _ = decoder.decode(latents[3:6], {name: torch.zeros_like(value) for name, value in state.items()})
    assert error(zero, with_memory) > 1e-2


def test_an_old_state_can_be_used_again(decoder, latents):
    _, state = stream(decoder, latents[:3], [3])
    before = {name: value.clone() for name, value in state.items()}
    first, new = decoder.decode(latents[3:5], state)
    other, _ = decoder.decode(latents[5:], state)
    again, _ = decoder.decode(latents[3:5], state)
    assert again.equal(first)
    assert not other.equal(first)
    assert all(state[name].equal(before[name]) for name in before)
    assert not {value.data_ptr() for value in new.values()} & {value.data_ptr() for value in state.values()}


def test_a_stored_state_goes_on_with_the_very_same_chunk(decoder, latents):
    _, state = stream(decoder, latents[:4], [3, 1])
    data = safetensors.torch.save({name: value.contiguous() for name, value in state.items()})
    restored = safetensors.torch.load(data)
    check_state(decoder, restored, HEIGHT, WIDTH, torch.float32)
    want, end = decoder.decode(latents[4:], state)
    got, restored_end = decoder.decode(latents[4:], restored)
    assert got.equal(want)
    assert all(restored_end[name].equal(end[name]) for name in end)


# State


@pytest.mark.parametrize("chunks", [[1], [2], [3, 3]], ids=str)
def test_state_is_as_declared_after_any_chunk(decoder, latents, chunks):
    _, state = stream(decoder, latents[: sum(chunks)], chunks)
    assert {name: tuple(value.shape) for name, value in state.items()} == decoder.state_shapes(HEIGHT, WIDTH)
    assert sum(value.nbytes for value in state.values()) == state_bytes(decoder, HEIGHT, WIDTH, torch.float32)
    assert sum(value.untyped_storage().nbytes() for value in state.values()) == sum(v.nbytes for v in state.values())
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in state.values())


@pytest.mark.parametrize(
    ("make", "parameters", "mebibytes"), [(WanDecoder, 73_295_603, 1801), (TinyDecoder, 9_844_611, 64)]
)
def test_published_size_at_480_x_832(make, parameters, mebibytes):
    with torch.device("meta"):
        decoder = make().to(torch.bfloat16)
        state = decoder.decode(torch.empty(3, 16, 60, 104), decoder.state())[1]
        pixels, state = decoder.decode(torch.empty(3, 16, 60, 104), state)
    assert pixels.shape == (12, 3, 480, 832)
    assert pixels.dtype == torch.bfloat16
    assert sum(weight.numel() for weight in decoder.parameters()) == parameters
    nbytes = state_bytes(decoder, 60, 104, torch.bfloat16)
    assert nbytes == sum(value.nbytes for value in state.values())
    assert round(nbytes / 2**20) == mebibytes


def test_states_that_do_not_fit_are_refused(decoder, latents):
    _, state = stream(decoder, latents[:1], [1])
    check_state(decoder, {}, HEIGHT, WIDTH, torch.float32)
    name = next(iter(state))
    with pytest.raises(ValueError, match="1 tensors too many or too few"):
        check_state(decoder, state | {"x": state[name]}, HEIGHT, WIDTH, torch.float32)
    with pytest.raises(ValueError, match=f"{name} is torch.float32 .*, not torch.float32 "):
        check_state(decoder, state, HEIGHT, WIDTH + 1, torch.float32)
    with pytest.raises(ValueError, match=f"{name} is torch.float64 .*, not torch.float32 "):
        check_state(decoder, state | {name: state[name].double()}, HEIGHT, WIDTH, torch.float32)


# Equality with the published networks


@pytest.mark.parametrize(("kernel", "frames"), [(3, 1), (3, 4), (1, 2)])
def test_causal_convolution_is_a_padded_one(kernel, frames):
    conv = shaken(CausalConv(5, 7, kernel, 1))
    conv.name = "it"
    x, after = torch.randn(frames, 5, 3, 4), {}
    pad = kernel // 2
    want = F.conv3d(F.pad(x.transpose(0, 1)[None], (pad, pad, pad, pad, 2, 0)), conv.weight, conv.bias)
    assert error(conv(x, {}, after), want[0].transpose(0, 1)) < 1e-5
    assert after["it"].equal(torch.cat([torch.zeros(2, 5, 3, 4), x])[-2:])


def test_norm_is_exact_for_small_features():
    norm, x = shaken(ChannelNorm(6, 3)), 1e-5 * torch.randn(2, 6, 3, 4)
    x[0, :, 0, 0] = 0
    want = F.normalize(x, dim=1) * 6**0.5 * norm.gamma[..., 0]
    assert error(norm(x), want) < 1e-5


@pytest.fixture(scope="module")
def diffusers_vae() -> nn.Module:
    """AutoencoderKLWan of 8 channels, random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's deprecations
        diffusers = pytest.importorskip("diffusers")
        kind = diffusers.AutoencoderKLWan
    torch.manual_seed(0)
    return shaken(kind(base_dim=8), 1.2)


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=str)
def test_wan_is_what_diffusers_decodes(diffusers_vae, latents, chunks):
    decoder = WanDecoder(8).requires_grad_(False)
    theirs = diffusers_vae.state_dict().items()
    decoder.load_state_dict({native_name(k): v for k, v in theirs if not k.startswith(("encoder.", "quant_conv."))})
    std, mean = (torch.tensor(values)[:, None, None] for values in (STD, MEAN))
    want = diffusers_vae.decode((latents * std + mean).transpose(0, 1)[None]).sample[0].transpose(0, 1)
    assert want.std() > 0.1
    assert (want.abs() == 1).float().mean() < 0.3  # theirs clamps
    assert error(stream(decoder, latents, chunks)[0].clamp(-1, 1), want) < 1e-4


def plain_taehv(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    """Frame by frame, in the published order of layers, memory in a dictionary; [0, 1] pixels, the first three cut."""
    memory: dict[int, Tensor] = {}

    def conv(x: Tensor, name: str) -> Tensor:
        weight = weights[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    def block(x: Tensor, at: int) -> Tensor:
        h = F.relu(conv(torch.cat([x, memory.get(at, torch.zeros_like(x))], 1), f"{at}.conv.0"))
        memory[at] = x
        return F.relu(conv(F.relu(conv(h, f"{at}.conv.2")), f"{at}.conv.4") + x)

    def rest(x: Tensor, at: int) -> list[Tensor]:
        """The frames that a frame becomes from layer `at` on: 3 memory blocks, up-scaling, growth, convolution."""
        if at == 21:
            return [conv(F.relu(x), "22")]
        for index in range(at, at + 3):
            x = block(x, index)
        x = conv(F.interpolate(x, scale_factor=2.0), f"{at + 4}.conv")
        frames = x.chunk(1 if at == 3 else 2, 1)
        return [last for frame in frames for last in rest(conv(frame, str(at + 5)), at + 6)]

    frames = []
    for latent in latents:
        frames += rest(F.relu(conv(3 * torch.tanh(latent[None] / 3), "1")), 3)
    return torch.cat(frames)[3:]


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=str)
def test_taehv_is_the_plain_loop(latents, chunks):
    decoder = shaken(TinyDecoder(16))
    want = 2 * plain_taehv(decoder.state_dict(), 2 * latents) - 1
    assert error(stream(decoder, 2 * latents, chunks)[0], want) < 1e-5


def test_taehv_names_and_shapes_are_the_files():
    """Of taew2_1.pth's decoder, from the public module's source."""
    want = {"1.weight": (256, 16, 3, 3), "1.bias": (256,), "22.weight": (3, 64, 3, 3), "22.bias": (3,)}
    for at, width, grown, out in ((3, 256, 256, 128), (9, 128, 256, 64), (15, 64, 128, 64)):
        for block in range(at, at + 3):
            for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
                want[f"{block}.conv.{layer}.weight"] = (width, inputs, 3, 3)
                want[f"{block}.conv.{layer}.bias"] = (width,)
        want[f"{at + 4}.conv.weight"] = (grown, width, 1, 1)
        want[f"{at + 5}.weight"] = (out, width, 3, 3)
    have = {name: tuple(value.shape) for name, value in TinyDecoder().state_dict().items()}
    assert have == {f"decoder.{name}": shape for name, shape in want.items()}


# Speed and precision


def test_bfloat16_is_close_and_keeps_the_statistics(decoder, latents):
    want, _ = stream(decoder, latents, [3, 4])
    got, state = stream(decoder.to(torch.bfloat16), latents.bfloat16(), [3, 4])
    assert got.dtype == torch.bfloat16
    assert all(value.dtype == torch.bfloat16 for value in state.values())
    assert 0 < error(got.float(), want) < 0.1
    if isinstance(decoder, WanDecoder):
        assert decoder.scale.view(torch.float32).flatten(1).tolist() == torch.tensor([STD, MEAN]).tolist()


@pytest.mark.parametrize("name", ["wan", "taehv"])
def test_a_chunk_is_one_graph(latents, name):
    """fullgraph: a break, a data-dependent branch, is an error; the graph itself is run as it is."""
    decoder = shaken(DECODERS[name]())
    _, state = stream(decoder, latents[:3], [3])
    want, end = decoder.decode(latents[3:], state)
    torch.compiler.reset()
    got, after = torch.compile(decoder.decode, backend="eager", fullgraph=True, dynamic=False)(latents[3:], state)
    torch.compiler.reset()
    assert error(got, want) < 1e-5
    assert all(error(after[key], end[key]) < 1e-5 for key in end)


# Loading


@pytest.mark.parametrize(("kind", "write"), [("wan", write_vae), ("taehv", write_taehv)])
@pytest.mark.parametrize("by", ["file", "folder"])
def test_weights_arrive_unchanged(tmp_path, latents, kind, write, by):
    decoder, path = write(tmp_path)
    loaded = load_decoder(kind, str(path if by == "file" else tmp_path), "cpu", torch.float32)
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert error(stream(loaded, latents, [3, 4])[0], stream(decoder, latents, [3, 4])[0]) < 1e-6
    half = load_decoder(kind, str(path), "cpu", torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("inside", ["", "vae"])
def test_a_diffusers_folder(tmp_path, diffusers_vae, latents, inside):
    diffusers_vae.save_pretrained(tmp_path / inside)
    loaded = load_decoder("wan", str(tmp_path), "cpu", torch.float32)
    std, mean = (torch.tensor(values)[:, None, None] for values in (STD, MEAN))
    want = diffusers_vae.decode((latents * std + mean).transpose(0, 1)[None]).sample[0].transpose(0, 1)
    assert error(stream(loaded, latents, [3, 3, 1])[0].clamp(-1, 1), want) < 1e-4


def test_of_the_hub_the_decoder_only(tmp_path, monkeypatch):
    """At the top of Wan's repositories diffusion_pytorch_model.safetensors is the transformer, of gigabytes."""
    write_vae(tmp_path)
    asked = {}

    def locate(source: str, patterns: tuple[str, ...]) -> Path:
        asked[source] = patterns
        return tmp_path

    monkeypatch.setattr("fastar_backend.model.decoder.locate", locate)
    for source in ("org/name", "org/name:vae"):
        load_decoder("wan", source, "cpu", torch.float32)
        assert "Wan2.1_VAE.pth" in asked[source]
        assert ("diffusion_pytorch_model.safetensors" in asked[source]) == (":" in source)


def damage(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        weights = torch.load(folder / name, weights_only=True)
        change(weights)
        torch.save(weights, folder / name)

    return act


WAN, TINY = "Wan2.1_VAE.pth", "taew2_1.pth"
DAMAGE = {
    "no file": ("wan", "has no Wan2.1_VAE.pth nor diffusion_pytorch_model", lambda f: (f / WAN).unlink()),
    "no tiny file": ("taehv", "has no taew2_1.pth nor taew2_1.safetensors; allowed: ", lambda f: (f / TINY).unlink()),
    "text": ("wan", "cannot read .*Wan2.1_VAE.pth", lambda f: (f / WAN).write_text("hello" * 99)),
    "empty": ("taehv", "cannot read .*taew2_1.pth", lambda f: (f / TINY).write_bytes(b"")),
    "missing": (
        "wan",
        "is no wan decoder: 1 missing, 0 unexpected, 0 of another .*: missing conv2.bias$",
        damage(WAN, lambda w: w.pop("conv2.bias")),
    ),
    "unexpected": (
        "taehv",
        "is no taehv decoder: 0 missing, 1 unexpected, .*: unexpected decoder.99.weight$",
        damage(TINY, lambda w: w.update({"decoder.99.weight": torch.ones(1)})),
    ),
    "shape": (
        "wan",
        r"0 unexpected, 1 of another .*: decoder.conv1.bias is torch.float32 \(3,\), not float \(32,\)$",
        damage(WAN, lambda w: w.update({"decoder.conv1.bias": torch.ones(3)})),
    ),
    "type": (
        "taehv",
        r"1 of another shape or type: decoder.22.bias is torch.int64 \(3,\), not float \(3,\)$",
        damage(TINY, lambda w: w.update({"decoder.22.bias": torch.ones(3, dtype=torch.long)})),
    ),
    "eight are named": (
        "wan",
        "[0-9]{3} missing, 0 unexpected, 0 of another [^;]*: (missing [^;]*; ){7}missing [^;]*$",
        damage(WAN, lambda w: [w.pop(name) for name in list(w) if name.startswith("decoder.")]),
    ),
    "both layouts": (
        "wan",
        "1 unexpected, 0 .*: unexpected decoder.conv_in.bias",
        damage(WAN, lambda w: w.update({"decoder.conv_in.bias": w["decoder.conv1.bias"]})),
    ),
    "the other kind's": ("wan", "is no wan decoder: [0-9]+ missing", lambda f: (f / TINY).rename(f / WAN)),
    "other statistics": (
        "wan",
        "another latents_mean or latents_std; allowed: Wan2.1's",
        lambda f: (f / "config.json").write_text(json.dumps({"latents_mean": [0.0] * 16})),
    ),
    "torn config": ("wan", "cannot read .*config.json", lambda f: (f / "config.json").write_text("{")),
    "config list": ("wan", "cannot read .*config.json", lambda f: (f / "config.json").write_text("[]")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_a_weights_error_of_one_line(tmp_path, name):
    kind, pattern, act = DAMAGE[name]
    write_vae(tmp_path)
    write_taehv(tmp_path)
    act(tmp_path)
    with pytest.raises(WeightsError, match=pattern) as caught:
        load_decoder(kind, str(tmp_path), "cpu", torch.float32)
    assert "\n" not in str(caught.value)


def test_unknown_kind():
    with pytest.raises(WeightsError, match="got 'vhs'; allowed: wan, taehv"):
        load_decoder("vhs", "x", "cpu", torch.float32)
