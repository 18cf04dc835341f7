"""What each attention policy keeps of dense attention, on the embedded world's real activations.

    python -m benchmarks.attention_quality --out out/attention_quality

True frames of the game fill every cache (so all policies see one history); now and then the next chunk is sampled
with the same noise under each policy. PSNR is of the decoded chunk against the one under dense attention, and against
the game's true frames; recall and density as the engine reports them (fastar_backend/attention/recall.py). A window
of equal budget stands beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import Stream, StreamOptions
from training.autoencoder import to_video
from training.collect import SCENARIOS, behaviour
from training.evaluate import HELD_OUT, play, psnr


def policies(budget: int, recent: int) -> dict[str, AttentionConfig]:
    base = {"budget_frames": budget, "recent_frames": recent}
    return {
        "dense": AttentionConfig(kind="dense"),
        "window": AttentionConfig(kind="window", budget_frames=budget),
        "window + 1 sink": AttentionConfig(kind="window", budget_frames=budget, sink_frames=1),
        "fastar default": AttentionConfig(),
        "fastar, LSH index": AttentionConfig(**base, index="lsh"),
        "fastar, exact index": AttentionConfig(**base, index="exact"),
        "threshold .8": AttentionConfig(**base, merge_threshold=0.8),
        "threshold .9": AttentionConfig(**base, merge_threshold=0.9),
        "threshold .99": AttentionConfig(**base, merge_threshold=0.99),
        "overflow dropped": AttentionConfig(**base, overflow="drop"),
        "weight none": AttentionConfig(**base, weight="none"),
        "weight effective": AttentionConfig(**base, weight="effective"),
        "mean representative": AttentionConfig(**base, representative="mean"),
        "newest 4 whole": AttentionConfig(budget_frames=budget, recent_frames=4),
        "newest 2 whole": AttentionConfig(budget_frames=budget, recent_frames=2),
        "newest 2 whole, effective": AttentionConfig(budget_frames=budget, recent_frames=2, weight="effective"),
        "newest 8 whole": AttentionConfig(budget_frames=budget, recent_frames=8),
        "paper's recipe, same budget": AttentionConfig.paper_recipe(budget, 2),
        "paper's TempCache alone": AttentionConfig(budget_frames=budget, recent_frames=2, match="query"),
        "budget 8": AttentionConfig(budget_frames=8, recent_frames=min(recent, 6)),
        "budget 16": AttentionConfig(budget_frames=16, recent_frames=recent),
        "AnnSA 50 %": AttentionConfig(**base, sparse_density=0.5),
        "AnnSA 50 %, LSH": AttentionConfig(**base, sparse_density=0.5, index="lsh"),
        "AnnSA 25 %": AttentionConfig(**base, sparse_density=0.25),
        "AnnCA": AttentionConfig(**base, select_text=True),
    }


@torch.inference_mode()
def main(
    latent_frames: int = 96,
    scenarios: int = 6,
    every: Annotated[int, typer.Option(help="Sample the next chunk once in so many chunks.")] = 6,
    only: Annotated[str, typer.Option(help="Policies, separated by semicolons; all by default.")] = "",
    out: Path = Path("out/attention_quality"),
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    engine = StreamEngine.load("doom")
    default = engine.attention
    chosen = policies(default.budget_frames, default.recent_frames)
    if only:
        chosen = {name: chosen[name] for name in ("dense", *only.split("; "))}
    size, world = engine.shape.chunk_frames, engine.world
    reference: dict[tuple[str, int], np.ndarray] = {}
    rows = []
    for name, policy in chosen.items():
        got = {"psnr_dense": [], "psnr_truth": [], "recall": [], "density": [], "text": []}
        for index, scenario in enumerate(SCENARIOS[:scenarios]):
            moves = [
                m
                for m, _ in zip(
                    behaviour(scenario, np.random.default_rng(40 + index)), range(latent_frames), strict=False
                )
            ]
            frames, lived = play(scenario.name, moves, HELD_OUT + 5000 + index)
            lived -= lived % size
            latents = world.autoencoder.encode(to_video(torch.from_numpy(frames[:lived])))[None]
            actions = torch.stack([world.action_vector(move, "actions") for move in moves[:lived]])[None]
            prompt = world.config.scenarios[scenario.name].prompt
            options = StreamOptions(seed=5, start="nothing", measure_recall=name != "dense")
            stream = Stream(world, engine.shape, prompt, options, policy)
            for chunk in range(lived // size):
                part = slice(chunk * size, (chunk + 1) * size)
                stream.begin_chunk()
                if chunk >= 12 and chunk % every == 0:
                    video = engine.decode(engine.sample([stream], actions[:, part]))[0].numpy()
                    key = scenario.name, chunk
                    reference.setdefault(key, video)
                    got["psnr_dense"].append(psnr(video, reference[key]))
                    got["psnr_truth"].append(psnr(video, frames[part].reshape(video.shape)))
                engine.write([stream], latents[:, part], actions[:, part])
                stream.latent_frame += size
                if chunk >= 12 and chunk % every == 0:
                    executed = sum(cache.executed for cache in stream.caches)
                    got["density"].append(executed / sum(cache.possible for cache in stream.caches))
                    got["recall"] += [probe.recall for probe in stream.probes if probe is not None]
                    got["text"] += [text.kept for text in stream.text]
        rows.append({"policy": name, **{key: float(np.mean(value or [1.0])) for key, value in got.items()}})
        print({key: round(v, 3) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    lines = [
        "| policy | density % | recall % | PSNR vs dense | PSNR vs truth | prompt tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        beside_dense = "-" if row["policy"] == "dense" else f"{row['psnr_dense']:.1f}"
        shares = f"{100 * row['density']:.1f} | {100 * row['recall']:.1f}"
        lines.append(f"| {row['policy']} | {shares} | {beside_dense} | {row['psnr_truth']:.2f} | {row['text']:.1f} |")
    (out / "attention_quality.md").write_text("\n".join(lines) + "\n")
    (out / "attention_quality.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
