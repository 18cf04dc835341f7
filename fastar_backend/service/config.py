"""Every limit of the service in one place. The defaults work; `fastar serve --config FILE` changes them."""

from __future__ import annotations

from pydantic import Field

from fastar_backend.config import Config


class ServiceConfig(Config):
    """Times in seconds, sizes in bytes."""

    # Admission
    max_streams: int = Field(8, ge=1, le=200)
    max_streams_per_tenant: int | None = Field(None, ge=1)  # None: max_streams
    max_batch: int | None = Field(None, ge=1)  # streams in one step; None: max_streams
    cache_bytes: int | None = Field(None, gt=0)  # of all streams' caches; None: half of the free memory at start
    utilisation: float = Field(0.9, gt=0, le=1)  # share of the time that streams with a frame rate may book
    max_fps: float = Field(240.0, gt=0)
    # Life
    idle_seconds: float = Field(60.0, ge=1, le=86400)  # without any request (a keepalive counts)
    paused_seconds: float = Field(600.0, ge=1, le=86400)
    wall_seconds: float = Field(86400.0, ge=1)  # a stream's whole life
    # Rates
    pending_requests: int = Field(4, ge=2, le=64)  # of one stream: two in flight, and some room for races
    controls_per_second: float = Field(100.0, gt=0)  # of one stream, bursts of as many allowed
    # Snapshots
    # An fsspec URL, or redis://...; None: a private folder that lives as long as `fastar serve`
    snapshots: str | None = None
    snapshot_chunks: int = Field(48, ge=0)  # one every so many chunks; 0: only when asked, and at a stream's abrupt end
    snapshots_kept: int = Field(2, ge=1, le=64)  # newest ones of each stream
    snapshot_ttl: float = Field(3600.0, ge=1)  # a snapshot lives so long
    # Execution
    deterministic: bool = False  # every stream is stepped alone: its bits never depend on its neighbours; slower
