from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_world as tiny_world_module

from fastar_backend.serve import Server, ServeSettings

HERE = Path(__file__).parent
FREE_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
SMALL = {"kind": "fastar", "budget_frames": 4, "recent_frames": 2}  # latent frames: quick
STREAMS = 3


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    return tiny_world_module.write(tmp_path_factory.mktemp("world") / "tiny")


@pytest.fixture(scope="session")
def server(tiny_world):
    """The real engine."""
    settings = ServeSettings(
        **FREE_PORTS, world=str(tiny_world), device="cpu", max_streams=STREAMS, attention=SMALL, idle_seconds=30,
        exit_timeout=3,
    )  # fmt: skip
    with Server(settings) as server:
        yield server


@pytest.fixture(scope="session")
def fake_repository(tmp_path_factory) -> Path:
    """The real edge over tests/serve/fake_engine.py, for failures that the real engine does not have."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(HERE.parents[1] / "model_repository" / "fastar", folder / "fastar")
    model = folder / "fastar" / "1" / "model.py"
    marker = "import functools\n"
    text = model.read_text()
    assert marker in text
    install = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport fake_engine\nfake_engine.install()\n"
    model.write_text(text.replace(marker, install + marker, 1))
    return folder


@pytest.fixture
def fake_settings(fake_repository) -> ServeSettings:
    return ServeSettings(**FREE_PORTS, model_repository=fake_repository, max_streams=2, idle_seconds=1, exit_timeout=3)


@pytest.fixture(scope="module")
def fake_server(fake_repository):
    settings = ServeSettings(
        **FREE_PORTS, model_repository=fake_repository, max_streams=2, idle_seconds=1, exit_timeout=3
    )
    with Server(settings) as server:
        yield server
