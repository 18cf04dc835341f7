"""Prompts through umT5 against transformers called directly; a tiny encoder and tokenizer are made here."""

from __future__ import annotations

import shutil
import sys
import weakref
from pathlib import Path

import pytest
import tiny_wan
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastar_backend.errors import WeightsError
from fastar_backend.model import umt5
from fastar_backend.model.umt5 import UMT5Text

LENGTH = 11
PROMPTS = ["a maze of metal rooms", "a", "a grey hall of dark metal rooms of a dark grey hall of a maze", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of diffusers' layout; read-only."""
    return tiny_wan.write_text(tmp_path_factory.mktemp("umt5"))


def directly(folder: Path, prompts: list[str]) -> Tensor:
    """As Wan's pipelines do it: padded to the full length, masked, and zero beyond the tokens."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval().requires_grad_(False)
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    out = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return out * tokens.attention_mask[..., None]


def count_loads(monkeypatch) -> list[str]:
    loads, usual = [], UMT5Text._load
    monkeypatch.setattr(UMT5Text, "_load", lambda self: loads.append("load") or usual(self))
    return loads


def test_as_transformers_directly(folder):
    text = UMT5Text(str(folder), LENGTH)
    got, want = text(PROMPTS), directly(folder, PROMPTS)
    assert got.shape == (4, LENGTH, 20)
    assert text.dim == 20
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    used = [6, 2, LENGTH, 1]  # tokens, the end's included; the third prompt is cut off
    for row, count in enumerate(used):
        assert got[row, count:].eq(0).all()
        assert got[row, :count].abs().sum(-1).gt(0).all()
    assert got[0, 0].sub(got[1, 0]).abs().max() > 1e-3, "the same word differs by its context"


def test_an_embedding_does_not_depend_on_company(folder):
    alone = UMT5Text(str(folder), LENGTH)(PROMPTS[:1])
    assert UMT5Text(str(folder), LENGTH)(PROMPTS)[:1].equal(alone)


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a\n\tmaze   of  ", "a maze of"),
        ("<b> &amp;quot; &lt;b&gt;", '<b> " <b>'),
        ("\u2018 \u201cmaze\u201d", '\' "maze"'),
        ("a mazeâ€™s hall", "a maze's hall"),
    ],
)
def test_prompts_are_cleaned_as_wan_does(folder, prompt, cleaned):
    text = UMT5Text(str(folder), LENGTH)
    assert text.clean(prompt) == cleaned
    assert text([prompt]).equal(text([cleaned]))
    assert len(text._known) == 1


@pytest.mark.parametrize("release", [True, False])
def test_a_released_encoder_is_gone(folder, monkeypatch, capfd, release):
    weights, usual = [], UMT5Text._load

    def load(self: UMT5Text) -> torch.nn.Module:
        encoder = usual(self)
        weights.extend(weakref.ref(parameter) for parameter in encoder.parameters())
        return encoder

    monkeypatch.setattr(UMT5Text, "_load", load)
    text = UMT5Text(str(folder), LENGTH, release=release)
    text(PROMPTS)
    assert {weight() is None for weight in weights} == {release}
    assert capfd.readouterr().err == "", "no progress bars"


@pytest.mark.parametrize(("release", "loads"), [(True, 2), (False, 1)])
def test_the_encoder_is_in_memory_only_while_it_works(folder, monkeypatch, release, loads):
    seen = count_loads(monkeypatch)
    text = UMT5Text(str(folder), LENGTH, release=release)
    assert seen == [], "nothing is loaded before the first prompt"
    first = text(PROMPTS[:2])
    assert (text._encoder is None) == release
    assert text(PROMPTS[:2]).equal(first)
    assert len(seen) == 1, "known prompts need no encoder"
    text([*PROMPTS, *PROMPTS])
    assert len(seen) == loads
    assert text(PROMPTS[:2]).equal(first)


def test_the_oldest_prompts_are_forgotten(folder, monkeypatch):
    monkeypatch.setattr(umt5, "REMEMBERED", 3)
    seen = count_loads(monkeypatch)
    text = UMT5Text(str(folder), LENGTH)
    first = text(["a", "b", "c"])
    text(["a"])  # now b is the oldest
    text(["d"])
    assert list(text._known) == ["c", "a", "d"]
    assert len(seen) == 2
    assert text(["a", "c"]).equal(first[[0, 2]])
    assert len(seen) == 2
    assert text(["a", "b", "c", "d", "e"])[:3].equal(first), "more prompts at once than are remembered"
    assert list(text._known) == ["c", "d", "e"]


def test_remembered_embeddings_are_not_the_callers(folder):
    text = UMT5Text(str(folder), LENGTH)
    first = text(["a maze"])
    kept = first.clone()
    first.zero_()
    assert text(["a maze"]).equal(kept)


def test_type_and_one_folder_for_both(folder, tmp_path):
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(folder / part, tmp_path, dirs_exist_ok=True)
    text = UMT5Text(str(tmp_path), LENGTH, dtype=torch.bfloat16, release=False)
    got, want = text(PROMPTS), directly(folder, PROMPTS)
    assert got.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in text._encoder.parameters()} == {torch.bfloat16}
    assert (got.float() - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("absent", ["transformers", "ftfy"])
def test_without_the_optional_dependencies(folder, monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(WeightsError, match=rf"{absent} is not installed; allowed: pip install 'fastar-serve\[wan\]'"):
        UMT5Text(str(folder), LENGTH)


def test_wrong_sources(folder, tmp_path):
    import transformers

    with pytest.raises(WeightsError, match="absent does not exist; allowed: a local"):
        UMT5Text(str(tmp_path / "absent"))
    with pytest.raises(WeightsError, match="^text: cannot read .*; allowed: a folder or hub id") as caught:
        UMT5Text(str(tmp_path))
    assert "\n" not in str(caught.value)
    shutil.copytree(folder, tmp_path / "t5")
    transformers.T5Config(d_model=8).save_pretrained(tmp_path / "t5" / "text_encoder")
    with pytest.raises(WeightsError, match="is a 't5' model; allowed: a folder or hub id with umT5's encoder"):
        UMT5Text(str(tmp_path / "t5"))


def test_wrong_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    del state["encoder.final_layer_norm.weight"]
    save_file(state, weights, {"format": "pt"})
    text = UMT5Text(str(tmp_path), LENGTH)
    with pytest.raises(WeightsError, match="lacks 1 tensors: encoder.final_layer_norm.weight; allowed: "):
        text(PROMPTS)
    weights.write_bytes(b"\0" * 100)
    with pytest.raises(WeightsError, match="^text: cannot read "):
        text(PROMPTS)
    weights.unlink()
    with pytest.raises(WeightsError, match="^text: cannot read "):
        text(PROMPTS)
    assert text._encoder is None
