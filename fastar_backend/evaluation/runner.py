"""Runs the units of an evaluation: scenes first, then dense attention (the others' reference) and long rollouts, then
the rest on several processes with one thread each, and speed last, alone. What is done is not done again."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.errors import FastarError
from fastar_backend.evaluation import scenes
from fastar_backend.evaluation.forced import measure_forced
from fastar_backend.evaluation.lab import Lab
from fastar_backend.evaluation.lpips import Lpips
from fastar_backend.evaluation.revisit import measure_revisit
from fastar_backend.evaluation.rollout import measure_drift, measure_rollout
from fastar_backend.evaluation.speed import measure_speed
from fastar_backend.evaluation.store import Store, Unit
from fastar_backend.evaluation.suites import DRIFT, Part, Settings

MEASURES: dict[str, Callable[[Lab, Unit], dict[str, Any]]] = {
    "rollout": measure_rollout, "forced": measure_forced, "revisit": measure_revisit, "drift": measure_drift,
}  # fmt: skip
_lab: Lab | None = None  # of a worker process


def plan(settings: Settings, policies: Sequence[str], parts: Sequence[Part]) -> list[Unit]:
    """All units in the order in which they are begun: long ones first, but dense attention's ahead of what needs it."""
    sizes, names, first = settings.sizes, settings.scenarios, settings.seed
    seeds = range(first, first + sizes.seeds)
    units = []
    for policy in policies:
        if "drift" in parts and policy in (*DRIFT, *(["dense"] if settings.device == "cuda" else [])):
            units.append(Unit("drift", policy, names[0], first))
        for seed in seeds:
            if "rollout" in parts:
                units += [Unit("rollout", policy, name, seed) for name in names[: sizes.scenarios]]
            if "forced" in parts:
                units += [Unit("forced", policy, name, seed) for name in names[: sizes.forced_scenarios]]
            if "revisit" in parts and settings.truth is None:
                places = itertools.product(names[: sizes.revisit_scenarios], sizes.revisit_kinds)
                units += [Unit("revisit", policy, name, seed, kind) for name, kind in places]
    units.sort(key=lambda unit: (unit.policy != "dense", unit.part != "drift"))
    if "speed" in parts:
        units += [Unit("speed", policy, "", first) for policy in policies]
    return units


def run(store: Store, settings: Settings, policies: dict[str, AttentionConfig], parts: Sequence[Part], workers: int,
        threads: int | None, lpips: Path | None, engine: StreamEngine, console: Console) -> None:  # fmt: skip
    """engine: of the settings' world; measures here if there is one worker. Raises FastarError."""
    units = plan(settings, list(policies), parts)
    done = store.units()
    todo = [unit for unit in units if unit.key not in done or not _there(store, unit, engine)]
    columns = (TextColumn("{task.description:44s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("scenes", total=len(units), completed=len(units) - len(todo))
        make_scenes(store, settings, engine, todo)

        def finished(unit: Unit, result: dict[str, Any]) -> None:
            store.add(unit, result)
            progress.update(task, advance=1, description=unit.key)
            if not console.is_terminal:
                console.print(f"{progress.tasks[0].completed:.0f}/{len(units)} {unit.key}")

        alone = [unit for unit in todo if unit.part == "speed"]
        first = [unit for unit in todo if unit.part == "drift" or (unit.policy == "dense" and unit not in alone)]
        stages = [first, [unit for unit in todo if unit not in (*first, *alone)]]
        job = (store.folder, settings, policies, lpips)
        if workers == 1:
            lab = Lab(engine, store, settings, policies, Lpips.load(lpips) if lpips else None)
            with single_thread():
                for unit in [*stages[0], *stages[1]]:
                    progress.update(task, description=unit.key)
                    finished(unit, measure(lab, unit))
        elif stages[0] or stages[1]:
            for unit, result in in_processes(stages, workers, job):
                finished(unit, result)
        for unit in alone:
            progress.update(task, description=unit.key)
            marks = settings.sizes.marks
            finished(unit, measure_speed(settings.world, settings.device, policies[unit.policy], marks, threads))


def _there(store: Store, unit: Unit, engine: StreamEngine) -> bool:
    """Whether what a finished unit left beside its line is there, too."""
    if unit.policy != "dense" or unit.part not in ("rollout", "forced"):
        return True
    return store.reference(f"{unit.part}-{scenes.scene_name(unit.kind, unit.scenario, unit.seed)}").exists()


def make_scenes(store: Store, settings: Settings, engine: StreamEngine, units: Sequence[Unit]) -> None:
    """Those that the units need and that are not there yet."""
    world, sizes = engine.world.config, settings.sizes
    chunk = engine.shape.chunk_frames
    for unit in units:
        if (
            unit.part == "speed"
            or (store.scenes / f"{scenes.scene_name(unit.kind, unit.scenario, unit.seed)}.npz").exists()
        ):
            continue
        first = unit.scenario == settings.scenarios[0] and unit.seed == settings.seed
        frames = max(sizes.frames, sizes.drift_frames if first else 0)
        latents = max(frames // world.frames_per_latent + scenes.CONTEXT, sizes.forced_latents) + 2 * chunk
        scene = scenes.make(world, unit.kind, unit.scenario, unit.seed, latents, settings.truth is None)
        scenes.save(scene, store.scenes)


def measure(lab: Lab, unit: Unit) -> dict[str, Any]:
    """A unit's result, with the seconds it took."""
    began = time.perf_counter()
    result = MEASURES[unit.part](lab, unit)
    return {**result, "seconds": round(time.perf_counter() - began, 2)}


def in_processes(stages: list[list[Unit]], workers: int, job: tuple) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """Results as they come; a stage begins when the one before it has ended. One thread a process: two of them make
    half as many chunks again as one with two threads, and no bit depends on how many there are. Raises FastarError."""
    # Not PyTorch's threads only: FLIP has a pool of its own, and two that spin for a core take ten times as long.
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare, job)
    try:
        for stage in stages:
            waiting: dict[Future, Unit] = {pool.submit(_work, unit): unit for unit in stage}
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
    except BrokenProcessPool:
        raise FastarError("--workers: a process died (memory?); allowed: fewer of them, and --resume") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        os.environ.pop("OMP_NUM_THREADS")
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


def _prepare(folder: Path, settings: Settings, policies: dict[str, AttentionConfig], lpips: Path | None) -> None:
    """In a worker process. Ctrl-C ends it at once: the unit is made again by --resume."""
    global _lab
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    engine = StreamEngine.load(settings.world, settings.device)
    _lab = Lab(engine, Store(folder), settings, policies, Lpips.load(lpips) if lpips else None)


def _work(unit: Unit) -> dict[str, Any]:
    try:
        return measure(_lab, unit)
    except FastarError as error:
        raise FastarError(str(error)) from None  # one that crosses processes: others have other arguments


def _end_with(parent: int) -> None:
    """A worker does not outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Within it PyTorch computes on one thread, as worker processes do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
