"""Loading worlds: what fits is loaded as it was saved, and what does not is a WeightsError that names the file."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import random_world
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastar_backend.errors import InvalidInput, WeightsError
from fastar_backend.model.world import World, load_world


@pytest.fixture
def folder(tiny_world, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_world, tmp_path / "copy"))


def edit_json(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "world.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "weights.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(data)


def half_size(path: Path) -> None:
    image = Image.open(path)
    image.resize((image.width // 2, image.height)).save(path)


DAMAGE = {
    "no world.json": ("world.json", lambda f: (f / "world.json").unlink()),
    "not json": ("world.json", lambda f: (f / "world.json").write_text("{")),
    "binary json": ("world.json", lambda f: (f / "world.json").write_bytes(b"\xff\xfe\x00")),
    "json list": ("world.json", lambda f: (f / "world.json").write_text("[]")),
    "missing field": ("world.json", lambda f: edit_json(f, lambda v: v.pop("buttons"))),
    "unknown field": ("world.json", lambda f: edit_json(f, lambda v: v.update(colour="red"))),
    "bad dim": ("world.json", lambda f: edit_json(f, lambda v: v["model"].update(dim=33))),
    "buttons unlike the model": ("world.json", lambda f: edit_json(f, lambda v: v["buttons"].append("jump"))),
    "start of no scenario": ("world.json", lambda f: edit_json(f, lambda v: v["starts"]["maze"].update(scenario="x"))),
    "start of half a chunk": ("world.json", lambda f: edit_json(f, lambda v: v["starts"]["maze"]["actions"].pop())),
    "start without frames": ("world.json", lambda f: edit_json(f, lambda v: v["starts"]["maze"].update(actions=[]))),
    "start with odd buttons": (
        "world.json",
        lambda f: edit_json(f, lambda v: v["starts"]["arena"].update(actions=["fly", ""])),
    ),
    "no weights": ("weights.safetensors", lambda f: (f / "weights.safetensors").unlink()),
    "empty weights": ("weights.safetensors", lambda f: (f / "weights.safetensors").write_bytes(b"")),
    "text as weights": ("weights.safetensors", lambda f: (f / "weights.safetensors").write_text("hello" * 99)),
    "truncated weights": ("weights.safetensors", lambda f: truncate(f / "weights.safetensors")),
    "weights folder": (
        "weights.safetensors",
        lambda f: ((f / "weights.safetensors").unlink(), (f / "weights.safetensors").mkdir()),
    ),
    "missing tensor": ("dit.*missing blocks.1", lambda f: edit_weights(f, lambda s: s.pop("dit.blocks.1.ffn.0.bias"))),
    "unexpected tensor": (
        "dit.*unexpected extra.weight",
        lambda f: edit_weights(f, lambda s: s.update({"dit.extra.weight": torch.ones(2)})),
    ),
    "wrong shape": (
        "text.*table.weight is .*, not",
        lambda f: edit_weights(f, lambda s: s.update({"text.table.weight": torch.ones(3, 3)})),
    ),
    "another model's config": (
        r"weights.safetensors \(dit\)",
        lambda f: edit_json(f, lambda v: v["model"].update(layers=3)),
    ),
    "no start image": ("starts/maze.png", lambda f: (f / "starts" / "maze.png").unlink()),
    "no image": ("starts/maze.png", lambda f: (f / "starts" / "maze.png").write_text("png")),
    "truncated image": ("starts/maze.png", lambda f: truncate(f / "starts" / "maze.png")),
    "damaged image": ("starts/maze.png", lambda f: flip_middle(f / "starts" / "maze.png")),
    "wrong image size": ("starts/maze.png", lambda f: half_size(f / "starts" / "maze.png")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_a_weights_error_that_names_the_file(folder, name):
    pattern, damage = DAMAGE[name]
    damage(folder)
    with pytest.raises(WeightsError, match=pattern) as caught:
        load_world(str(folder), "cpu")
    assert str(caught.value).startswith("world: ")
    assert "\n" not in str(caught.value)
    assert caught.value.code == "FAILED_PRECONDITION"


def test_unknown_world_names_the_allowed_ones():
    with pytest.raises(WeightsError, match="no folder .*atlantis; allowed: .*path of a world's folder"):
        load_world("atlantis", "cpu")


def test_weights_arrive_unchanged(tiny_world, world):
    state = load_file(tiny_world / "weights.safetensors")
    for prefix, module in (("dit.", world.dit), ("text.", world.text), ("autoencoder.", world.autoencoder)):
        for name, value in module.state_dict().items():
            assert value.equal(state[prefix + name]), prefix + name
    assert not world.dit.training
    assert not any(parameter.requires_grad for parameter in world.dit.parameters())


def test_half_precision_weights_are_loaded_in_float32(folder, world):
    path = folder / "weights.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    loaded = load_world(str(folder), "cpu")
    weight, half = world.dit.head.head.weight, loaded.dit.head.head.weight
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, weight, rtol=1e-3, atol=1e-5)


def test_bfloat16_worlds(tiny_world):
    loaded = load_world(str(tiny_world), "cpu", torch.bfloat16)
    assert loaded.dit.head.head.weight.dtype == loaded.starts["maze"][0].dtype == torch.bfloat16


def test_starts_are_their_images(tiny_world, world):
    latents, actions = world.starts["maze"]
    assert latents.shape == (4, 8, 4, 6)
    torch.testing.assert_close(latents.square().mean(1), torch.ones(4, 4, 6), rtol=1e-3, atol=0)
    assert actions.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]]
    strip = torch.from_numpy(np.array(Image.open(tiny_world / "starts" / "maze.png")))
    third = strip[:, 4 * 48 : 6 * 48].unflatten(1, (2, 48)).permute(1, 3, 0, 2).float() / 127.5 - 1
    torch.testing.assert_close(world.autoencoder.encode(third[None]), latents[2:3])


@pytest.mark.parametrize(
    ("name", "prompt", "start"),
    [
        ("auto", "a dark MAZE", "maze"),
        ("auto", "the round arena, no maze", "arena"),
        ("auto", "amazement", None),
        ("auto", "", None),
        ("nothing", "a maze", None),
        ("arena", "a maze", "arena"),
    ],
)
def test_find_start(world: World, name, prompt, start):
    assert world.find_start(name, prompt) == start


def test_unknown_start(world):
    with pytest.raises(InvalidInput, match="OPTIONS.start: got 'moon'; allowed: auto, nothing, maze, arena"):
        world.find_start("moon", "a maze")


def test_action_vector(world):
    assert world.action_vector("", "f").tolist() == [0, 0, 0]
    assert world.action_vector("attack+forward", "f").tolist() == [1, 0, 1]
    with pytest.raises(InvalidInput, match="f: unknown button 'jump'; allowed: forward, turn_left, attack"):
        world.action_vector("forward+jump", "f")


def test_world_info(world):
    info = world.info()
    assert json.loads(json.dumps(info)) == info
    assert (info["height"], info["width"], info["chunk_frames"], info["latent_frames_per_chunk"]) == (32, 48, 4, 2)
    assert info["starts"] == ["maze", "arena"]
    assert info["scenarios"] == {"maze": "a dark maze", "arena": "a round arena"}


def test_flow_prediction_and_wan_patches_load(tmp_path):
    config = copy.deepcopy(random_world.CONFIG)
    config["model"].update(patch=[1, 2, 2], prediction="flow")
    loaded = load_world(str(random_world.write(tmp_path / "patched", config)), "cpu")
    assert loaded.config.model.frame_tokens == 6
