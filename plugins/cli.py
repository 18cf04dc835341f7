"""`fastar engine`: TensorRT engines of a world's graphs. What is heavy is imported by the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fastar_backend.config import AttentionConfig

app = typer.Typer(no_args_is_help=True, help="TensorRT engines: build, check, export (docs/tensorrt.md).")

World = Annotated[str, typer.Option(envvar="FASTAR_WORLD", help="A built-in world, or a folder with a world.json.")]
Attention = Annotated[str, typer.Option(envvar="FASTAR_ATTENTION", help="fastar, window, or JSON of all its settings.")]
Precision = Annotated[str, typer.Option(help="auto (the world's own), fp16, bf16 or fp32.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]


@app.command()
def build(
    out: Out,
    world: World = "doom",
    attention: Attention = "fastar",
    precision: Precision = "auto",
    plugins: Annotated[
        str, typer.Option(help="qdp: kernels inside the engine; library: beside it; auto: qdp where TensorRT has it.")
    ] = "auto",
    library: Annotated[
        Path | None, typer.Option(help="Plugin library that is built already (python -m plugins.build).")
    ] = None,
    arch: Annotated[
        int | None, typer.Option(help="Compute capability of the kernels: 80, 90, 100, 120.", show_default="the GPU's")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Streams that one pass may hold; the runner needs 1.")] = 1,
    timing_cache: Annotated[Path | None, typer.Option(help="TensorRT's measurements: read, then written.")] = None,
) -> None:
    """Build the engines of a world and attention, for this GPU and TensorRT."""
    from rich.progress import Progress

    from plugins import engines, pipeline

    settings, trt = attention_of(attention), engines.tensorrt("engine build")
    loaded = pipeline.load(world, precision)
    with Progress() as bars:
        tasks: dict[str, Any] = {}

        def show(graph: str, phase: str, share: float) -> None:
            if graph not in tasks:
                tasks[graph] = bars.add_task(graph, total=1.0)
            bars.update(tasks[graph], description=f"{graph:15} {phase:.40}", completed=share)

        made = pipeline.make(
            trt, loaded, settings, out, plugins=plugins, batch=batch, library=library, arch=arch,
            timing_cache=timing_cache, progress=show,
        )  # fmt: skip
        for graph, task in tasks.items():
            bars.update(task, description=f"{graph:15} built", completed=1.0)
    size = sum((out / name).stat().st_size for name in made.sha256)
    typer.echo(f"{out}: {len(made.graphs)} engines, {size / 1e6:.1f} MB, {made.place.tensorrt} {made.place.version}")


@app.command()
def check(
    folder: Path,
    world: World = "doom",
    attention: Annotated[
        str | None, typer.Option(help="As for build.", show_default="what the engine was built for")
    ] = None,
) -> None:
    """Say whether the engines in FOLDER are whole and are this world's, GPU's and TensorRT's."""
    from fastar_backend.config import AttentionConfig, parse
    from plugins import engines, pipeline

    metadata = engines.read(folder)
    settings = attention_of(attention) if attention else parse(AttentionConfig, metadata.attention, "attention")
    loaded = pipeline.load(world, metadata.precision)
    place = engines.here(engines.tensorrt("engine check"))
    engines.check(metadata, folder, place, loaded, settings, pipeline.DTYPES[metadata.precision])
    typer.echo(f"{folder}: fits {loaded.config.name}, {metadata.precision}, {place.tensorrt} {place.version}")


@app.command()
def export(
    out: Out, world: World = "doom", attention: Attention = "fastar", precision: Precision = "auto"
) -> None:  # fmt: skip
    """Write the graphs as ONNX, and build nothing: needs no TensorRT and no GPU."""
    from plugins import pipeline
    from plugins.export import export as write

    settings, loaded = attention_of(attention), pipeline.load(world, precision)
    for path in write(loaded, settings, out, None, pipeline.precision_of(loaded), typer.echo).values():
        typer.echo(path)


def attention_of(text: str) -> AttentionConfig:
    """A kind, or JSON. Raises InvalidInput."""
    from fastar_backend.config import AttentionConfig, parse
    from fastar_backend.errors import InvalidInput

    if not text.startswith("{"):
        return parse(AttentionConfig, {"kind": text}, "attention")
    try:
        return parse(AttentionConfig, json.loads(text), "attention")
    except ValueError as error:
        raise InvalidInput("attention", f"is not JSON ({error})", "a kind, or a JSON object") from None
