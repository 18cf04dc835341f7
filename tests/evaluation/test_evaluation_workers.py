"""Matched noise, and processes: what is equal must be equal to the bit, however it is computed."""

from __future__ import annotations

import pytest
from gameworld import SCENARIOS, SMALL, fastar, write

from fastar_backend.evaluation import game, suites
from fastar_backend.evaluation.store import Store

pytestmark = pytest.mark.skipif(game.missing() is not None, reason="the game is not installed")


def test_exact_policies_make_equal_videos(tmp_path, monkeypatch):
    """A window that never fills is dense attention: equal prompts, actions, frames and noise give equal bits, though
    two processes share the work. Another scenario's is another."""
    monkeypatch.setitem(suites.SUITES, "quick", SMALL)
    out = tmp_path / "out"
    fastar("--world", write(tmp_path / "world"), "--policies", "window", "--budget", 40, "--workers", 2,
           "--parts", "rollout,forced", "--out", out)  # fmt: skip
    units = Store(out).units()
    for scenario in SCENARIOS:
        assert set(units[f"rollout/window/walk/{scenario}/0"]["result"]["dense"]["squared_error"]) == {0}
        truth = [units[f"rollout/{policy}/walk/{scenario}/0"]["result"]["truth"] for policy in ("dense", "window")]
        assert truth[0] == truth[1]
    rows = units["forced/window/walk/health_gathering/0"]["result"]["rows"]
    assert {error for row in rows for error in row["dense"]["squared_error"]} == {0}
    assert all(row["density"] == 1 for row in rows)
    one, other = (units[f"rollout/dense/walk/{scenario}/0"]["result"]["looks"] for scenario in SCENARIOS)
    assert one != other
