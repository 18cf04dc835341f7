"""How a stream went, on the client's clock: one record per chunk, and what a viewer would have seen.

F is the target frame rate, n_i the frames of chunk i, t_i the time its last byte arrived. Steady chunks are those after
the server's cache is full, as the cost of a chunk grows until then.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fastar_client.protocol import Chunk


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One chunk. Times in seconds since the stream was opened."""

    chunk: int
    frames: int  # delivered
    sent: float
    received: float
    cache_tokens: float
    density: float
    step_seconds: float
    batch: int
    process_bytes: int
    prompt_applied: bool


class ArrivalLog:
    """`add` every chunk; `metrics` at any time. fps: the rate the stream is paced to, None if it is not."""

    def __init__(self, opened_at: float, fps: float | None = None) -> None:
        self.opened_at = opened_at  # seconds, time.monotonic
        self.fps = fps
        self.arrivals: list[Arrival] = []

    def add(self, chunk: Chunk) -> None:
        stats = chunk.stats
        self.arrivals.append(
            Arrival(
                chunk=stats.chunk,
                frames=len(chunk.frames),
                sent=chunk.sent_at - self.opened_at,
                received=chunk.received_at - self.opened_at,
                cache_tokens=stats.cache_tokens,
                density=stats.density,
                step_seconds=stats.step_seconds,
                batch=stats.batch,
                process_bytes=stats.process_bytes,
                prompt_applied=stats.prompt_applied,
            )
        )

    def recent_fps(self, chunks: int = 8) -> float | None:
        """Frames per second over the last few chunks; None before the second chunk."""
        last = self.arrivals[-chunks - 1 :]
        seconds = last[-1].received - last[0].received if len(last) > 1 else 0.0
        return sum(a.frames for a in last[1:]) / seconds if seconds > 0 else None

    def as_json(self) -> dict[str, Any]:
        return {"metrics": self.metrics(), "chunks": [dataclasses.asdict(a) for a in self.arrivals]}

    def metrics(self) -> dict[str, Any]:
        """Seconds, ratios and frames per second; None where too few chunks arrived to tell."""
        first = next((a.received for a in self.arrivals if a.frames), None)
        last = self.arrivals[-1].received if self.arrivals else None
        frames = sum(a.frames for a in self.arrivals)
        full = cache_full_from([a.cache_tokens for a in self.arrivals])
        anchor = 0 if full is None else full
        steady = self.arrivals[anchor + 1 :]
        received = np.array([a.received for a in self.arrivals[anchor:]])
        intervals = np.diff(received)  # of the steady chunks
        counts = np.array([a.frames for a in steady])
        span = float(intervals.sum())
        steady_fps = counts.sum() / span if span > 0 else None
        jitter = abs(intervals - counts / (self.fps or steady_fps)) if steady_fps else np.array([])
        return {
            "frames": frames,
            "chunks": len(self.arrivals),
            "seconds": last,
            "time_to_first_frame_seconds": first,
            "mean_fps": frames / last if last else None,
            "cache_full_from_chunk": full,  # None: never seen full; steady figures are then of all chunks but the first
            "steady_fps": None if steady_fps is None else float(steady_fps),
            "chunk_interval_seconds": spread(intervals),
            "jitter_seconds": spread(jitter),
            "request_seconds": spread(np.array([a.received - a.sent for a in steady])),  # = control latency
            **slow_down(received[1:], intervals, counts),
            "paced": None if self.fps is None else self.paced(intervals, counts),
        }

    def paced(self, intervals: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
        """What a viewer at F frames per second saw who started to play with the first chunk (prebuffer 1).

        Deadlines are d_i = t_0 + (n_0 + ... + n_(i-1)) / F; the stalls are those of a viewer who pauses until a late
        chunk is there, and plays on from then.
        """
        assert self.fps is not None
        on_time, stalls, stalled, played = 0, 0, 0.0, 0.0
        due = deadline = self.arrivals[0].received if self.arrivals else 0.0
        for arrival in self.arrivals:
            on_time += arrival.received <= deadline
            if (late := arrival.received - due) > 0:
                stalls += 1
                stalled += late
            seconds = arrival.frames / self.fps
            due = max(due, arrival.received) + seconds
            deadline += seconds
            played += seconds
        total = stalled + played
        factors = intervals * self.fps / counts if len(counts) and counts.all() else np.array([])
        return {
            "fps": self.fps,
            "continuous_play_ratio": on_time / len(self.arrivals) if self.arrivals else None,
            "stalls": stalls,
            "stalls_per_minute": 60 * stalls / total if total else None,
            "rebuffer_ratio": stalled / total if total else None,
            "realtime_factor_p95": float(np.percentile(factors, 95)) if len(factors) else None,
        }


def cache_full_from(tokens: list[float]) -> int | None:
    """The first chunk after which the cache grows by less than one chunk's tokens in all; None where it never does."""
    largest_later = list(np.maximum.accumulate(tokens[::-1])[::-1])
    # At least two intervals must remain to be measured, and three later chunks to tell a full cache from a slow one.
    for i in range(len(tokens) - 3):
        if largest_later[i] - tokens[i] < max(tokens[0], 1):
            return i
    return None


def spread(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": float(values.max())}


def slow_down(received: np.ndarray, intervals: np.ndarray, counts: np.ndarray) -> dict[str, float | None]:
    """Whether the stream slows as it goes on: of the seconds per frame, last decile / first decile, and the slope."""
    whole = counts == counts.max() if len(counts) else np.array([], bool)  # a trimmed last chunk says nothing
    seconds, times = (intervals / np.maximum(counts, 1))[whole], received[whole]
    n = len(seconds) // 10
    ratio = float(seconds[-n:].mean() / seconds[:n].mean()) if n and seconds[:n].mean() > 0 else None
    slope = float(np.polyfit(times / 60, seconds * counts[whole], 1)[0]) if len(seconds) >= 10 else None
    return {"last_over_first_decile": ratio, "chunk_seconds_slope_per_minute": slope}
