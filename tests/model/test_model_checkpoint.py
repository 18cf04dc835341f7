"""Checkpoints in every layout of Wan's family, made here at reduced size, and what a wrong one is told."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import random_world
import torch
from safetensors.torch import save_file
from tiny_wan import renamed
from torch import Tensor

from fastar_backend.config import ModelConfig
from fastar_backend.errors import WeightsError
from fastar_backend.model.checkpoint import STEM, load_transformer, read_tensors
from fastar_backend.model.dit import CausalDiT
from training.parallel import WholeSequence

CONFIG = ModelConfig.wan_1_3b(
    dim=36, layers=2, heads=2, ffn_dim=52, freq_dim=16, text_dim=12, text_tokens=5, latent_height=6, latent_width=10
)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_world.randomise(CausalDiT(CONFIG), seed=11)


@pytest.fixture(scope="module")
def other() -> dict[str, Tensor]:
    return random_world.randomise(CausalDiT(CONFIG), seed=12)


def forward(model: CausalDiT) -> Tensor:
    torch.manual_seed(5)
    whole = WholeSequence(CONFIG, 3, 3, torch.device("cpu"))
    latents = torch.randn(1, 6, CONFIG.latent_channels, CONFIG.latent_height, CONFIG.latent_width)
    text = torch.randn(1, CONFIG.text_tokens, CONFIG.text_dim)
    cross = whole.prompts(model.prompt_keys_values(text), torch.zeros(1, 3, dtype=torch.long))
    return model(latents, torch.full((1, 6), 0.6), None, [whole] * CONFIG.layers, cross)


def check(model: CausalDiT, weights: dict[str, Tensor]) -> None:
    """All weights, and one forward pass."""
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert state[name].equal(value), name
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    usual = CausalDiT(CONFIG)
    usual.load_state_dict(weights)
    assert forward(model).equal(forward(usual).detach())


def with_fsdp(name: str) -> str:
    return "model._fsdp_wrapped_module." + re.sub(r"(blocks\.\d+\.)", r"\1_fsdp_wrapped_module.", name)


def to_diffusers(name: str) -> str:
    """The other way round, by hand."""
    for ours, theirs in (
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"), ("head.head", "proj_out"),
        ("head.modulation", "scale_shift_table"), ("modulation", "scale_shift_table"), ("norm3", "norm2"),
        ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"), ("self_attn", "attn1"), ("cross_attn", "attn2"),
        (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".o.", ".to_out.0."),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def shard(folder: Path, weights: dict[str, Tensor], count: int, *, index: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names, where = sorted(weights), {}
    for number in range(count):
        file = f"{STEM}-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: weights[name] for name in names[number::count]}
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    if index:
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


# Layouts


@pytest.mark.parametrize("suffix", ["pt", "pth"])
@pytest.mark.parametrize("ema", [True, False])
def test_self_forcing(tmp_path, weights, other, suffix, ema):
    path = tmp_path / f"self_forcing_dmd.{suffix}"
    critic = {"critic": renamed(other, "model.{}"), "step": 600}
    torch.save({"generator": renamed(other, "model.{}"), "generator_ema": renamed(weights, "model.{}")} | critic, path)
    check(load_transformer(str(path), CONFIG, ema=ema), weights if ema else other)


def test_a_file_without_running_average(tmp_path, weights):
    path = tmp_path / "longlive_base.pt"
    torch.save({"generator": renamed(weights, "model.{}")}, path)
    check(load_transformer(str(path), CONFIG), weights)


def test_a_file_with_a_running_average_only(tmp_path, weights):
    path = tmp_path / "ema.pt"
    torch.save({"generator_ema": renamed(weights, "model.{}")}, path)
    check(load_transformer(str(path), CONFIG), weights)
    with pytest.raises(WeightsError, match="ema.pt holds only a running average .*; allowed: ema=True"):
        load_transformer(str(path), CONFIG, ema=False)


def test_rolling_forcing(tmp_path, weights, other):
    path = tmp_path / "rolling_forcing_dmd.pt"
    wrapped = {with_fsdp(name): value for name, value in weights.items()}
    torch.save({"generator": renamed(other, "model.{}"), "generator_ema": wrapped}, path)
    check(load_transformer(str(path), CONFIG), weights)


@pytest.mark.parametrize("layout", ["file", "whole", "index", "shards"])
def test_wan(tmp_path, weights, layout):
    folder = tmp_path / "Wan2.1"
    shard(folder, weights, 1 if layout in ("file", "whole") else 3, index=layout == "index")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 2, "eps": 1e-06}))
    source = folder
    if layout in ("file", "whole"):
        source = (folder / f"{STEM}-00001-of-00001.safetensors").rename(folder / f"{STEM}.safetensors")
        source = source if layout == "file" else folder
    check(load_transformer(str(source), CONFIG), weights)


@pytest.mark.parametrize("whole", [True, False])
def test_diffusers(tmp_path, whole):
    """Written by diffusers itself."""
    from diffusers import WanTransformer3DModel  # here, as every test process collects this file

    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=18, text_dim=12, freq_dim=16, ffn_dim=52, num_layers=2,
    )  # fmt: skip
    state = random_world.randomise(theirs, seed=13)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="10GB" if whole else "40KB")
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) == 1) == whole
    wanted = {name: state[to_diffusers(name)] for name in CausalDiT(CONFIG).state_dict()}
    check(load_transformer(str(tmp_path), CONFIG), wanted)
    check(load_transformer(str(tmp_path / "transformer"), CONFIG), wanted)


# LoRA

PAIRS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.2")


def lora_of(weights: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """PEFT's tensors by module and side, and the products."""
    torch.manual_seed(21)
    pairs, products = {}, {}
    for module in PAIRS:
        out, into = weights[f"{module}.weight"].shape
        a, b = torch.randn(rank, into), torch.randn(out, rank)
        pairs |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
        products[f"{module}.weight"] = (b.double() @ a.double()).float()
    return pairs, products


def check_merged(model: CausalDiT, weights: dict[str, Tensor], products: dict[str, Tensor], scale: float) -> None:
    for name, value in model.state_dict().items():
        want = weights[name] + scale * products[name] if name in products else weights[name]
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5)
    assert forward(model).isfinite().all()


@pytest.mark.parametrize("name", ["base_model.model.{}.weight", "base_model.model.{}.default.weight"])
def test_longlive(tmp_path, weights, name):
    """A base and a LoRA file whose scale is 1."""
    base, lora = tmp_path / "longlive_base.pt", tmp_path / "lora.pt"
    torch.save({"generator": renamed(weights, "model.{}")}, base)
    pairs, products = lora_of(weights, 3)
    critics = renamed(lora_of(weights, 5)[0], "base_model.model.{}.weight")
    torch.save({"generator_lora": renamed(pairs, name), "critic_lora": critics, "step": 3000}, lora)
    check_merged(load_transformer(str(base), CONFIG, lora=str(lora)), weights, products, 1.0)


@pytest.mark.parametrize("source", ["folder", "file"])
def test_lora_of_peft_for_diffusers_names(tmp_path, weights, source):
    path = tmp_path / f"{STEM}.safetensors"
    save_file(weights, path)
    pairs, products = lora_of(weights, 4)
    named = {f"base_model.model.{to_diffusers(key + '.')}weight": value for key, value in pairs.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "use_dora": False}))
    lora = tmp_path if source == "folder" else tmp_path / "adapter_model.safetensors"
    check_merged(load_transformer(str(path), CONFIG, lora=str(lora)), weights, products, 1.5)


def test_lora_with_an_alpha_for_each_module(tmp_path, weights):
    save_file(weights, tmp_path / "base.safetensors")
    pairs, products = lora_of(weights, 4)
    alphas = {f"{module}.alpha": torch.tensor(2.0) for module in PAIRS}
    save_file(renamed(renamed(pairs, "{}.weight") | alphas, "diffusion_model.{}"), tmp_path / "lora.safetensors")
    model = load_transformer(str(tmp_path / "base.safetensors"), CONFIG, lora=str(tmp_path / "lora.safetensors"))
    check_merged(model, weights, products, 0.5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"blocks.0.self_attn.q.lora_A": None}, "blocks.0.self_attn.q.weight has no pair lora_A, lora_B"),
        ({"blocks.7.self_attn.q.lora_A": torch.zeros(3, 36)}, "unexpected blocks.7.self_attn.q.lora_A.weight"),
        ({"blocks.0.self_attn.q.lora_B": torch.zeros(36, 2)}, r"is \(36, 36\), not lora_B \(36, 2\) times lora_A \(3,"),
        ({"blocks.0.self_attn.q.lora_magnitude": torch.zeros(36)}, "unexpected .*lora_magnitude"),
        (dict.fromkeys([f"{module}.lora_{side}" for module in PAIRS for side in "AB"]), "unexpected left"),
    ],
)
def test_a_lora_that_does_not_fit(tmp_path, weights, change, problem):
    save_file(weights, tmp_path / "base.safetensors")
    pairs = {name: value for name, value in (lora_of(weights, 3)[0] | change).items() if value is not None}
    save_file(renamed(pairs, "{}.weight") or {"left": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(
        WeightsError, match=f"the LoRA .*lora.safetensors does not fit the model: 1 problems: .*{problem}"
    ):
        load_transformer(str(tmp_path / "base.safetensors"), CONFIG, lora=str(tmp_path / "lora.safetensors"))


# Types and devices


def test_target_type_and_rotary_tables(tmp_path, weights):
    save_file(renamed(weights, "model.{}"), tmp_path / "x.safetensors")
    model = load_transformer(str(tmp_path / "x.safetensors"), CONFIG, dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert value.equal(weights[name].bfloat16()), name
    plain = CausalDiT(CONFIG)
    assert model.space_cos.equal(plain.space_cos)
    assert model.space_sin.equal(plain.space_sin)
    on_meta = load_transformer(str(tmp_path / "x.safetensors"), CONFIG, device="meta")
    assert all(value.is_meta for value in [*on_meta.state_dict().values(), on_meta.space_cos])


def test_the_model_outlives_its_file(tmp_path, weights):
    """Copies, not views of a file that someone may replace."""
    for path in (tmp_path / "x.safetensors", tmp_path / "x.pt"):
        save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
        model = load_transformer(str(path), CONFIG)
        with open(path, "r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
        check(model, weights)


MEASURE = """
import re, sys, threading, torch
from fastar_backend.config import ModelConfig
from fastar_backend.model import checkpoint

def now(kind):
    return int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

torch.set_num_threads(1)
with torch.device("meta"):
    checkpoint.CausalDiT(ModelConfig.wan_1_3b(layers=1))  # what torch imports for its meta device is not counted
for source, kind in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    before, peak, done = now(kind), 0, threading.Event()
    def watch():
        global peak
        while not done.wait(0.001):
            peak = max(peak, now(kind))
    thread = threading.Thread(target=watch)
    thread.start()
    model = checkpoint.load_transformer(source, ModelConfig.model_validate_json(sys.argv[1]))
    done.set()
    thread.join()
    size = sum(value.nbytes for value in model.parameters())
    print(size, (max(peak, now(kind)) - before) / size)
    del model
"""


def test_memory_never_holds_the_weights_twice(tmp_path):
    """Resident memory for safetensors. For .pt the pages of the file that were read count there too, though the kernel
    may take them back at any time, so only the process's own memory is looked at."""
    config = ModelConfig.wan_1_3b(
        dim=768, layers=5, heads=6, ffn_dim=3000, text_dim=64, latent_height=4, latent_width=4
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in CausalDiT(config).state_dict().items()}
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(state, tmp_path / "big.safetensors")
    torch.save({"generator": state}, tmp_path / "big.pt")
    files = [str(tmp_path / "big.safetensors"), "VmRSS", str(tmp_path / "big.pt"), "RssAnon"]
    command = [sys.executable, "-c", MEASURE, config.model_dump_json(), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for line in done.stdout.splitlines():
        size, ratio = line.split()
        assert int(size) > 200e6
        assert 0.9 < float(ratio) < 1.3
    assert len(done.stdout.splitlines()) == 2


# Errors


def test_all_that_does_not_fit_is_counted_and_some_of_each_named(tmp_path, weights):
    wrong = {name: value for name, value in weights.items() if ".norm_k." not in name}
    wrong |= {
        "head.head.bias": torch.zeros(3),
        "img_emb.proj.0.weight": torch.zeros(2),
        "blocks.0.ffn.0.bias_int": torch.zeros(1),
    }
    wrong["patch_embedding.bias"] = torch.zeros(36, dtype=torch.int64)
    save_file(renamed(wrong, "model.{}"), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_transformer(str(tmp_path / "x.safetensors"), CONFIG)
    said = str(caught.value)
    assert "x.safetensors does not fit the configuration: 4 missing, 2 unexpected, 2 of another shape or type: " in said
    assert said.count(";") == 7, "eight problems are named"
    problems = (
        "missing blocks.0.self_attn.norm_k.weight", "unexpected model.img_emb.proj.0.weight",
        "head.head.bias is (3,), not (64,)", "patch_embedding.bias is torch.int64, not a float type",
    )  # fmt: skip
    for problem in problems:
        assert problem in said


def test_many_problems_are_counted_and_eight_named(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_transformer(str(tmp_path / "x.safetensors"), ModelConfig.wan_1_3b())
    assert "825 missing, 1 unexpected, 0 of another shape or type: missing " in str(caught.value)
    assert str(caught.value).count(";") == 7


def test_two_names_of_one_parameter(tmp_path, weights):
    save_file(weights | {"model.head.head.bias": torch.ones(64)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="0 missing, 1 unexpected, 0 of .*: unexpected (model.)?head.head.bias$"):
        load_transformer(str(tmp_path / "x.safetensors"), CONFIG)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"num_heads": 3}, "has num_heads 3, not 2; allowed: a configuration with these heads"),
        ({"num_attention_heads": 1}, "has num_attention_heads 1, not 2"),
        ({"eps": 1e-5}, "has eps 1e-05, not 1e-06"),
        ([], "is no JSON object"),
        (None, "cannot read .*config.json"),
    ],
)
def test_what_no_shape_tells_is_read_from_the_config(tmp_path, weights, said, problem):
    shard(tmp_path, weights, 2, index=True)
    (tmp_path / "config.json").write_text("{" if said is None else json.dumps(said))
    with pytest.raises(WeightsError, match=problem):
        load_transformer(str(tmp_path), CONFIG)


class Code:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def write_wrong(kind: str, path: Path) -> Path:
    if kind == "code":
        torch.save({"generator": {"model.head": Code()}}, path)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps({"a": Code()}))
    elif kind == "module":
        torch.save(torch.nn.Linear(2, 2), path)
    elif kind == "old format":
        torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "torn":
        save_file({"a": torch.zeros(1000)}, path) if path.suffix == ".safetensors" else torch.save([0] * 999, path)
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "no tensors":
        torch.save({"step": 3}, path)
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    "kind",
    ["code", "bare pickle", "module", "old format", "text", "empty", "torn", "a tensor", "no tensors", "folder",
     "missing"],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_wrong_files(tmp_path, monkeypatch, kind, suffix):
    monkeypatch.chdir(tmp_path)
    path = write_wrong(kind, tmp_path / f"wrong.{suffix}")
    with pytest.raises(WeightsError, match=r"^weights: .*wrong\.\w+.*; allowed: ") as caught:
        load_transformer(str(path), CONFIG)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "it-ran").exists()


def test_wrong_suffix_and_missing_shard(tmp_path, weights):
    (tmp_path / "x.gguf").write_text("GGUF")
    with pytest.raises(WeightsError, match="x.gguf; allowed: .safetensors, .pt, .pth"):
        load_transformer(str(tmp_path / "x.gguf"), CONFIG)
    shard(tmp_path / "folder", weights, 3, index=True)
    (tmp_path / "folder" / f"{STEM}-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match="cannot read .*-00002-of-00003.safetensors"):
        load_transformer(str(tmp_path / "folder"), CONFIG)


def test_read_tensors_is_flat(tmp_path):
    save_file({"a.b": torch.arange(6.0).view(2, 3)}, tmp_path / "x.safetensors")
    torch.save({"a": {"b": torch.arange(6.0).view(2, 3)}, "step": 4, 7: [1]}, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        tensors = read_tensors(tmp_path / name)
        assert dict(tensors).keys() == {"a.b"}
        assert len(tensors) == 1
        assert tensors["a.b"].equal(torch.arange(6.0).view(2, 3))
        with pytest.raises(KeyError):
            tensors["a"]


# The hub, from its cache on disk: no test needs a network.

HUB = """
import sys
from fastar_backend.config import ModelConfig
from fastar_backend.errors import WeightsError
from fastar_backend.model.checkpoint import load_transformer
for source in sys.argv[2:]:
    try:
        model = load_transformer(source, ModelConfig.model_validate_json(sys.argv[1]))
        print("loaded", round(float(model.head.head.weight.sum()), 3))
    except WeightsError as error:
        print(error)
"""


def test_hub_ids(tmp_path, weights):
    snapshot = tmp_path / "hub" / "models--org--some-model.v1" / "snapshots" / ("0" * 40)
    shard(snapshot, weights, 2, index=True)
    (snapshot / "checkpoints").mkdir()
    torch.save({"generator": renamed(weights, "model.{}")}, snapshot / "checkpoints" / "dmd.pt")
    shard(snapshot / "variants" / "b", weights, 1, index=False)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    sources = [
        "org/some-model.v1", "org/some-model.v1:checkpoints/dmd.pt", "org/some-model.v1:variants/b", "org/absent",
        "org/some-model.v1:checkpoints/absent.pt", "org/a..b", "org/absent.pt", "some:thing",
    ]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-W", "error", "-c", HUB, CONFIG.model_dump_json(), *sources]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == len(sources), done.stdout
    assert lines[:3] == [f"loaded {round(float(weights['head.head.weight'].sum()), 3)}"] * 3
    for source, line in zip(sources[3:6], lines[3:6], strict=True):
        assert line.startswith(f"weights: {source} is neither here nor to be had from the hub ("), line
    for source, line in zip(sources[6:], lines[6:], strict=True):
        assert line.startswith(f"weights: {source} does not exist; allowed: a local file"), line


def test_without_the_hub_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"huggingface_hub is not installed; allowed: a local path, or pip install"):
        load_transformer("org/name", CONFIG)
