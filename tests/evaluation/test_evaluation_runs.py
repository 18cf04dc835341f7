"""Whole runs of `fastar eval` on a world with random weights, which sees the true game: resumed, repeated, reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gameworld import SMALL, fastar, write

from fastar_backend.config import AttentionConfig
from fastar_backend.errors import InvalidInput
from fastar_backend.evaluation import game, suites
from fastar_backend.evaluation.runner import plan
from fastar_backend.evaluation.store import Store, Unit

POLICIES = "window,fastar-quant"
pytestmark = pytest.mark.skipif(game.missing() is not None, reason="the game is not installed")


@pytest.fixture(scope="module", autouse=True)
def _small_suite():
    before = dict(suites.SUITES)
    suites.SUITES["quick"] = SMALL
    yield
    suites.SUITES.update(before)


@pytest.fixture(scope="module")
def gameworld(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("worlds") / "gameworld")


@pytest.fixture(scope="module")
def done(gameworld, tmp_path_factory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    fastar("--world", gameworld, "--policies", POLICIES, "--budget", 6, "--workers", 1, "--out", out)
    return out


def report(out: Path) -> dict:
    found = json.loads((out / "report.json").read_text())
    del found["timing"]
    return found


def test_every_planned_unit_is_measured_once(done):
    settings, policies = Store(done).open()
    keys = [json.loads(line)["key"] for line in (done / "units.jsonl").read_text().splitlines()]
    assert sorted(keys) == sorted(unit.key for unit in plan(settings, list(policies), SMALL.parts))
    assert len(keys) == len(set(keys)) == 3 * (2 + 1 + 2)


def test_tables_hold_the_units_numbers(done):
    """Figures of report.md and report.json against the units, by other means."""
    units = Store(done).units()
    row = next(line for line in (done / "report.md").read_text().splitlines() if line.startswith("| fastar-quant | "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    mine = [unit["result"] for key, unit in units.items() if key.startswith("rollout/fastar-quant/")]
    decibels = [10 * np.log10(255**2 / np.mean(result["dense"]["squared_error"])) for result in mine]
    half = 12.7062 * np.std(decibels, ddof=1) / 2**0.5  # Student's quantile for one degree of freedom
    assert cells[1] == f"{np.mean(decibels):.1f} ± {half:.1f}"
    assert cells[2].startswith(f"{np.mean([np.mean(result['dense']['ssim']) for result in mine]):.3f}")
    figures = report(done)["policies"]["fastar-quant"]
    rows = [r for key, unit in units.items() if key.startswith("forced/fastar-q") for r in unit["result"]["rows"]]
    assert figures["recall"]["mean"] == pytest.approx(np.mean([r["recall"] for r in rows]), abs=1e-6)
    assert figures["density"]["mean"] == pytest.approx(np.mean([r["density"] for r in rows]), abs=1e-6)
    by_layer = np.mean([r["recall"] for r in rows], 0)
    assert np.array(figures["recall_by_layer"]).shape == (2, 3)  # layers, two steps and the writing pass
    assert figures["recall_by_layer"] == pytest.approx(by_layer, abs=1e-4)
    # What all passes execute by themselves is what the density says.
    assert np.mean([np.mean(r["by_pass"]) for r in rows]) == pytest.approx(figures["density"]["mean"], abs=1e-4)


def test_pairs_with_the_window(done):
    units = Store(done).units()
    gains = []
    for kind in ("away", "circle"):
        mine, other = (
            units[f"revisit/{policy}/{kind}/health_gathering/0"]["result"]["rows"]
            for policy in ("fastar-quant", "window")
        )
        gains.append(np.mean([10 * np.log10(b["truth"] / a["truth"]) for a, b in zip(mine, other, strict=True)]))
    assert report(done)["policies"]["fastar-quant"]["revisit"]["truth_gain"]["mean"] == pytest.approx(np.mean(gains))


def test_dense_attention_keeps_everything(done):
    figures = report(done)["policies"]["dense"]
    assert figures["recall"]["mean"] == pytest.approx(1, abs=1e-4)
    assert figures["density"]["mean"] == 1
    assert figures["psnr"] is None
    assert figures["truth_psnr"]["count"] == 2


def test_pictures_and_film(done):
    for name in ("recall_density.png", "fidelity.png", "filmstrip.jpg", "side_by_side.mp4"):
        assert (done / "images" / name).stat().st_size > 1000
    import av

    with av.open(str(done / "images" / "side_by_side.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == SMALL.frames


def test_report_again_with_docs(done, tmp_path):
    before = (done / "report.json").read_text()
    fastar("report", done, "--docs", tmp_path / "evaluation.md")
    assert (done / "report.json").read_text() == before
    text = (tmp_path / "evaluation.md").read_text()
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(links) == 4
    assert all((tmp_path / link).exists() and link.startswith("images/evaluation/") for link in links)


def test_another_setting_does_not_go_on(gameworld, done, tmp_path):
    for change in (("--budget", 8), ("--budget", 6, "--frames", 20), ("--budget", 6, "--seed", 1)):
        with pytest.raises(InvalidInput, match="--out: .* other settings: .*; allowed: the same settings"):
            fastar("--world", gameworld, "--policies", POLICIES, "--workers", 1, "--resume", "--out", done, *change)


def test_a_setting_that_is_new_since_was_at_its_default(tmp_path):
    base = {"world": "w", "name": "w", "fingerprint": "f", "device": "cpu", "truth": None, "buttons": True,
            "suite": "quick", "sizes": suites.SUITES["quick"], "budget": 6, "seed": 0, "scenarios": ("a",),
            "lpips": False, "versions": {}}  # fmt: skip
    settings, store = suites.Settings(**base), Store(tmp_path)
    store.begin(settings, {"p": AttentionConfig()}, resume=False)
    path = tmp_path / "settings.json"
    held = json.loads(path.read_text())
    del held["policies"]["p"]["sparse_density"]  # as an older release wrote it
    path.write_text(json.dumps(held))
    store.begin(settings, {"p": AttentionConfig()}, resume=True)
    with pytest.raises(InvalidInput, match="other settings: policy p"):
        store.begin(settings, {"p": AttentionConfig(sparse_density=0.5)}, resume=True)


def test_units_have_names_of_their_own():
    units = [Unit("forced", "svg1", "", 0), Unit("rollout", "svg1", "", 0), Unit("revisit", "a", "b", 0, "away")]
    keys = ["forced/svg1/walk/world/0", "rollout/svg1/walk/world/0", "revisit/a/away/b/0"]
    assert [unit.key for unit in units] == keys


def test_ablations_differ_from_the_default_each_in_its_own_way():
    chosen = suites.choose("all", "ablations", 12, 2)
    settings = {config.model_dump_json() for config in chosen.values()}
    assert len(settings) == len(chosen) > 20
    assert chosen["fastar default"] == AttentionConfig(budget_frames=12)
    assert suites.choose(",".join(chosen), "ablations", 12, 2) == chosen  # every name can be asked for
