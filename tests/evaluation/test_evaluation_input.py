"""Wrong input to `fastar eval` ends in one line and status 2, before any work; what a world lacks is left out."""

from __future__ import annotations

import json
import sys

import pytest

from fastar_backend import cli
from fastar_backend.evaluation import suites


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fastar", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return ended.value.code or 0, said.out, said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policies", "dense,densest"), "--policies: unknown policy 'densest'; allowed: all, or some of dense,"),
        (("--suite", "slow"), "--suite: got 'slow'; allowed: quick, full, ablations"),
        (("--frames", 0), "--frames: got 0; allowed: 1 or more"),
        (("--frames", -4), "--frames: got -4; allowed: 1 or more"),
        (("--frames", 3), "--frames: got 3; allowed: at least a chunk, 4"),
        (("--seeds", 0), "--seeds: got 0; allowed: 1 or more"),
        (("--seed", -1), "--seed: got -1; allowed: 0 or more"),
        (("--budget", 0), "--budget: got 0; allowed: at least a chunk's latent frames"),
        (("--budget", 1), "--budget"),
        (("--parts", "speed,sped"), "--parts: unknown part 'sped'; allowed: all, or some of rollout, forced,"),
        (("--workers", 0), "--workers: got 0; allowed: 1 or more"),
        (("--docs", "report.html"), "--docs: got report.html; allowed: the name of a Markdown file, *.md"),
        (("--device", "tpu"), "--device: got 'tpu'; allowed: auto, cpu, cuda"),
        (("--lpips-weights", "none.pth"), "--lpips-weights: none.pth: No such file or directory; allowed: "),
        (("report", "nowhere"), "DIR: nowhere/settings.json is not there; allowed: the --out folder"),
    ],
)
def test_bad_input(monkeypatch, capsys, tmp_path, tiny_world, arguments, said):
    out = tmp_path / "out"
    extra = () if "report" in arguments else ("--world", tiny_world, "--out", out)
    status, _, error = run(monkeypatch, capsys, *arguments, *extra)
    assert status == 2
    assert error.startswith(f"fastar: {said}")
    assert error.count("\n") == 1
    assert "allowed: " in error
    assert not out.exists()


def test_a_missing_package_is_named(monkeypatch, capsys, tmp_path, tiny_world):
    from fastar_backend.evaluation import metrics

    monkeypatch.setitem(metrics.PACKAGES, "no_such_module", "no-such-package")
    status, _, error = run(monkeypatch, capsys, "--world", tiny_world, "--out", tmp_path / "out")
    assert (status, error.count("\n")) == (2, 1)
    assert "no-such-package not installed; allowed: pip install 'fastar-serve[eval]'" in error


def test_a_world_without_buttons_is_measured_without_truth(monkeypatch, capsys, tmp_path):
    """Nor has it scenarios: one scene with a plain prompt, from nothing. Histories are the dense rollout's."""
    import copy

    import random_world

    config = copy.deepcopy(random_world.CONFIG)
    config |= {"buttons": [], "scenarios": {}, "starts": {}}
    config["model"]["action_dim"] = 0
    folder = random_world.write(tmp_path / "mute", config)
    small = suites.SUITES["quick"].model_copy(update={
        "frames": 12, "forced_latents": 20, "forced_every": 1, "parts": ("rollout", "forced", "revisit"),
    })  # fmt: skip
    monkeypatch.setitem(suites.SUITES, "quick", small)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["fastar", "eval", "--world", str(folder), "--policies", "window", "--budget", "3",
                                      "--workers", "1", "--out", str(out)])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    text = (out / "report.md").read_text()
    assert "**No true frames: this world takes no actions.**" in text
    assert "LPIPS: no backbone weights here" in text
    assert "Places seen again" not in text
    assert "Action following" not in text
    figures = json.loads((out / "report.json").read_text())["policies"]
    assert figures["window"]["truth_psnr"] is None
    assert figures["window"]["psnr"]["count"] == 1
    assert 0 < figures["window"]["recall"]["mean"] < 1
    assert figures["dense"]["recall"]["mean"] == pytest.approx(1, abs=1e-4)
