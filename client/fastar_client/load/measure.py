"""From records to figures. F is the target frame rate, n_i the frames of chunk i, t_i the time of its last byte.

What never came counts, too. A session is judged over the whole time that it was meant to last (a lost one) or was
watched (any other): chunks that were due by then and are not there are late, the wait that was still going on is a
stall, and the frame rate's clock runs on. So a server that stops answering cannot look better than one that is slow.

Steady chunks are those after the one that filled the server's cache, or all but the first where none did.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from fastar_client.load.record import INTERRUPTED, LOST, StreamRecord
from fastar_client.load.scenario import Scenario
from fastar_client.timing import cache_full_from, slow_down

FEW = 10  # chunks of a decile: with fewer, slow-down is the jitter of a chunk


@dataclasses.dataclass(frozen=True)
class Stall:
    at: float  # seconds since the test began
    seconds: float
    chunk: int  # that was waited for


@dataclasses.dataclass(frozen=True)
class StreamFigures:
    """Of one stream. Seconds, ratios and frames per second; None where it was too short to tell, or is not paced."""

    number: int
    outcome: str
    lost: bool
    judged: bool  # False: a slow reader, whose figures are its own doing, or one that was interrupted unseen
    lateness: float  # of the load generator: from when the stream was due to when it was begun
    frames: int
    ttfc: float | None  # from when the stream was due to its first chunk; None: it never came
    ttff: float | None  # likewise to its first decoded frame
    fps: float | None  # steady; 0 for lost ones
    fps_alive: float | None  # likewise, for lost ones too what they had while they ran
    continuous_play: float | None  # share of chunks that were there when due, prebuffer of one chunk
    continuous_play_2: float | None  # likewise, of two
    stalls: tuple[Stall, ...]
    stalled: float | None
    played: float | None
    stalls_per_minute: float | None
    rebuffer: float | None  # stalled / (stalled + played)
    intervals: tuple[float, ...]  # t_i - t_(i-1) of steady chunks
    requests: tuple[float, ...]  # from a chunk's request to its last byte, of all chunks
    jitter: tuple[float, ...]  # |interval - n_i / F|; F is the stream's own rate where it is not paced
    rtf: tuple[float, ...]  # interval * F / n_i
    rtf_p95: float | None
    controls: tuple[float, ...]  # seconds from a control to the first chunk that obeys
    control_periods: tuple[float, ...]  # the same in chunk periods
    controls_refused: int
    last_over_first_decile: float | None
    slope_per_minute: float | None  # of the chunk time, seconds
    reconnects: int


def figures(record: StreamRecord, scenario: Scenario) -> StreamFigures:
    planned, chunks = record.planned, record.chunks
    lost = record.outcome in LOST
    until = max(planned.leaves, record.ended) if lost else record.ended
    received = np.array([chunk.received for chunk in chunks])
    counts = np.array([chunk.frames for chunk in chunks], float)
    full = cache_full_from([chunk.cache_tokens for chunk in chunks]) or 0
    intervals, steady = np.diff(received[full:]), counts[full + 1 :]
    typical = float(counts[-1]) if len(counts) else 0.0  # frames of the chunks that never came
    period = period_of(record, intervals, typical, scenario)
    own_end = min(until, record.ended)
    alive = None
    if len(chunks):
        span = max(received[-1], own_end - period) - received[full]
        alive = float(steady.sum() / span) if span > 0 else None
    stalls = stalls_of(received, counts, until, scenario) if scenario.paced else ()
    stalled, played = (sum(s.seconds for s in stalls), watched(received, counts, until, scenario))
    if not len(chunks) and lost:
        stalled, played = until - planned.at, 0.0
    total = stalled + played
    rate = scenario.fps if scenario.paced else alive
    controls = control_seconds(record, period)
    decile = slow_down(received[full + 1 :], intervals, steady)
    enough = len(intervals) >= 10 * FEW
    rtf = intervals * scenario.fps / np.maximum(steady, 1)
    paced = scenario.paced and (lost or len(chunks) > 0)
    return StreamFigures(
        number=planned.number,
        outcome=record.outcome,
        lost=lost,
        judged=planned.slow_factor is None and (bool(chunks) or record.outcome != INTERRUPTED),
        lateness=record.opened - planned.at,
        frames=int(counts.sum()),
        ttfc=chunks[0].received - planned.at if chunks else None,
        ttff=next((chunk.decoded - planned.at for chunk in chunks if chunk.frames), None),
        fps=0.0 if lost else alive,
        fps_alive=alive,
        continuous_play=on_time(received, counts, until, scenario, 1) if paced else None,
        continuous_play_2=on_time(received, counts, until, scenario, 2) if paced else None,
        stalls=stalls,
        stalled=stalled if paced else None,
        played=played if paced else None,
        stalls_per_minute=60 * len(stalls) / total if paced and total > 0 else None,
        rebuffer=stalled / total if paced and total > 0 else None,
        intervals=tuple(intervals.tolist()),
        requests=tuple(chunk.received - chunk.sent for chunk in chunks),
        jitter=tuple(abs(intervals - steady / rate).tolist()) if rate else (),
        rtf=tuple(rtf.tolist()),
        rtf_p95=float(np.percentile(rtf, 95)) if len(rtf) else None,
        controls=controls,
        control_periods=tuple(seconds / period for seconds in controls),
        controls_refused=sum(control.error is not None for control in record.controls),
        last_over_first_decile=decile["last_over_first_decile"] if enough else None,
        slope_per_minute=decile["chunk_seconds_slope_per_minute"],
        reconnects=record.reconnects,
    )


def period_of(record: StreamRecord, intervals: np.ndarray, frames: float, scenario: Scenario) -> float:
    """Seconds that a chunk of `frames` may take: at F, or where nothing is paced, what this stream's chunks took."""
    if scenario.paced and frames:
        return frames / scenario.fps
    if len(intervals):
        return float(np.median(intervals))
    return record.chunks[0].received - record.chunks[0].sent if record.chunks else math.inf


def on_time(received: np.ndarray, counts: np.ndarray, until: float, scenario: Scenario, prebuffer: int) -> float | None:
    """Share of chunks with t_i <= d_i = t_(B-1) + (n_0 + ... + n_(i-1)) / F, of those that came or were due by `until`.
    received: seconds [chunks]; counts: their frames; prebuffer: B, in chunks. None: left while the prebuffer filled."""
    period = max(counts[-1], 1.0) / scenario.fps if len(counts) else 0.0
    if len(received) < prebuffer:
        return None if len(received) and until - received[-1] <= period else 0.0
    due = received[prebuffer - 1] + np.concatenate([[0.0], np.cumsum(counts)]) / scenario.fps
    missing = max(0, math.floor((until - due[-1]) / period) + 1)  # the next, and those after it
    return float((received <= due[:-1]).sum() / (len(received) + missing))


def stalls_of(received: np.ndarray, counts: np.ndarray, until: float, scenario: Scenario) -> tuple[Stall, ...]:
    """Of a viewer who plays from the first chunk on at F, pauses when a chunk is late until it is there, and goes on
    from then; the last one may last to `until`."""
    stalls, dry = [], received[0] if len(received) else math.inf
    for chunk, (there, frames) in enumerate(zip(received, counts, strict=True)):
        if there > dry:
            stalls.append(Stall(float(dry), float(there - dry), chunk))
        dry = max(dry, there) + frames / scenario.fps
    if until > dry:
        stalls.append(Stall(float(dry), float(until - dry), len(received)))
    return tuple(stalls)


def watched(received: np.ndarray, counts: np.ndarray, until: float, scenario: Scenario) -> float:
    """Seconds of the same viewer's play until then."""
    dry, played = -math.inf, 0.0
    for there, frames in zip(received, counts, strict=True):
        begin = max(dry, there)
        dry = begin + frames / scenario.fps
        played += max(0.0, min(dry, until) - begin)
    return played


def control_seconds(record: StreamRecord, period: float) -> tuple[float, ...]:
    """From when each control was due to the first chunk that obeyed. One that no chunk has obeyed counts with the time
    it waited, if that is more than 1.5 chunk periods; less tells nothing."""
    times = []
    for control in record.controls:
        if control.error is not None:
            continue
        if control.applied is not None:
            times.append(control.applied - control.due)
        elif (waited := record.ended - control.due) > 1.5 * period:
            times.append(waited)
    return tuple(times)


@dataclasses.dataclass(frozen=True)
class Totals:
    """Of all streams together: every percentile is of all samples, or of all streams, never of other percentiles."""

    outcomes: dict[str, int]  # how many ended how
    planned: int
    not_run: int  # planned, but the test was stopped, or their load process died, before they came
    errors: dict[str, int]  # the errors of lost streams, and how many had each
    lost: int  # rejected, failed, starved; slow readers among them
    judged: int
    too_short: int  # judged, but without a steady chunk; no stream that a slow server left waiting is among them
    seconds: float  # from the first stream's begin to the last one's end
    delivered_fps: float  # frames of all streams over `seconds`
    fps: dict[str, float] | None  # over streams: p5, min, p50, p95, max, mean
    ttfc: dict[str, float] | None  # likewise; infinite where it never came
    ttff: dict[str, float] | None
    no_first_chunk: int
    continuous_play: dict[str, float] | None
    continuous_play_2: dict[str, float] | None
    rebuffer: float | None  # of all viewers' time
    rebuffer_by_stream: dict[str, float] | None
    stalls: int
    stalls_per_minute: float | None
    longest_stall: float
    jitter: dict[str, float] | None  # over chunks
    interval: dict[str, float] | None
    request: dict[str, float] | None
    rtf: dict[str, float] | None
    rtf_p95_by_stream: dict[str, float] | None
    control: dict[str, float] | None  # over controls, seconds
    control_periods: dict[str, float] | None
    controls_refused: int
    slow_down: dict[str, float] | None  # over streams: last decile of the chunk times / the first
    slope_per_minute: dict[str, float] | None
    reconnects: int
    late_reasons: dict[str, int]  # the server's own, of all chunks that it says were late
    lateness: dict[str, float] | None  # of the load generator's arrivals: its own fault, not the server's
    lag: dict[str, float] | None  # likewise of its event loops


def totals(records: list[StreamRecord], each: list[StreamFigures], planned: int, lags: Iterable[float] = ()) -> Totals:
    """each: the figures of `records`; planned: how many streams were to be; lags: samples of all load processes."""
    judged = [f for f in each if f.judged]
    ran = [f for f in judged if f.outcome != INTERRUPTED or f.ttfc is not None]
    paced = [f for f in judged if f.stalled is not None]
    time = sum(f.stalled + f.played for f in paced)
    end = max((record.ended for record in records), default=0.0)
    seconds = end - min((record.opened for record in records), default=0.0)
    frames = sum(f.frames for f in each)
    errors = Counter(record.error for record in records if record.outcome in LOST and record.error)
    return Totals(
        outcomes=dict(Counter(record.outcome for record in records)),
        planned=planned,
        not_run=planned - len(records),
        errors=dict(errors.most_common()),
        lost=sum(f.lost for f in each),
        judged=len(judged),
        too_short=sum(f.fps is None for f in judged),
        seconds=seconds,
        delivered_fps=frames / seconds if seconds > 0 else 0.0,
        fps=over(f.fps for f in judged),
        ttfc=over(math.inf if f.ttfc is None else f.ttfc for f in ran),
        ttff=over(math.inf if f.ttff is None else f.ttff for f in ran),
        no_first_chunk=sum(f.ttfc is None for f in ran),
        continuous_play=over(f.continuous_play for f in judged),
        continuous_play_2=over(f.continuous_play_2 for f in judged),
        rebuffer=sum(f.stalled for f in paced) / time if time > 0 else None,
        rebuffer_by_stream=over(f.rebuffer for f in judged),
        stalls=sum(len(f.stalls) for f in judged),
        stalls_per_minute=60 * sum(len(f.stalls) for f in paced) / time if time > 0 else None,
        longest_stall=max((stall.seconds for f in judged for stall in f.stalls), default=0.0),
        jitter=over(value for f in judged for value in f.jitter),
        interval=over(value for f in judged for value in f.intervals),
        request=over(value for f in judged for value in f.requests),
        rtf=over(value for f in judged for value in f.rtf),
        rtf_p95_by_stream=over(f.rtf_p95 for f in judged),
        control=over(value for f in judged for value in f.controls),
        control_periods=over(value for f in judged for value in f.control_periods),
        controls_refused=sum(f.controls_refused for f in each),
        slow_down=over(f.last_over_first_decile for f in judged),
        slope_per_minute=over(f.slope_per_minute for f in judged),
        reconnects=sum(f.reconnects for f in each),
        late_reasons=dict(Counter(chunk.late for record in records for chunk in record.chunks if chunk.late)),
        lateness=over(f.lateness for f in each),
        lag=over(lags),
    )


def over(values: Iterable[float | None]) -> dict[str, float] | None:
    """p5, p50, p95, p99, min, max and mean of those that are not None (infinite ones are the largest); None where all
    are."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    named = {f"p{q}": percentile(known, q) for q in (5, 50, 95, 99)}
    return named | {"min": known[0], "max": known[-1], "mean": sum(known) / len(known)}


def percentile(ordered: list[float], q: int) -> float:
    """Interpolated, as numpy's; but numpy's is NaN next to infinity."""
    low, part = divmod((len(ordered) - 1) * q, 100)
    if not part or ordered[low] == math.inf:
        return ordered[low]
    return ordered[low] + part / 100 * (ordered[low + 1] - ordered[low])
