"""What one server is to be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from fastar_backend.config import AttentionConfig, Config
from fastar_backend.errors import FastarError


class ServerError(FastarError):
    """The server cannot be started, or died more often than it may."""

    code = "UNAVAILABLE"


class ServeSettings(Config):
    """Ports: 0 picks a free one. Times in seconds."""

    host: str = "127.0.0.1"
    http_port: int = Field(8000, ge=0, le=65535)
    grpc_port: int = Field(8001, ge=0, le=65535)
    metrics_port: int = Field(8002, ge=0, le=65535)
    world: str = "doom"  # a built-in name, or a folder with a checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: AttentionConfig = AttentionConfig()  # or its JSON, or a kind alone
    max_streams: int = Field(8, ge=1, le=200)
    idle_seconds: float = Field(60.0, ge=1, le=86400)  # a stream without requests for so long is dropped
    threads: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1, le=1024)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    model_repository: Path | None = None  # None: the one of this checkout
    exit_timeout: float = Field(30.0, ge=0, le=3600)  # what live streams get to finish when the server is stopped
    startup_timeout: float = Field(600.0, gt=0)
    canary_seconds: float = Field(5.0, gt=0)
    hang_seconds: float = Field(120.0, gt=0)  # a canary request unanswered for so long means a hung model
    max_restarts: int = Field(5, ge=0)  # in a row; a healthy minute forgives all

    @field_validator("attention", mode="before")
    @classmethod
    def _attention(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return json.loads(value) if value.startswith("{") else {"kind": value}
