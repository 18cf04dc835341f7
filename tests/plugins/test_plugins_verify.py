"""What `plugins.verify` would find on a GPU: its checks here, PyTorch's modules of the graphs on both sides (that they
are what kernels compute, test_plugins_runner has)."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import typer
from rerun import Recorder
from test_plugins_runner import DENSE, SPARSE, runtime, world

from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import StreamOptions
from plugins import engines, verify

assert world  # a fixture


def opened(world, attention) -> tuple[StreamEngine, StreamEngine]:
    pair = tuple(StreamEngine(world, attention, runtime=runtime(world, attention)) for _ in range(2))
    for engine in pair:
        engine.open(1, verify.PROMPT, StreamOptions(seed=1))
    return pair


@pytest.mark.parametrize("attention", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_right_graphs_pass(world, attention):
    results = list(verify.graphs(*opened(world, attention)))
    assert [result.what for result in results if not result.passed] == []
    assert {result.what.split(":")[0].split(" at ")[0] for result in results} == {
        "begin", "denoising pass", "writing pass", "update",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("graph", "name", "says"),
    [
        ("begin", "keys", "begin: turned keys"),
        ("denoise", "output", "denoising pass"),
        ("write", "origin.1", "writing pass: origin"),
        ("update", "count", "update: share of groups"),
    ],
)
def test_a_wrong_graph_fails(world, graph, name, says):
    pair = opened(world, DENSE)
    executor = pair[1].runtime.executors[graph]

    class Wrong:
        def run(self, tensors) -> None:
            executor.run(tensors)
            tensors[name].mul_(1.1)

    pair[1].runtime.executors[graph] = Wrong()
    failed = [result.what for result in verify.graphs(*pair) if not result.passed]
    assert any(says in what for what in failed), failed


def test_a_stream_is_compared(world, capsys):
    """And its chunks recorded against computed."""
    pair = opened(world, DENSE)
    recorder = Recorder(pair[1])
    results = list(verify.streams(*pair, recorder, 4))
    assert [result.what for result in results if not result.passed] == []
    assert recorder.count == 3, "one for each place of the ring"
    assert "TensorRT: " in capsys.readouterr().out


def test_what_is_not_finite_fails():
    one, nan = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert not verify.Result("x", verify.difference(nan, one), 1.0).passed
    assert not verify.Result("x", float("nan"), 1.0).passed
    assert verify.difference(one, one) == 0


def test_what_a_recording_does_wrong_fails(world):
    pair = opened(world, DENSE)

    class Wrong(Recorder):
        def record(self, act):
            recording = super().record(act)
            recording.replay = lambda: None
            return recording

    failed = [result.what for result in verify.streams(*pair, Wrong(pair[1]), 4) if not result.passed]
    assert failed == ["CUDA graphs: pixels against the same chunks computed"]


@pytest.mark.parametrize("there", [False, True])
def test_without_a_gpu_or_tensorrt_it_says_so(tmp_path, capsys, monkeypatch, there):
    module = types.ModuleType("tensorrt")
    module.__version__ = "10"
    monkeypatch.setattr(engines, "MODULES", ("tensorrt",) if there else ("no_such_tensorrt",))
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(typer.Exit) as stopped:
        verify.main(tmp_path, "doom", "fastar", "fp16", "auto", 4)
    assert stopped.value.exit_code == 2
    said = capsys.readouterr().err
    assert ("verify: PyTorch sees no GPU" if there else "verify: tensorrt, and TensorRT is not installed") in said
