"""The plugins' benchmark: what of it needs no GPU, and, on one, that every plugin is right."""

from __future__ import annotations

import json
import subprocess
import sys

import plugins_cases as cases
import pytest
import torch
import typer
from plugins_sizes import HEAD_DIM
from typer.testing import CliRunner

from benchmarks import plugins as benchmark
from plugins import ops  # noqa: F401  registers the operators
from plugins.host import Host
from plugins.table import OPERATORS

COMPILED = [name for name in OPERATORS if name not in ("choose_blocks", "text_mass", "condense_text")]


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(benchmark.main)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_operator_is_timed():
    assert list(benchmark.SPEED) == list(OPERATORS) == list(cases.CASES)


def test_inputs_and_outputs_of_every_plugin_are_taken(plugin_library, monkeypatch):
    """Those whose constants the tests' library has; at the sizes of the check."""
    monkeypatch.setattr(benchmark, "SPEED", dict.fromkeys(OPERATORS, {"groups": 3}) | {"attend_sparse": {"block": 128}})
    results = benchmark.run(Host(plugin_library), COMPILED, ["fp16", "bf16"], HEAD_DIM, 1, True)
    assert [result["operator"] for result in results[::2]] == COMPILED
    assert all(result["accepted"] for result in results)


def test_a_dry_run_writes_and_claims_nothing_it_did_not_do(plugin_library, tmp_path, run, monkeypatch):
    monkeypatch.setitem(benchmark.SPEED, "quantise", {"n": 40})
    chosen = ["--operator", "quantise", "--type", "bf16", "--head-dim", HEAD_DIM]
    done = run("--dry-run", "--built", plugin_library, *chosen, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "not run" in done.output
    assert json.loads((tmp_path / "plugins.json").read_text()) == {
        "device": "none", "head_dim": HEAD_DIM,
        "results": [{"operator": "quantise", "type": "bf16", "accepted": True}]}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operator", "soft"], "operator: soft; allowed: attend, "),
        (["--type", "fp8"], "type: fp8; allowed: fp16, bf16"),
        (["--dry-run", "--built", "nowhere.so"], "library: nowhere.so does not exist"),
        (["--dry-run", "--head-dim", "96", "--operator", "quantise"], "head_dim: 96; allowed: powers of two"),
    ],
)
def test_a_mistake_is_said_in_one_line(arguments, message, run, tmp_path):
    done = run("--out", tmp_path, *arguments)
    assert done.exit_code != 0
    assert str(done.exception.code).startswith(f"error: {message}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(run, tmp_path):
    done = run("--out", tmp_path)
    assert str(done.exception.code) == (
        "error: GPU: none; allowed: compute capability 9.0 or newer; --dry-run needs none"
    )  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_wrong_has_a_large_error(name):
    """What PyTorch's operator gives is right; a row of zeros or a number too much in any output is not."""
    inputs, attributes = benchmark.drawn(name, 32, torch.float16, benchmark.CHECKED.get(name, {}))
    result = getattr(torch.ops.fastar, name)(*inputs, **attributes)
    outputs = list(result) if isinstance(result, tuple | list) else [result]
    tolerance = benchmark.TOLERANCE["fp16"]
    assert benchmark.error(name, outputs, inputs, attributes) <= tolerance
    for at, output in enumerate(outputs):
        wrong = output.clone()
        wrong[0] = wrong[0] + (1 if wrong.is_floating_point() else 0x01010101)
        changed = [*outputs[:at], wrong, *outputs[at + 1 :]]
        assert benchmark.error(name, changed, inputs, attributes) > tolerance, at
        if wrong.is_floating_point():
            assert benchmark.error(name, [*outputs[:at], torch.full_like(wrong, torch.nan), *outputs[at + 1 :]],
                                   inputs, attributes) > tolerance  # fmt: skip


@pytest.mark.gpu  # enqueues kernels
def test_every_plugin_is_right_on_a_gpu(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.plugins",
        "--out",
        str(tmp_path),
        "--head-dim",
        str(HEAD_DIM),
        "--repeats",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(result["right"] for result in json.loads((tmp_path / "plugins.json").read_text())["results"])
