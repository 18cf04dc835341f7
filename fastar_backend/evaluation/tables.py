"""The figures of a report, from the units of a run and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fastar_backend.evaluation.metrics import decibels
from fastar_backend.evaluation.motion import KINDS
from fastar_backend.evaluation.statistics import Estimate, estimate

HORIZONS = (1, 4, 16, 64, 256)  # chunks into a free rollout
Units = Sequence[dict[str, Any]]


class Results:
    """units: the lines of units.jsonl. Policies are in the order of `policies`; those without a unit are left out."""

    def __init__(self, units: Iterable[dict[str, Any]], policies: Iterable[str]) -> None:
        self.units = list(units)
        present = {unit["policy"] for unit in self.units}
        self.policies = [name for name in policies if name in present]

    def of(self, part: str, policy: str) -> Units:
        """Ordered by scene, so that two policies' units are pairs."""
        found = [unit for unit in self.units if unit["part"] == part and unit["policy"] == policy]
        return sorted(found, key=lambda unit: (unit["scenario"], unit["seed"], unit["kind"]))

    def has(self, part: str) -> bool:
        return any(unit["part"] == part for unit in self.units)


def over(units: Units, value: Callable[[dict[str, Any]], float | None]) -> Estimate | None:
    """Over units: scenarios and seeds. A unit without the value (KeyError) is left out."""
    found = []
    for unit in units:
        try:
            found.append(value(unit["result"]))
        except KeyError:
            continue
    return estimate(found)


def fidelity(results: Results, policy: str) -> dict[str, Estimate | None]:
    """Of free rollouts: against dense attention's and against the game's; of single predictions, likewise."""
    rollouts, forced = results.of("rollout", policy), results.of("forced", policy)
    found = {"psnr": over(rollouts, lambda r: decibels(r["dense"]["squared_error"]))}
    for name in ("ssim", "flip", "lpips"):
        found[name] = over(rollouts, lambda r, name=name: float(np.mean(r["dense"][name])))
        found[f"truth_{name}"] = over(rollouts, lambda r, name=name: float(np.mean(r["truth"][name])))
    found["truth_psnr"] = over(rollouts, lambda r: decibels(r["truth"]["squared_error"]))
    found["chunk_psnr"] = over(forced, lambda r: mean_decibels(r["rows"], "dense"))
    found["chunk_truth_psnr"] = over(forced, lambda r: mean_decibels(r["rows"], "truth"))
    found["chunk_truth_ssim"] = over(forced, lambda r: _mean(row["truth"]["ssim"] for row in r["rows"]))
    found["chunk_truth_flip"] = over(forced, lambda r: _mean(row["truth"]["flip"] for row in r["rows"]))
    return found


def mean_decibels(rows: Units, name: str) -> float:
    return float(np.mean([decibels(row[name]["squared_error"]) for row in rows]))


def attention(results: Results, policy: str) -> dict[str, Any]:
    """density: query-key pairs executed, of dense attention's; recall: mean over passes, layers and predictions; and
    both as [layers][passes] (None where passes were left out)."""
    forced = results.of("forced", policy)
    rows = [row for unit in forced for row in unit["result"]["rows"]]
    found: dict[str, Any] = {
        "density": over(forced, lambda r: _mean([row["density"]] for row in r["rows"])),
        "recall": over(forced, lambda r: _mean(layer for row in r["rows"] for layer in row["recall"])),
        "tokens": over(forced, lambda r: _mean([row["tokens"]] for row in r["rows"])),
        "text_tokens": over(forced, lambda r: _mean([row["text_tokens"]] for row in r["rows"])),
    }
    for name, field in (("recall_by_layer", "recall"), ("density_by_layer", "by_pass")):
        shapes = {np.shape(row[field]) for row in rows if _regular(row[field])}
        whole = len(shapes) == 1 and all(_regular(row[field]) for row in rows)
        found[name] = np.mean([row[field] for row in rows], 0).round(5).tolist() if whole else None
    return found


def horizons(results: Results, policy: str) -> dict[str, dict[int, Estimate | None]]:
    """PSNR of the chunk that is so many chunks into a free rollout, against the game's frames and dense attention's."""
    rollouts = results.of("rollout", policy)

    def at(result: dict[str, Any], name: str, chunk: int) -> float:
        size, errors = result["chunk_frames"], result[name]["squared_error"]
        if chunk * size > len(errors):
            raise KeyError(chunk)
        return decibels(errors[(chunk - 1) * size : chunk * size])

    return {
        name: {h: found for h in HORIZONS if (found := over(rollouts, lambda r, h=h, name=name: at(r, name, h)))}
        for name in ("truth", "dense")
    }


def revisit(results: Results, policy: str, beside: str = "window") -> dict[str, Estimate | None]:
    """PSNR of what comes back into the picture, and by how many dB that is better than `beside` (paired: same chunks);
    of whole frames against the first view; of the way back made freely."""
    units, others = results.of("revisit", policy), {unit_scene(u): u for u in results.of("revisit", beside)}
    found = {
        name: over(units, lambda r, name=name: _decibels(row[name] for row in r["rows"] if name in row))
        for name in ("truth", "whole", "first", "first_truth")
    }
    for name in ("first", "truth"):
        found[f"free_{name}"] = over(units, lambda r, name=name: _decibels(r["free"][name]))
    for name in ("truth", "first"):
        gains = []
        for unit in units:
            other = others.get(unit_scene(unit))
            if other is None or policy == beside:
                continue
            pairs = zip(unit["result"]["rows"], other["result"]["rows"], strict=True)
            gain = [decibels([a[name]]) - decibels([b[name]]) for a, b in pairs if name in a and name in b]
            gains += [float(np.mean(gain))] if gain else []
        found[f"{name}_gain"] = estimate(gains)
    return found


def unit_scene(unit: dict[str, Any]) -> tuple:
    return unit["kind"], unit["scenario"], unit["seed"]


def following(results: Results, policy: str) -> dict[str, dict[str, float | int]]:
    """By kind of action and for all: the share of latent frames that move as told, and of how many."""
    found = {}
    units = [unit["result"]["following"] for unit in results.of("rollout", policy) if "following" in unit["result"]]
    for kind in (*dict.fromkeys(KINDS.values()), "all"):
        rows = [row for unit in units for name, row in unit.items() if kind in (name, "all")]
        told = sum(row["told"] for row in rows)
        if told:
            found[kind] = {"rate": sum(row["obeyed"] for row in rows) / told, "told": told}
    return found


def drift(results: Results, policy: str) -> dict[str, Any]:
    """Sharpness, brightness and contrast of each tenth of the longest rollout there is over the mean of the game's
    (where it is known; else over the first tenth). truth: its distance to the game's frames, and of how many."""
    units = results.of("drift", policy) or results.of("rollout", policy)
    found: dict[str, Any] = {"frames": max((unit["result"]["frames"] for unit in units), default=0)}
    for name in ("sharpness", "brightness", "contrast"):
        rows = []
        for unit in units:
            values = np.array(unit["result"]["looks"][name])
            base = np.mean(unit["result"].get("truth_looks", {name: values[:1]})[name])
            if len(values) == 10 and base > 0:
                rows.append(values / base)
        found[name] = np.mean(rows, 0).round(4).tolist() if rows else None
    truths = [unit["result"]["truth"] for unit in units if unit["part"] == "drift" and "truth" in unit["result"]]
    found["truth"] = {
        "frames": min(len(truth["squared_error"]) for truth in truths),
        "psnr": float(np.mean([decibels(truth["squared_error"]) for truth in truths])),
        **{name: float(np.mean([np.mean(truth[name]) for truth in truths])) for name in ("ssim", "flip")},
    } if truths else None  # fmt: skip
    return found


def speed(results: Results, policy: str) -> dict[str, Any] | None:
    """rows: fps, peak_bytes, cache_bytes by frame; at the last frame that both reach, FPS over dense attention's."""
    units, dense = results.of("speed", policy), results.of("speed", "dense")
    if not units:
        return None
    rows = units[0]["result"]["rows"]
    found: dict[str, Any] = {"rows": rows, "stopped": units[0]["result"]["stopped"], **rows[-1], "speedup": None}
    base = {row["frame"]: row["fps"] for row in dense[0]["result"]["rows"]} if dense else {}
    shared = [row for row in rows if row["frame"] in base]
    if shared:
        found["speedup"] = shared[-1]["fps"] / base[shared[-1]["frame"]]
        found["speedup_frame"] = shared[-1]["frame"]
    return found


def ahead(rows: dict[str, dict[str, Any]], of: str) -> list[str]:
    """Policies with a higher PSNR than `of` that are no slower where both were timed last; needs both figures."""
    mine = rows.get(of, {})
    if not mine.get("psnr") or not mine.get("speed"):
        return []
    pace = {row["frame"]: row["fps"] for row in mine["speed"]["rows"]}
    found = []
    for name, row in rows.items():
        if name == of or not row["psnr"] or not row["speed"] or row["psnr"].mean <= mine["psnr"].mean:
            continue
        shared = [point for point in row["speed"]["rows"] if point["frame"] in pace]
        if shared and shared[-1]["fps"] >= pace[shared[-1]["frame"]]:
            found.append(name)
    return found


def everything(results: Results) -> dict[str, dict[str, Any]]:
    """All of the above by policy."""
    return {
        name: {
            **fidelity(results, name), **attention(results, name), "horizons": horizons(results, name),
            "revisit": revisit(results, name), "following": following(results, name), "drift": drift(results, name),
            "speed": speed(results, name),
        }
        for name in results.policies
    }  # fmt: skip


def _mean(rows: Iterable[Sequence[float]]) -> float:
    """Of all numbers in rows that may differ in length. Raises KeyError where there is none."""
    values = [float(value) for row in rows for value in row]
    if not values:
        raise KeyError("no value")
    return float(np.mean(values))


def _decibels(errors: Iterable[float]) -> float:
    """PSNR of the mean. Raises KeyError where there is no error."""
    values = list(errors)
    if not values:
        raise KeyError("no value")
    return decibels(values)


def _regular(table: Sequence[Sequence[float]]) -> bool:
    return len({len(row) for row in table}) == 1 and len(table[0]) > 0
