"""Shared fixtures: a world with random weights, and the embedded one."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is imported: without a GPU they run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.interpreter import interpreter_builder

    # Of overflowing integers: without TRITON_DEBUG checked and never told, for a fifth of the interpreter's time.
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
sys.path.insert(0, str(Path(__file__).parents[1]))  # for `training`, which is not installed

import random_world
import running_redis

from fastar_backend.model.world import World, load_world

EMBEDDED_WORLD = "doom"
# Files of a minute each. They come first, so that no process works alone at the end (Makefile: one takes a file).
LONGEST = ("serve_failures", "serve_many", "plugins_export", "plugins_engines", "engine_graphs", "k8s_fleet",
           "attention_flat", "serve_client")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors: threads only wait for each other, for long where the cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    """Folder of a world with random weights; read-only."""
    return random_world.write(tmp_path_factory.mktemp("world") / "random")


@pytest.fixture
def redis(tmp_path):
    """An empty one."""
    with running_redis.running_redis(tmp_path) as redis:
        yield redis


@pytest.fixture(scope="session")
def world(tiny_world) -> World:
    return load_world(str(tiny_world), "cpu")


@pytest.fixture(scope="session")
def doom_world() -> World:
    """The embedded world; it ships with the package, so its absence is a failure, not a skip."""
    return load_world(EMBEDDED_WORLD, "cpu")
