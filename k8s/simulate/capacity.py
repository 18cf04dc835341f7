"""What a fleet of some size takes, from measured figures: pods, spare slots, snapshot traffic, time of an upgrade."""

from __future__ import annotations

import dataclasses
import math

from k8s.simulate.manifest import Shipped

# One NVIDIA H200, Wan2.1-1.3B's shape at 480x832, six latent frames of cache, TAEHV: FPS of each (README.md).
FPS = {1: 41.2, 2: 20.6, 3: 13.6, 4: 10.1}
CHUNK_FRAMES = 12
SNAPSHOT_BYTES = 3.5e9  # of one drained stream
SNAPSHOTS_KEPT = 2  # newest ones of a stream, in the store


def streams_per_gpu(fps: float) -> int:
    """The most streams that each ran at `fps` or more; 0: not even one."""
    return max((streams for streams, each in FPS.items() if each >= fps), default=0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rates in bytes a second, times in seconds."""

    streams: int
    pods: int
    arrivals: float  # a second
    buffer: float  # slots
    snapshot_rate: float  # periodic ones of all streams
    store_bytes: float
    upgrade_seconds: float  # of all pods, one after the other

    @classmethod
    def of(cls, shipped: Shipped, streams: int, life: float, fps: float, snapshot_chunks: int) -> Plan:
        """streams: live at the peak; life: seconds of a stream, mean; fps: of each.

        The pods that the shipped rule asks for when the number of streams is steady: (D + B) / target, B = max(N,
        2 sqrt(lambda T)). An upgrade replaces one pod after the other (maxSurge 1), each as long as one starts.
        """
        arrivals = streams / life
        buffer = max(shipped.slots, 2 * math.sqrt(arrivals * shipped.start_seconds))
        pods = max(shipped.smallest, math.ceil((streams + buffer) / shipped.target))
        period = snapshot_chunks * CHUNK_FRAMES / fps
        return cls(
            streams, pods, arrivals, buffer,
            snapshot_rate=streams * SNAPSHOT_BYTES / period if snapshot_chunks else 0.0,
            store_bytes=streams * SNAPSHOT_BYTES * SNAPSHOTS_KEPT,
            upgrade_seconds=pods * shipped.start_seconds,
        )  # fmt: skip


def table(shipped: Shipped, life: float, fps: float, snapshot_chunks: int) -> str:
    """Markdown, for fleets of 20 to 10,000 streams."""
    lines = [
        "| live streams | pods (GPUs) | spare slots | opened a second | snapshots, GB/s | store, TB | upgrade |",
        "|---|---|---|---|---|---|---|",
    ]
    for streams in (20, 100, 500, 2000, 10_000):
        plan = Plan.of(shipped, streams, life, fps, snapshot_chunks)
        spare = plan.pods * shipped.slots - streams
        lines.append(
            f"| {streams:,} | {plan.pods:,} | {spare:,} | {plan.arrivals:.2f} | {plan.snapshot_rate / 1e9:.1f} "
            f"| {plan.store_bytes / 1e12:.1f} | {plan.upgrade_seconds / 3600:.1f} h |"
        )
    return "\n".join(lines)
