"""Worlds whose parts come from checkpoints of the Wan2.1 family: what fits is loaded, what does not is told in one
line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_world
import tiny_wan
import torch
from safetensors.torch import save_file

from fastar_backend.config import ModelConfig
from fastar_backend.errors import InvalidInput, WeightsError
from fastar_backend.model import world as module
from fastar_backend.model.decoder import load_decoder
from fastar_backend.model.text import HashedWords, tokenise
from fastar_backend.model.umt5 import UMT5Text
from fastar_backend.model.world import EMBEDDED, WorldConfig, load_world

PRESETS = ("self-forcing", "self-forcing-taehv", "longlive")


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory) -> Path:
    """Read-only."""
    return tiny_wan.write(tmp_path_factory.mktemp("wan") / "wan")


@pytest.fixture
def folder(wan_folder, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(wan_folder, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "world.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# What is loaded


@pytest.mark.parametrize("ema", [True, False])
def test_every_part_is_its_files(folder, ema):
    edit(folder, lambda v: v["sources"].update(ema=ema))
    world = load_world(str(folder), "cpu")
    file = torch.load(folder / "dmd.pt", weights_only=True)["generator_ema" if ema else "generator"]
    for name, value in world.dit.state_dict().items():
        assert value.equal(file[f"model.{name}"]), name
    assert world.text(["a maze"]).equal(UMT5Text(str(folder / "umt5"), 11)(["a maze"]))
    latents = torch.randn(3, 16, 4, 6)
    decoder = load_decoder("wan", str(folder / "Wan2.1_VAE.pth"), "cpu", torch.float32)
    assert world.decoder.decode(latents, {})[0].equal(decoder.decode(latents, {})[0])
    assert (world.autoencoder, world.starts) == (None, {})
    assert not any(parameter.requires_grad for parameter in world.dit.parameters())


def test_info_and_actions(wan_folder):
    world = load_world(str(wan_folder), "cpu")
    info = world.info()
    assert json.loads(json.dumps(info)) == info
    assert (info["height"], info["width"], info["chunk_frames"], info["latent_frames_per_chunk"]) == (32, 48, 12, 3)
    assert info["buttons"] == info["starts"] == []
    assert info["scenarios"] == {}
    assert world.action_vector("", "f").shape == (0,)
    with pytest.raises(InvalidInput, match='^f: unknown button .jump.; allowed: "" alone, for this world has no butt'):
        world.action_vector("jump", "f")
    assert world.find_start("auto", "a maze") is None
    assert world.find_start("nothing", "a maze") is None
    with pytest.raises(InvalidInput, match="OPTIONS.start: got 'maze'; allowed: auto, nothing$"):
        world.find_start("maze", "a maze")


@pytest.mark.parametrize(("own", "asked"), [("bfloat16", None), ("float32", torch.bfloat16), ("float32", None)])
def test_the_type_is_the_worlds_own_unless_asked(folder, own, asked):
    edit(folder, lambda v: v.update(dtype=own))
    world = load_world(str(folder), "cpu", asked)
    want = asked or getattr(torch, own)
    assert {weight.dtype for part in (world.dit, world.decoder) for weight in part.parameters()} == {want}
    assert world.text(["a maze"]).dtype == want


def test_embedded_worlds_are_in_float32(doom_world):
    assert (doom_world.config.dtype, doom_world.config.text, doom_world.config.decoder) == (
        "float32",
        "words",
        "frames",
    )
    assert doom_world.dit.head.head.weight.dtype == torch.float32


@pytest.mark.parametrize("release", [True, False])
def test_the_encoder_is_read_at_once(folder, release):
    edit(folder, lambda v: v["sources"].update(release_text=release))
    text = load_world(str(folder), "cpu").text
    assert (text._encoder is None) == release
    assert list(text._known) == ["a world"]


def test_a_part_without_a_source_is_in_the_folders_weights(folder):
    """Here the words; the transformer has its source, and is not looked for."""
    edit(folder, lambda v: (v.update(text="words"), v["sources"].pop("text")))
    table = random_world.randomise(HashedWords(20, 11), seed=5)["table.weight"]
    save_file({"text.table.weight": table}, folder / "weights.safetensors")
    world = load_world(str(folder), "cpu")
    assert world.text(["a maze"])[0, :2].equal(table[tokenise("a maze", 11)])


def test_a_lora_is_merged(folder):
    base = load_world(str(folder), "cpu").dit.state_dict()
    a, b = torch.randn(3, 36), torch.randn(36, 3)
    pair = {"blocks.1.self_attn.k.lora_A.weight": a, "blocks.1.self_attn.k.lora_B.weight": b}
    save_file(pair, folder / "lora.safetensors")
    edit(folder, lambda v: v["sources"].update(lora="lora.safetensors"))
    for name, value in load_world(str(folder), "cpu").dit.state_dict().items():
        want = base[name] + b @ a if name == "blocks.1.self_attn.k.weight" else base[name]
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5)


def test_relative_sources_are_the_folders(folder, tmp_path, monkeypatch):
    """Whatever is in the working directory. What looks like a hub id and is not there may be one."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_transformer", lambda source, *_, **more: asked.append((source, more["lora"])))
    (tmp_path / "dmd.pt").write_text("not this one")
    (tmp_path / "stray.pt").write_text("nor this")
    for source, lora in (("dmd.pt", None), ("stray.pt", "./stray.pt"), ("org/name:dmd.pt", "org/name")):
        edit(folder, lambda v, source=source, lora=lora: v["sources"].update(transformer=source, lora=lora))
        load_world(str(folder), "cpu")
    inside = [str(folder / "dmd.pt"), str(folder / "stray.pt")]
    assert asked == [(inside[0], None), (inside[1], inside[1]), ("org/name:dmd.pt", "org/name")]


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = WorldConfig.model_validate_json((EMBEDDED / name / "world.json").read_text())
    assert config.name == name
    assert config.model == ModelConfig.wan_1_3b()
    assert [round(1000 * sigma, 1) for sigma in config.sampler.sigmas] == [1000, 937.5, 833.3, 625]
    assert (config.height, config.width, config.chunk_frames, config.native_fps) == (480, 832, 12, 16)
    assert (config.text, config.dtype, config.buttons) == ("umt5", "bfloat16", ())
    assert (config.sources.lora is not None) == (name == "longlive")
    assert config.decoder == ("taehv" if name.endswith("taehv") else "wan")


# What does not fit


def set_source(key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda v: v["sources"].update({key: value}))


def set_value(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda v: v.update(values))


def set_model(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda v: v["model"].update(values))


ONE_START = {"starts": {"a": {"scenario": "s", "actions": ["", "", ""]}}}
ONE_START["scenarios"] = {"s": {"prompt": "a maze", "keywords": ["maze"]}}
WRONG = {
    "umt5 without source": (set_source("text", None), 'text "umt5" and sources.text go together'),
    "words with source": (set_value(text="words"), 'text "umt5" and sources.text go together'),
    "decoder without source": (set_source("decoder", None), 'decoder "wan" or "taehv" and sources.decoder go together'),
    "source without decoder": (set_value(decoder="frames"), 'decoder "wan" or "taehv" and sources.decoder go'),
    "unknown decoder": (set_value(decoder="vhs"), r"world.json.decoder: got 'vhs'; allowed: .*'frames', 'wan'"),
    "unknown text": (set_value(text="clip"), "world.json.text: got 'clip'; allowed: .*'words' or 'umt5'"),
    "unknown type": (set_value(dtype="float16"), "world.json.dtype: got 'float16'; allowed: .*bfloat16"),
    "unknown source": (set_source("vae", "x"), "sources.vae: got 'x'; allowed: one of .*"),
    "frames of a latent": (set_value(frames_per_latent=2), "frames_per_latent must be 4 with decoder 'wan'"),
    "channels": (set_model(latent_channels=8), "model.latent_channels must be 16 with decoder 'wan'"),
    "starts": (set_value(**ONE_START), 'allowed: starts need the frame autoencoder, decoder "frames"'),
    "unit latents": (set_value(sampler={"unit_latents": True}), "sampler.unit_latents is for the frame autoencoder"),
    "odd height": (
        set_model(latent_height=5),
        "allowed: latent_height must be a multiple of the patch's 2: 4 or 6",
    ),
    "odd width": (set_model(latent_width=1), "allowed: latent_width must be a multiple of the patch's 2: 2, not 1"),
    "temporal patch": (set_model(patch=[2, 2, 2]), r"allowed: patch must be \(1, height, width\), and is \(2, 2, 2\)"),
    "lora without base": (
        lambda folder: (set_source("transformer", None)(folder), set_source("lora", "lora.pt")(folder)),
        "sources.lora needs sources.transformer, the base",
    ),
    "no transformer at all": (set_source("transformer", None), "cannot read .*weights.safetensors: "),
    "no checkpoint": (lambda f: (f / "dmd.pt").unlink(), "^weights: .*dmd.pt does not exist; allowed: a local file"),
    "torn checkpoint": (lambda f: (f / "dmd.pt").write_bytes(b"PK"), "^weights: cannot read .*dmd.pt"),
    "another model's checkpoint": (
        set_model(layers=3),
        "^weights: .*dmd.pt does not fit the .*: 27 missing",
    ),
    "no lora": (set_source("lora", "lora.pt"), "^weights: .*lora.pt does not exist"),
    "no vae": (lambda f: (f / "Wan2.1_VAE.pth").unlink(), "^weights: .*Wan2.1_VAE.pth does not exist"),
    "wrong vae": (
        lambda f: tiny_wan.write_taehv(f)[1].rename(f / "Wan2.1_VAE.pth"),
        "Wan2.1_VAE.pth is no wan decoder",
    ),
    "the other decoder": (set_value(decoder="taehv"), "Wan2.1_VAE.pth is no taehv decoder: "),
    "no text folder": (lambda f: shutil.rmtree(f / "umt5"), "^weights: .*umt5 does not exist"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "umt5" / "tokenizer"), "^text: cannot read .*umt5 "),
    "torn encoder": (
        lambda f: (f / "umt5" / "text_encoder" / "model.safetensors").write_bytes(b"\0" * 64),
        "^text: cannot read .*umt5 ",
    ),
    "text of another width": (
        set_model(text_dim=24),
        "^world: umt5 makes 20 numbers of a token, and model.text_dim is 24; allowed: model.text_dim 20, or an encoder",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_told_in_a_line(folder, name):
    damage, pattern = WRONG[name]
    damage(folder)
    with pytest.raises(WeightsError, match=pattern) as caught:
        load_world(str(folder), "cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_small_parts_are_checked_before_large_ones_are_read(folder, monkeypatch):
    def read(*_: object, **__: object) -> None:
        raise AssertionError("gigabytes")

    monkeypatch.setattr(module, "load_transformer", read)
    monkeypatch.setattr(UMT5Text, "_load", read)
    (folder / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(WeightsError, match="Wan2.1_VAE.pth does not exist"):
        load_world(str(folder), "cpu")
    set_model(text_dim=24)(folder)
    with pytest.raises(WeightsError, match="text_dim is 24"):
        load_world(str(folder), "cpu")


def test_weights_too_large_for_the_device(folder, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nGPU 0 has")

    monkeypatch.setattr(module, "load_transformer", full)
    with pytest.raises(WeightsError, match="^world: the weights of tiny-wan do not fit the free memory of cpu; "):
        load_world(str(folder), "cpu")
