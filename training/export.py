"""Packs trained weights into a world's folder: world.json, weights.safetensors, starts/*.png (real first frames).

python -m training.export --weights out/world/decoder.safetensors --out fastar_backend/worlds/doom
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from fastar_backend.evaluation.game import BUTTONS, FRAMES_PER_LATENT, SCENARIOS, TICS_PER_FRAME, Game, vector
from fastar_backend.model.world import Scenario, Start, WorldConfig
from training.prompts import PHRASES
from training.train import MODEL, SAMPLER

KEYWORDS = {
    "my_way_home": ("maze", "labyrinth", "metal", "home", "panels"),
    "basic": ("brick", "bricks", "cacodemon", "basic"),
    "deadly_corridor": ("corridor", "soldiers", "tunnel", "passage", "zombies"),
    "health_gathering": ("medkits", "acid", "slime", "health", "medical"),
    "defend_the_center": ("arena", "circular", "round", "center", "centre"),
    "take_cover": ("fireballs", "cover", "imps", "dodge", "hall"),
}
# What is done while the start is recorded (one action a latent frame); it ends looking at something worth seeing.
START_ACTIONS = ("", "", "turn_left", "")


def record(scenario: str, seed: int) -> np.ndarray:
    """uint8 [height, width * frames, 3]: the frames of START_ACTIONS from the scenario's beginning, side by side."""
    game = Game(scenario, seed)
    frames = []
    for action in START_ACTIONS:
        frames += game.step(vector(action))
    game.close()
    return np.concatenate(frames, axis=1)


def plot(curves: Path) -> None:
    """The loss curves of all stages, four in a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = json.loads(curves.read_text())
    rows = -(-len(stages) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(14, 3 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(stages) :]:
        axis.axis("off")
    for axis, (name, curve) in zip(axes.flat, stages.items(), strict=False):
        axis.plot(curve["step"], curve.get("psnr") or curve["loss"])
        axis.set(title=name, xlabel="step", ylabel="PSNR (dB)" if "psnr" in curve else "weighted x0 loss")
    figure.savefig(curves.with_suffix(".png"), dpi=100)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--weights", type=Path, required=True)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--curves", type=Path, help="curves.json of the training: also drawn to <its name>.png")
    cli.add_argument("--seed", type=int, default=90010, help="of the game; not one used for training")
    args = cli.parse_args()
    (args.out / "starts").mkdir(parents=True, exist_ok=True)
    config = WorldConfig(
        name=args.out.name,
        native_fps=35 / TICS_PER_FRAME,
        frames_per_latent=FRAMES_PER_LATENT,
        buttons=BUTTONS,
        scenarios={s.name: Scenario(prompt=PHRASES[s.name][1], keywords=KEYWORDS[s.name]) for s in SCENARIOS},
        starts={s.name: Start(scenario=s.name, actions=START_ACTIONS) for s in SCENARIOS},
        model=MODEL,
        sampler=SAMPLER,
    )
    (args.out / "world.json").write_text(config.model_dump_json(indent=2) + "\n")
    shutil.copyfile(args.weights, args.out / "weights.safetensors")
    if args.curves:
        plot(args.curves)
    for scenario in SCENARIOS:
        Image.fromarray(record(scenario.name, args.seed)).save(args.out / "starts" / f"{scenario.name}.png")


if __name__ == "__main__":
    main()
