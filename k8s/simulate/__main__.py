"""`python -m k8s.simulate`: a day under the autoscaler that ships; prints tables, draws k8s/images/day.png."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from k8s.simulate.capacity import table
from k8s.simulate.fleet import CONTROLLED, LEAST, PACKED, RANDOM, Demand, simulate
from k8s.simulate.hpa import Behavior, Policy, Rules
from k8s.simulate.manifest import ROOT, ManifestError, Shipped, limits, render
from k8s.simulate.plot import draw

KUBERNETES = Behavior(  # what an autoscaler without `behavior` does
    Rules(0, (Policy("Percent", 100, 15), Policy("Pods", 4, 15))), Rules(300, (Policy("Percent", 100, 15),))
)
FIGURES = ("pod hours", "slots used", "waited at all", "waited, seconds, p99", "waited, seconds, most", "moved an hour")


def variants(shipped: Shipped) -> dict[str, tuple[Shipped, bool]]:
    """Name -> policy, and whether the buffer counts."""

    def with_(**directions: Rules) -> tuple[Shipped, bool]:
        return dataclasses.replace(shipped, behavior=dataclasses.replace(shipped.behavior, **directions)), True

    up, down = shipped.behavior.up, shipped.behavior.down
    return {
        "**as shipped**": (shipped, True),
        "without the buffer B": (shipped, False),
        "down: window 300 s": with_(down=dataclasses.replace(down, window=300.0)),
        "down: window 1800 s": with_(down=dataclasses.replace(down, window=1800.0)),
        "down: 1 pod in 120 s only": with_(down=dataclasses.replace(down, policies=(Policy("Pods", 1, 120),))),
        "down: 10 % in 120 s": with_(down=dataclasses.replace(down, policies=(Policy("Percent", 10, 120),))),
        "up: 4 pods in 60 s only": with_(up=dataclasses.replace(up, policies=(Policy("Pods", 4, 60),))),
        "Kubernetes' defaults": (dataclasses.replace(shipped, behavior=KUBERNETES), True),
    }


def compare(shipped: Shipped, demand: Demand, seed: int, slow: float) -> str:
    """Markdown: each variant, with the stream controller's placement, and with the gateway's."""
    lines = [f"| policy | placement | {' | '.join(FIGURES)} |", f"|{'---|' * (len(FIGURES) + 2)}"]
    for name, (policy, buffer) in variants(shipped).items():
        placements = {"controller": CONTROLLED, "gateway": LEAST} | (
            {"ideal": PACKED, "any pod": RANDOM} if policy is shipped and buffer else {}
        )
        for label, placement in placements.items():
            values = simulate(policy, demand, placement, seed, buffer, slow).summary()
            cells = [f"{values[f]:.0%}" if "used" in f or "at all" in f else f"{values[f]:.4g}" for f in FIGURES]
            lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m k8s.simulate", description=__doc__)
    parser.add_argument("--overlay", default="prod-h100", help="a folder of k8s/overlays (%(default)s)")
    parser.add_argument("--streams", type=positive, default=Demand.streams, help="live at once, mean (%(default)g)")
    parser.add_argument("--life", type=positive, default=Demand.life, help="seconds of a stream, mean (%(default)g)")
    parser.add_argument("--crowd", type=positive, default=Demand.crowd, help="of the flash crowd (%(default)g)")
    parser.add_argument(
        "--largest", type=lambda text: int(positive(text)), help="another maxReplicaCount than what ships"
    )
    parser.add_argument("--hours", type=positive, default=24.0, help="of the day (%(default)g)")
    parser.add_argument("--slow", type=share, default=0.0, help="share of the pods that become slow (%(default)g)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="other policies beside the shipped one")
    parser.add_argument("--out", type=Path, default=ROOT / "images" / "day.png", help="(%(default)s)")
    arguments = parser.parse_args()
    try:
        objects = render(ROOT / "overlays" / arguments.overlay)
        shipped = Shipped.of(objects)
    except ManifestError as error:
        parser.error(str(error))
    if arguments.largest:
        shipped = dataclasses.replace(shipped, largest=arguments.largest)
    demand = Demand(
        streams=arguments.streams, life=arguments.life, crowd=arguments.crowd, seconds=3600 * arguments.hours
    )
    runs = {
        placement.name: simulate(shipped, demand, placement, arguments.seed, slow=arguments.slow)
        for placement in (LEAST, CONTROLLED)
    }
    for name, run in runs.items():
        print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in run.summary().items())}")
    title = (
        f"A day of {demand.streams:g} live streams (mean), a crowd of {demand.crowd:g}x; "
        f"{shipped.slots} streams a pod, {shipped.start_seconds:g} s to start one"
    )
    draw(runs, demand, title, arguments.out)
    print(f"wrote {arguments.out}")
    if arguments.compare:
        print(compare(shipped, demand, arguments.seed, arguments.slow))
    print(table(shipped, demand.life, 16.0, limits(objects).snapshot_chunks))


if __name__ == "__main__":
    main()
