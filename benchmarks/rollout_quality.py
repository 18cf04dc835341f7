"""Free rollouts under FAST-AR and a window of equal budget against the dense rollout: same prompt, actions and seed.

    python -m benchmarks.rollout_quality --frames 240 --out out/rollout_quality

PSNR of the mean squared error over stretches of frames, averaged over the scenarios (rollouts part ways in the end:
small differences grow, as they do between two seeds), and density and recall of the FAST-AR rollout over its own
history. Writes rollout_quality.json, .md and .png.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import typer

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import ChunkRequest, StreamOptions
from training.collect import SCENARIOS, behaviour


def decibels(errors: np.ndarray) -> float:
    """Mean over rows of the PSNR of [rows, frames] mean squared errors; 60 dB stands for no difference that shows."""
    return float(np.mean(10 * np.log10(255**2 / np.maximum(errors.mean(1), 255**2 / 1e6))))


def rollout(engine: StreamEngine, scenario, attention: AttentionConfig, frames: int, recall: bool):
    """uint8 [frames, H, W, 3], and the stats of each chunk."""
    moves = behaviour(scenario, np.random.default_rng(21))
    prompt = engine.world.config.scenarios[scenario.name].prompt
    engine.open(1, prompt, StreamOptions(seed=9, start=scenario.name, attention=attention, measure_recall=recall))
    chunks = []
    for _ in range(frames // engine.world.config.chunk_frames):
        (chunk,) = engine.step([ChunkRequest(1, tuple(next(moves) for _ in range(engine.shape.chunk_frames)))])
        chunks.append(chunk)
    engine.close(1)
    return np.concatenate([chunk.frames for chunk in chunks]), [chunk.stats for chunk in chunks]


def main(frames: int = 240, scenarios: int = 6, world: str = "doom", out: Path = Path("out/rollout_quality")) -> None:
    out.mkdir(parents=True, exist_ok=True)
    engine = StreamEngine.load(world)
    budget = engine.attention.budget_frames
    others = {
        "FAST-AR": engine.attention,
        "window": AttentionConfig(kind="window", budget_frames=budget),
    }
    curves: dict[str, list[np.ndarray]] = {name: [] for name in others}  # squared error of each frame
    density, recall = [], []
    for scenario in SCENARIOS[:scenarios]:
        dense, _ = rollout(engine, scenario, AttentionConfig(kind="dense"), frames, False)
        for name, attention in others.items():
            video, stats = rollout(engine, scenario, attention, frames, name == "FAST-AR")
            curves[name].append(np.square(video.astype(np.float32) - dense).mean((1, 2, 3)))
            if name == "FAST-AR":
                density.append([s.density for s in stats])
                recall.append([s.recall for s in stats])
        print(scenario.name, {name: round(decibels(curve[-1][None]), 2) for name, curve in curves.items()}, flush=True)
    lines = ["| frames | " + " | ".join(others) + " | FAST-AR density % | recall % |", "|---" * (len(others) + 3) + "|"]
    per_chunk = engine.world.config.chunk_frames
    for low, high in ((0, 24), (24, 72), (72, 144), (144, 240), (0, frames)):
        values = [f"{decibels(np.array(curve)[:, low:high]):.1f}" for curve in curves.values()]
        part = slice(low // per_chunk, high // per_chunk)
        shares = [f"{100 * np.mean(np.array(x)[:, part]):.1f}" for x in (density, recall)]
        lines.append(f"| {low}-{high} | " + " | ".join(values + shares) + " |")
    (out / "rollout_quality.md").write_text("\n".join(lines) + "\n")
    squared = {name: np.array(curve).tolist() for name, curve in curves.items()}
    report = {"squared_error": squared, "density": density, "recall": recall}
    (out / "rollout_quality.json").write_text(json.dumps(report) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, curve in curves.items():
        left.plot([decibels(np.array(curve)[:, [frame]]) for frame in range(frames)], label=name)
    left.set(xlabel="frame", ylabel="PSNR against the dense rollout (dB)")
    left.legend()
    right.plot(np.arange(len(density[0])) * per_chunk, 100 * np.mean(density, 0), label="density")
    right.plot(np.arange(len(recall[0])) * per_chunk, 100 * np.mean(recall, 0), label="recall")
    right.set(xlabel="frame", ylabel="%", ylim=(0, 102), title="FAST-AR")
    right.legend()
    figure.savefig(out / "rollout_quality.png", dpi=120)
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
