"""What one server is to be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fastar_backend.config import AttentionConfig, ExecutionConfig
from fastar_backend.errors import FastarError
from fastar_backend.service.config import ServiceConfig


class ServerError(FastarError):
    """The server cannot be started, or died more often than it may."""

    code = "UNAVAILABLE"


class ServeSettings(ExecutionConfig):
    """Ports: 0 picks a free one. Times in seconds."""

    host: str = "127.0.0.1"
    http_port: int = Field(8000, ge=0, le=65535)
    grpc_port: int = Field(8001, ge=0, le=65535)
    metrics_port: int = Field(8002, ge=0, le=65535)
    admin_port: int | None = Field(None, ge=0, le=65535)  # see admin.py; None: no such port
    world: str = "doom"  # a built-in name, or a folder with a world.json
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: AttentionConfig = AttentionConfig()  # or its JSON, or a kind alone
    service: ServiceConfig = ServiceConfig()  # its fields may also be given here, beside the others
    threads: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1, le=1024)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    model_repository: Path | None = None  # None: the one of this checkout
    exit_timeout: float = Field(30.0, ge=0, le=3600)  # what live streams get to finish when the server is stopped
    startup_timeout: float = Field(600.0, gt=0)
    canary_seconds: float = Field(5.0, gt=0)
    hang_seconds: float = Field(120.0, gt=0)  # a canary request unanswered for so long means a hung model
    # Triton's own trace of one request in so many, to the collector that the OTEL_* variables name; 0: none. A stream
    # whose first request is among them hangs below Triton's span; a client's trace context makes all its requests so.
    trace_rate: int = Field(0, ge=0)
    max_restarts: int = Field(5, ge=0)  # in a row; a healthy minute forgives all
    # PEM files. The health check calls the server by `tls_name`, trusts `tls_certificate` and, with mutual TLS, shows
    # it: there the server's certificate must be signed by `tls_client_ca`, too.
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # mutual TLS: clients need a certificate that it signed
    tls_name: str = "localhost"

    @model_validator(mode="before")
    @classmethod
    def _service(cls, values: Any) -> Any:
        """Moves the service's fields into `service`."""
        if not isinstance(values, dict):
            return values
        flat = {name: value for name, value in values.items() if name in ServiceConfig.model_fields}
        service = values.get("service", {})
        service = service.model_dump() if isinstance(service, ServiceConfig) else service
        rest = {name: value for name, value in values.items() if name not in flat and name != "service"}
        return rest | {"service": service | flat if isinstance(service, dict) else service}

    @model_validator(mode="after")
    def _tls(self) -> ServeSettings:
        if (self.tls_certificate is None) != (self.tls_key is None) or (self.tls_client_ca and not self.tls_key):
            raise ValueError("tls_certificate and tls_key go together, and tls_client_ca with both")
        return self

    @model_validator(mode="after")
    def _collector(self) -> ServeSettings:
        if self.trace_rate and not self.trace_url:
            raise ValueError("trace_rate needs a collector: set OTEL_EXPORTER_OTLP_ENDPOINT")
        return self

    @property
    def http_host(self) -> str:
        """Triton's HTTP has no TLS: beside a gRPC port that has, only this machine reaches it."""
        return "127.0.0.1" if self.tls_key else self.host

    @property
    def trace_url(self) -> str | None:
        """Of the OTLP/HTTP collector."""
        base = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        return os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or (base and f"{base.rstrip('/')}/v1/traces")

    @field_validator("attention", mode="before")
    @classmethod
    def _attention(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return json.loads(value) if value.startswith("{") else {"kind": value}
