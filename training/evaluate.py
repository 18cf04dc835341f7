"""Evaluates a world against the game it learned, as training goes on: PSNR by history length, long rollouts. How
attention policies compare is for `fastar eval`, places seen again too.

    python -m training.evaluate --world fastar_backend/worlds/doom --out out/training [--part history|rollout]

history: the next chunk predicted after true frames, for histories of several lengths, against the true frames.
rollout: 2880 frames per scenario with the default attention; a contact sheet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import ChunkRequest, Stream, StreamOptions
from fastar_backend.evaluation.game import HELD_OUT, SCENARIOS, behaviour, play
from fastar_backend.evaluation.metrics import decibels, squared_errors
from training.autoencoder import to_video

ROLLOUT_MARKS = (0, 100, 500, 1000, 2000, 2876)


def predictions(engine: StreamEngine, policies: dict[str, AttentionConfig], prompt: str, frames: np.ndarray,
                actions: list[str], wanted: set[int]) -> list[dict]:  # fmt: skip
    """Each policy's PSNR at each chunk in `wanted`, every chunk before it being the true one."""
    size = engine.shape.chunk_frames
    with torch.inference_mode():
        latents = engine.world.autoencoder.encode(to_video(torch.from_numpy(frames)).to(engine.dtype))
        moves = torch.stack([engine.world.action_vector(action, "actions") for action in actions])
        streams = {
            name: Stream(engine.world, engine.shape, prompt, StreamOptions(seed=5, start="nothing"), policy)
            for name, policy in policies.items()
        }
        rows = []
        for chunk in range(len(latents) // size):
            part = slice(chunk * size, (chunk + 1) * size)
            x0, move = latents[None, part], moves[None, part]
            truth = frames[part].reshape(-1, *frames.shape[2:])
            for name, stream in streams.items():
                stream.begin_chunk()
                if chunk in wanted:
                    predicted = engine.decode([stream], engine.sample([stream], move))[0].numpy()
                    rows.append({"policy": name, "chunk": chunk, "psnr": decibels(squared_errors(predicted, truth))})
                engine.write([stream], x0, move)
                stream.latent_frame += size
    return rows


def by(rows: list[dict], key) -> dict:
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row["psnr"])
    return {k: (float(np.mean(v)), float(np.std(v) / len(v) ** 0.5), len(v)) for k, v in groups.items()}


def history(engine: StreamEngine, out: Path, runs: int, latent_frames: int, names: list[str]) -> None:
    """The same chunks (late in long true videos), seen through windows of several lengths and the whole history."""
    windows = [w for w in (2, 6, 12, 32, 64, 128) if w < latent_frames - 8]
    policies = {str(w): AttentionConfig(kind="window", budget_frames=w) for w in windows}
    policies["all"] = AttentionConfig(kind="dense")
    policies["fastar"] = AttentionConfig()
    chunks = latent_frames // engine.shape.chunk_frames
    wanted = set(range(chunks - 8, chunks))
    rows = []
    for index, scenario in enumerate(s for s in SCENARIOS if s.name in names):
        for run in range(runs):
            rng = np.random.default_rng(run)
            moves = [move for move, _ in zip(behaviour(scenario, rng), range(latent_frames), strict=False)]
            frames, _ = play(scenario.name, moves, HELD_OUT + 100 * index + run)
            if len(frames) < latent_frames:
                continue
            prompt = engine.world.config.scenarios[scenario.name].prompt
            found = predictions(engine, policies, prompt, frames, moves, wanted)
            rows += [{**row, "scenario": scenario.name, "run": run} for row in found]
            print(
                scenario.name, run, {k: round(v[0], 2) for k, v in by(found, lambda r: r["policy"]).items()}, flush=True
            )
    save(out / "history.json", rows)
    plot_history(rows, windows, latent_frames, out / "history.png")


def plot_history(rows: list[dict], windows: list[int], latent_frames: int, path: Path) -> None:
    """Error bars: standard errors over the chunks after each chunk's own mean over the policies was taken off."""
    chunks: dict[tuple, dict[str, float]] = {}
    for row in rows:
        chunks.setdefault((row["scenario"], row.get("run"), row["chunk"]), {})[row["policy"]] = row["psnr"]
    table = {
        name: np.array([chunk[name] for chunk in chunks.values()]) for name in (*map(str, windows), "all", "fastar")
    }
    level = np.mean(list(table.values()), 0)
    mean = {name: float(values.mean()) for name, values in table.items()}
    error = {name: float((values - level).std() / len(values) ** 0.5) for name, values in table.items()}
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    names = [*map(str, windows), "all"]
    places = [2 * w for w in windows] + [2 * (latent_frames - 8)]
    axis.errorbar(
        places, [mean[n] for n in names], [error[n] for n in names], marker="o", capsize=3, label="whole window"
    )
    axis.axhline(mean["fastar"], color="C1", label=f"FAST-AR, {AttentionConfig().budget_frames} latent frames")
    axis.set(xscale="log", xlabel="history (video frames)", ylabel="PSNR against the true next 4 frames (dB)")
    axis.legend()
    figure.savefig(path, dpi=120)


def rollout(engine: StreamEngine, out: Path, frames: int, names: list[str]) -> None:
    """The scenarios `names` in one batch with the default attention; a strip of the frames at the marks for each."""
    moves = {s.name: behaviour(s, np.random.default_rng(3)) for s in SCENARIOS}
    for index, name in enumerate(names):
        engine.open(index, engine.world.config.scenarios[name].prompt, StreamOptions(seed=11, start=name))
    kept: dict[str, list[np.ndarray]] = {name: [] for name in names}
    size, chunk_frames = engine.shape.chunk_frames, engine.world.config.chunk_frames
    for chunk in range(frames // chunk_frames):
        requests = [ChunkRequest(i, tuple(next(moves[name]) for _ in range(size))) for i, name in enumerate(names)]
        first = chunk * chunk_frames
        for name, result in zip(names, engine.step(requests), strict=True):
            kept[name] += [result.frames[m - first] for m in ROLLOUT_MARKS if first <= m < first + chunk_frames]
        if chunk % 60 == 0:
            print(f"rollout: frame {first}", flush=True)
    for name in names:
        Image.fromarray(np.concatenate(kept[name], axis=1)).save(out / f"rollout-{name}.png")
    strips = {s.name: out / f"rollout-{s.name}.png" for s in SCENARIOS}
    if all(path.exists() for path in strips.values()):
        contact_sheet(strips, out / "rollout.png")


def contact_sheet(strips: dict[str, Path], path: Path) -> None:
    """All strips below each other, doubled in size, with names and frame numbers."""
    rows = {name: Image.open(strip) for name, strip in strips.items()}
    width, height = next(iter(rows.values())).size
    sheet = Image.new("RGB", (130 + 2 * width, 20 + len(rows) * (2 * height + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, mark in enumerate(ROLLOUT_MARKS):
        draw.text((134 + column * 2 * width // len(ROLLOUT_MARKS), 4), f"frame {mark}", fill="black")
    for row, (name, strip) in enumerate(rows.items()):
        top = 20 + row * (2 * height + 4)
        draw.text((4, top + height), name, fill="black")
        sheet.paste(strip.resize((2 * width, 2 * height), Image.Resampling.NEAREST), (130, top))
    sheet.save(path, optimize=True)


def save(path: Path, rows: list[dict]) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--world", default="doom")
    cli.add_argument("--out", type=Path, default=Path("out/training"))
    cli.add_argument("--part", choices=("history", "rollout"), action="append")
    cli.add_argument("--scenario", action="append", help="of history and rollout; all by default")
    cli.add_argument("--runs", type=int, default=3)
    cli.add_argument("--latent-frames", type=int, default=160, help="of the history test")
    cli.add_argument("--frames", type=int, default=2880, help="of the rollouts")
    cli.add_argument("--device", default="cpu")
    args = cli.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    engine = StreamEngine.load(args.world, args.device, max_streams=len(SCENARIOS))
    names = args.scenario or [scenario.name for scenario in SCENARIOS]
    for part in args.part or ("history", "rollout"):
        if part == "history":
            history(engine, args.out, args.runs, args.latent_frames, names)
        else:
            rollout(engine, args.out, args.frames, names)


if __name__ == "__main__":
    main()
