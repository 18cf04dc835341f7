"""`fastar eval` and `fastar eval report`. What takes seconds to import is imported when it is needed."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fastar_backend.errors import InvalidInput

app = typer.Typer(no_args_is_help=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    world: Annotated[str, typer.Option(help="A built-in world, or a folder with a world.json.")] = "doom",
    policies: Annotated[
        str, typer.Option(help="all, or names separated by commas; dense attention always runs beside them.")
    ] = "all",
    suite: Annotated[
        str, typer.Option(help="quick (15 minutes on two cores), full (hours, or a GPU) or ablations.")
    ] = "quick",
    frames: Annotated[int | None, typer.Option(help="Of a free rollout.", show_default="the suite's")] = None,
    seeds: Annotated[int | None, typer.Option(help="Of each scenario.", show_default="the suite's")] = None,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    budget: Annotated[int, typer.Option(help="Latent frames that bounded caches hold.")] = 12,
    parts: Annotated[
        str, typer.Option(help="Some of rollout, forced, revisit, drift, speed, separated by commas.")
    ] = "all",
    scenarios: Annotated[
        int | None, typer.Option(help="Of the world's, for rollouts.", show_default="the suite's")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Processes; each holds the model.", show_default="one a core; 1 on a GPU")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads where speed is measured.", show_default="all")
    ] = None,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="torchvision's alexnet-owt-7be5be79.pth; without it there is no LPIPS.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("out/evaluation"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")] = False,
    docs: Annotated[
        Path | None, typer.Option(help="A Markdown file to write the report to, too; pictures go to images/ beside it.")
    ] = None,
) -> None:
    """Measure how fast attention policies are, how much memory they take and how good they are."""
    if context.invoked_subcommand:
        return
    from fastar_backend.evaluation.metrics import check_packages
    from fastar_backend.evaluation.report import check_docs, write
    from fastar_backend.evaluation.runner import run
    from fastar_backend.evaluation.store import Store

    check_packages()
    check_docs(docs)
    given = {"frames": frames, "seeds": seeds, "scenarios": scenarios}
    sizes = sizes_of(suite, given)
    chosen = parts_of(parts, sizes.parts)
    if workers is not None and workers < 1:
        raise InvalidInput("--workers", f"got {workers}", "1 or more")
    if lpips_weights is not None:
        from fastar_backend.evaluation.lpips import Lpips

        Lpips.load(lpips_weights)
    say = Console(highlight=False, stderr=True)
    engine, settings, table = prepare(world, device, suite, sizes, budget, seed, policies, lpips_weights is not None)
    store = Store(out)
    store.begin(settings, table, resume)
    workers = workers or (1 if settings.device == "cuda" else os.cpu_count() or 1)
    say.print(
        f"[bold]{escape(world)}[/] on {settings.device}: {len(table)} policies, {', '.join(chosen)}; "
        f"processes: {workers}" + ("" if settings.truth is None else f"; no true frames: {settings.truth}")
    )
    began = time.monotonic()
    try:
        run(store, settings, table, chosen, workers, threads, lpips_weights, engine, say)
    except KeyboardInterrupt:
        say.print(f"Stopped. The same command with --resume goes on from {out}.")
        raise typer.Exit(130) from None
    say.print(f"Measured in {time.monotonic() - began:.0f} s.")
    for path in write(store, docs):
        typer.echo(path)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out folder of a run.")],
    docs: Annotated[
        Path | None, typer.Option(help="A Markdown file to write the report to, too; pictures go to images/ beside it.")
    ] = None,
) -> None:
    """Make the report again from what a run measured."""
    from fastar_backend.evaluation.report import write
    from fastar_backend.evaluation.store import Store

    for path in write(Store(folder), docs):
        typer.echo(path)


def sizes_of(suite: str, given: dict[str, int | None]):
    """The suite with what was given in its place. Raises InvalidInput."""
    from fastar_backend.evaluation.suites import SUITES

    if suite not in SUITES:
        raise InvalidInput("--suite", f"got {suite!r:.40}", ", ".join(SUITES))
    for name, value in given.items():
        if value is not None and value < 1:
            raise InvalidInput(f"--{name}", f"got {value}", "1 or more")
    return SUITES[suite].model_copy(update={name: value for name, value in given.items() if value is not None})


def parts_of(names: str, allowed: tuple[str, ...]):
    """Raises InvalidInput."""
    from fastar_backend.evaluation.suites import PARTS

    if names == "all":
        return allowed
    wanted = tuple(name.strip() for name in names.split(","))
    for name in wanted:
        if name not in PARTS:
            raise InvalidInput("--parts", f"unknown part {name!r:.40}", f"all, or some of {', '.join(PARTS)}")
    return wanted


def prepare(world: str, device: str, suite: str, sizes, budget: int, seed: int, policies: str, lpips: bool):
    """The engine, the run's settings and its policies. Raises InvalidInput, WeightsError."""
    import torch

    from fastar_backend.engine.engine import StreamEngine
    from fastar_backend.evaluation.scenes import why_no_truth
    from fastar_backend.evaluation.suites import Settings, choose, scenarios_of

    if budget < 1:
        raise InvalidInput("--budget", f"got {budget}", "at least a chunk's latent frames")
    if seed < 0:
        raise InvalidInput("--seed", f"got {seed}", "0 or more")
    if device not in ("auto", "cpu", "cuda"):
        raise InvalidInput("--device", f"got {device!r:.40}", "auto, cpu, cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    choose(policies, suite, max(budget, 64), 1)  # names are checked before the world is loaded
    engine = StreamEngine.load(world, device)
    config = engine.world.config
    if sizes.frames < config.chunk_frames:
        raise InvalidInput("--frames", f"got {sizes.frames}", f"at least a chunk, {config.chunk_frames}")
    table = choose(policies, suite, budget, engine.shape.chunk_frames)
    settings = Settings(
        world=world, name=config.name, fingerprint=engine.fingerprint, device=device, truth=why_no_truth(config),
        buttons=config.model.action_dim > 0, suite=suite, sizes=sizes, budget=budget, seed=seed,
        scenarios=scenarios_of(config), lpips=lpips,
        versions={"python": platform.python_version(), "torch": torch.__version__, "machine": machine(device)},
    )  # fmt: skip
    return engine, settings, table


def machine(device: str) -> str:
    """Names the processor and, where it counts, the GPU."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = f"{os.cpu_count()} cores of {model}"
    return cores if device == "cpu" else f"{torch.cuda.get_device_name()}, {cores}"
