"""Writes report.json, report.md and the pictures of a run. Everything in them is made from units.jsonl and media/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fastar_backend.errors import InvalidInput
from fastar_backend.evaluation import film, pictures, tables
from fastar_backend.evaluation.metrics import BEST
from fastar_backend.evaluation.scenes import AWAY, BACK, CIRCLE
from fastar_backend.evaluation.statistics import Estimate
from fastar_backend.evaluation.store import Store
from fastar_backend.evaluation.suites import Settings
from fastar_backend.evaluation.tables import HORIZONS, Results

Rows = dict[str, dict[str, Any]]
NONE = "-"
DETAILED = ("tempcache-quant", "fastar-quant", "fastar default")  # whose layers and steps are shown


def write(store: Store, docs: Path | None) -> list[Path]:
    """docs: a second copy of the report; its pictures go to images/<its name>/ beside it. Returns what was written.
    Raises InvalidInput."""
    settings, policies = store.open()
    units = store.units()
    if not units:
        raise InvalidInput(
            "DIR", f"{store.folder} holds no finished unit", "the --out folder of a run of `fastar eval`"
        )
    check_docs(docs)
    results = Results(units.values(), policies)
    rows = tables.everything(results)
    images = store.folder / "images"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    shown = [*pictures.draw(rows, results, images), *film.make(store, settings, results.policies, images)]
    text = store.folder / "report.md"
    text.write_text(markdown(settings, results, rows, shown, "images"))
    figures = store.folder / "report.json"
    figures.write_text(json.dumps(as_json(settings, results, rows), indent=1) + "\n")
    written = [figures, text, *(images / name for name, _ in shown)]
    if docs is not None:
        folder = docs.parent / "images" / docs.stem
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(images, folder)
        docs.write_text(markdown(settings, results, rows, shown, f"images/{docs.stem}"))
        written.append(docs)
    return written


def check_docs(docs: Path | None) -> None:
    """Raises InvalidInput."""
    if docs is not None and docs.suffix != ".md":
        raise InvalidInput("--docs", f"got {docs}", "the name of a Markdown file, *.md")


def as_json(settings: Settings, results: Results, rows: Rows) -> dict[str, Any]:
    """`timing` holds all that another run on the same machine would not repeat exactly."""

    def plain(value: Any) -> Any:
        if isinstance(value, Estimate):
            return value.as_json()
        if isinstance(value, dict):
            return {str(key): plain(part) for key, part in value.items()}
        return value

    quality = {name: {key: plain(v) for key, v in row.items() if key != "speed"} for name, row in rows.items()}
    timing = {"seconds": sum(unit["result"].get("seconds", 0) for unit in results.units),
              "speed": {name: row["speed"] for name, row in rows.items() if row["speed"]}}  # fmt: skip
    return {"settings": settings.model_dump(mode="json"), "policies": quality, "timing": timing}


def markdown(settings: Settings, results: Results, rows: Rows, shown: list[tuple[str, str]], images: str) -> str:
    sizes = settings.sizes
    command = (
        f"fastar eval --world {settings.name} --suite {settings.suite} --frames {sizes.frames} --seeds {sizes.seeds} "
        f"--scenarios {sizes.scenarios} --budget {settings.budget}"
    )
    counts = {part: sum(u["part"] == part for u in results.units) for part in ("rollout", "forced", "revisit", "drift")}
    lines = [
        "# Evaluation of attention policies",
        "",
        f"Made by `{command}` (`fastar eval report DIR` makes it again from the same results). World: {settings.name} "
        f"({settings.fingerprint[:8]}). {settings.versions['machine']}, {settings.device}; Python "
        f"{settings.versions['python']}, torch {settings.versions['torch']}.",
        "",
        f"All policies have the same prompts, actions, noise and first frames. Bounded caches hold {settings.budget} "
        f"latent frames. {counts['rollout']} free rollouts of {sizes.frames} frames, {counts['forced']} histories of "
        f"{sizes.forced_latents} latent frames, {counts['revisit']} scenes of places seen again, {counts['drift']} "
        f"long rollouts of {sizes.drift_frames} frames. ± is Student's 95 % interval of the mean over scenarios and "
        "seeds; `-` was not measured or does not apply.",
        "",
    ]
    if settings.truth is not None:
        lines += [f"**No true frames: {settings.truth}.** Figures against the game, of actions and of places seen "
                  "again are therefore missing.", ""]  # fmt: skip
    if not settings.lpips:
        lines += ["**LPIPS: no backbone weights here.** FLIP, which needs none, stands beside PSNR and SSIM.", ""]
    lines += _main(settings, rows)
    for section in (_horizons, _revisit, _following, _drift, _layers):
        lines += section(settings, rows)
    for name, caption in shown:
        link = f"[{caption}]({images}/{name})"
        lines += [link if name.endswith(".mp4") else f"!{link}\n\n*{caption}*", ""]
    return "\n".join(lines).rstrip() + "\n"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in head[1:])]
    return [*("| " + " | ".join(row) + " |" for row in (head, rule, *rows)), ""]


def shown(value: Estimate | None, digits: int = 1, scale: float = 1.0) -> str:
    """ "equal": no PSNR, for nothing differs."""
    if value is not None and scale == 1.0 and value.mean >= BEST:
        return "equal"
    return NONE if value is None else value.text(digits, scale)


def _main(settings: Settings, rows: Rows) -> list[str]:
    head = ["method", "PSNR (dB)", "SSIM", "LPIPS" if settings.lpips else "FLIP", "truth PSNR (dB)", "one chunk (dB)",
            "density %", "recall %", "FPS", "speed-up", "peak MB"]  # fmt: skip
    body = []
    last = max((row["speed"]["frame"] for row in rows.values() if row["speed"]), default=0)
    early = [name for name, row in rows.items() if row["speed"] and row["speed"]["frame"] < last]
    for name, row in rows.items():
        speed = row["speed"]
        pace = [NONE] * 3
        if speed:
            ratio = NONE if speed["speedup"] is None else f"{speed['speedup']:.1f}x"
            star = "" if speed["frame"] == last else "*"
            pace = [f"{speed['fps']:.2f}{star}", f"{ratio}{star}", f"{speed['peak_bytes'] / 1e6:.0f}{star}"]
        third = row["lpips"] if settings.lpips else row["flip"]
        body.append([
            name, shown(row["psnr"]), shown(row["ssim"], 3), shown(third, 3), shown(row["truth_psnr"], 2),
            shown(row["chunk_psnr"]), shown(row["density"], 1, 100), shown(row["recall"], 1, 100), *pace,
        ])  # fmt: skip
    lines = [
        "PSNR, SSIM, FLIP (0 = equal): free rollouts against dense attention's; truth: against the game's frames under "
        "the same actions; one chunk: predicted from the same history, against dense attention's. Density: query-key "
        "pairs executed, recall: attention mass kept, mean over all layers and passes of those predictions. "
        + (f"FPS, speed-up over dense and peak memory of the process: with a history of {last} frames, one run each."
           if last else "")
        + (" * With a shorter one: longer ones took too long, or memory." if early else ""),
        "",
        *table(head, body),
    ]  # fmt: skip
    beside = [1e3 * row["speed"]["reference"] for row in rows.values() if row["speed"]]
    if beside:
        least, most = min(beside), max(beside)
        lines += [f"A fixed piece of work, timed beside them at that length, took {least:.0f} to {most:.0f} ms: as far "
                  "apart are the speeds of the machine.", ""]  # fmt: skip
    for mine in ("fastar-quant", "tempcache-quant", "fastar default"):
        if mine in rows and rows[mine]["psnr"] and rows[mine]["speed"]:
            better = tables.ahead(rows, mine)
            said = f"higher PSNR and no fewer FPS than {mine}: {', '.join(better)}" if better else (
                f"no policy has both a higher PSNR and no fewer FPS than {mine}")  # fmt: skip
            lines += [f"{said[0].upper()}{said[1:]}.", ""]
    return lines


def _horizons(settings: Settings, rows: Rows) -> list[str]:
    if not any(row["horizons"]["truth"] for row in rows.values()):
        return []
    there = [h for h in HORIZONS if any(h in row["horizons"]["truth"] for row in rows.values())]
    head = ["method", "next chunk after true frames", "its SSIM", "its FLIP", *(f"rollout, chunk {h}" for h in there)]
    body = [
        [name, shown(row["chunk_truth_psnr"], 2), shown(row["chunk_truth_ssim"], 3), shown(row["chunk_truth_flip"], 3),
         *(shown(row["horizons"]["truth"].get(h), 2) for h in there)]
        for name, row in rows.items()
    ]  # fmt: skip
    return ["## Against the game, by horizon", "", "PSNR (dB) against the true frames under the same actions.", "",
            *table(head, body)]  # fmt: skip


def _revisit(settings: Settings, rows: Rows) -> list[str]:
    if not any(row["revisit"]["truth"] for row in rows.values()):
        return []
    head = ["method", "what returns (dB)", "gain over window", "whole frames", "against the first view",
            "gain over window ", "free way back: truth", "first view"]  # fmt: skip
    fields = ("truth", "truth_gain", "whole", "first", "first_gain", "free_truth", "free_first")
    body = [[name, *(shown(row["revisit"][field], 2) for field in fields)] for name, row in rows.items()]
    own = next(f"{row['revisit']['first_truth'].mean:.1f}" for row in rows.values() if row["revisit"]["first_truth"])
    return [
        "## Places seen again", "",
        f"The player turns away for {AWAY} latent frames and {BACK} back"
        + (f", or {CIRCLE} on the spot (two full circles)" if "circle" in settings.sizes.revisit_kinds else "")
        + ". PSNR (dB) of the columns that come back into the picture and were in none of the frames that a window of "
        "the same budget holds, predicted after true frames, against the true ones; the gain is paired, chunk by "
        f"chunk. Whole frames at a pose seen before, against their first view (the game's own second view: {own} dB). "
        "Free way back: nothing is told any more once the player turns round.", "", *table(head, body),
    ]  # fmt: skip


def _following(settings: Settings, rows: Rows) -> list[str]:
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row["following"]))
    if not kinds:
        return []
    body = [
        [name, *(f"{row['following'][kind]['rate']:.2f}" if kind in row["following"] else NONE for kind in kinds)]
        for name, row in rows.items()
    ]
    counts = next(row["following"] for row in rows.values() if row["following"])
    head = ["method", *(f"{kind} (n = {counts[kind]['told']})" if kind in counts else kind for kind in kinds)]
    return [
        "## Action following", "",
        "Share of the latent frames of free rollouts whose picture moves as the action says (turns and side steps: "
        "phase correlation; walking: growth by optical flow), among those in which the game's picture does.", "",
        *table(head, body),
    ]  # fmt: skip


def _drift(settings: Settings, rows: Rows) -> list[str]:
    body = []
    for name, row in rows.items():
        if not row["drift"]["sharpness"]:
            continue
        cells = [
            f"{row['drift'][look][tenth]:.2f}"
            for look in ("sharpness", "brightness", "contrast")
            for tenth in (0, 4, 9)
        ]
        truth = row["drift"]["truth"]
        distances = [f"{truth[metric]:.3f}" for metric in ("psnr", "ssim", "flip")] if truth else 3 * [NONE]
        known = [str(truth["frames"]) if truth else NONE, *distances]
        body.append([name, str(row["drift"]["frames"]), *known, *cells])
    if not body:
        return []
    looks = ("sharpness", "brightness", "contrast")
    head = ["method", "frames", "of them true", "truth PSNR (dB)", "truth SSIM", "truth FLIP",
            *(f"{look}, {tenth} tenth" for look in looks for tenth in ("1st", "5th", "10th"))]  # fmt: skip
    base = "the game's mean in the same scene" if settings.truth is None else "the first tenth"
    about = (
        f"Of each method's longest rollout: tenths of the run over {base}. Sharpness: mean absolute gradient. Truth: "
        "as far as the game goes under the same actions, where there is a rollout for drift."
    )
    return ["## Drift", "", about, "", *table(head, body)]


def _layers(settings: Settings, rows: Rows) -> list[str]:
    lines: list[str] = []
    for name in DETAILED:
        row = rows.get(name)
        if row is None or row["recall_by_layer"] is None:
            continue
        passes = len(row["recall_by_layer"][0])
        head = ["layer", *(f"step {i + 1}" if i < passes - 1 else "writing pass" for i in range(passes))]
        body = [
            [str(layer), *(f"{100 * r:.1f} ({100 * d:.0f})" for r, d in zip(recall, density, strict=True))]
            for layer, (recall, density) in enumerate(zip(row["recall_by_layer"], row["density_by_layer"], strict=True))
        ]
        lines += [f"## Recall % (and density %) of {name}, by layer and step", "", *table(head, body)]
    return lines
