"""A fleet of servers under a day's demand: streams arrive, wait, live, and are moved when their pod goes.

What is simplified: a stream that is moved pauses no longer than it waits for a slot, no pod fails, every pod that is
asked for comes after the same time, and the autoscaler sees numbers that are `LAG` seconds old. Frame rates are not
computed: `max_streams` is what a pod carries at the promised rate, so a pod below it has a fault. A share of the pods
may get one (`slow`): the stream controller closes these, and has each send streams on, one at a time.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import math
import random

import numpy as np

from k8s.controller.fastar_controller import placement as controller
from k8s.simulate.hpa import Hpa
from k8s.simulate.manifest import Shipped

TICK = 5.0  # seconds
LAG = 30.0  # scrape, rules, KEDA
RETRY = 10.0  # seconds until a refused client asks again
SEEN = TICK  # until gateways know what a pod says of its room; they look every 2 s
ROOM = 8  # free slots that the controller keeps open, at least; as components/stream-controller says
MOVE_EVERY = 120.0  # between two streams that a slow pod sends on
FAULT = 3600.0
WINDOW = 300.0  # of the rules' rate() and deriv()
DAY = 86400.0


@dataclasses.dataclass(frozen=True)
class Demand:
    """Streams arrive at random, at a rate that follows the day; at `crowd_at` it is suddenly `crowd` times as high."""

    streams: float = 120.0  # live at once, mean of the day without the crowd
    life: float = 600.0  # seconds that a stream lives, mean; exponential
    swing: float = 0.6  # 1 +- swing between night and evening
    crowd: float = 2.5
    crowd_at: float = 14 * 3600.0
    crowd_seconds: float = 1800.0
    seconds: float = DAY

    def rate(self, at: float) -> float:
        """Arrivals a second. Least at 05:00, most at 17:00."""
        day = 1 - self.swing * math.cos(2 * math.pi * (at / DAY - 5 / 24))
        crowd = self.crowd if self.crowd_at <= at < self.crowd_at + self.crowd_seconds else 1.0
        return self.streams / self.life * day * crowd


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a new stream goes, and which pod is removed first.

    packed: to the fullest pod that has a slot; the emptiest pod is removed: as if everything were known at once. Else
    through one of the gateways to the pod, of `choices` at random, that carries the fewest streams of that gateway,
    which knows no others; if that pod is full the client asks again after `RETRY`; and the youngest pod is removed.
    blind: the gateways do not know either which pods were full `SEEN` seconds ago, and choose among all.
    controlled: nor do they choose one that the stream controller has closed; and the emptiest is removed.
    """

    name: str
    packed: bool = False
    choices: int = 1
    controlled: bool = False
    blind: bool = False


PACKED = Placement("ideal: fullest pod first, emptiest removed first", packed=True)
CONTROLLED = Placement("stream controller: fullest pods open, emptiest removed first", choices=10, controlled=True)
LEAST = Placement("gateway alone: least busy of 10 pods, youngest removed first", choices=10)  # envoy.yaml
RANDOM = Placement("any pod, youngest removed first", blind=True)


@dataclasses.dataclass
class Run:
    """What happened; one entry a tick, and one for each stream's wait."""

    at: np.ndarray  # seconds
    active: np.ndarray
    waiting: np.ndarray
    asked: np.ndarray  # pods that the autoscaler asks for
    ready: np.ndarray  # pods
    moved: np.ndarray  # streams moved in this tick
    waits: np.ndarray  # seconds from arrival to a slot, of each stream that got one
    slots: int

    @property
    def pod_hours(self) -> float:
        return float(self.asked.sum() * TICK / 3600)

    @property
    def used(self) -> float:
        """Share of the paid slots that held a stream."""
        return float(self.active.sum() / (self.asked.sum() * self.slots))

    def summary(self) -> dict[str, float]:
        return {
            "streams": float(len(self.waits)),
            "most live at once": float(self.active.max()),
            "most pods": float(self.asked.max()),
            "pod hours": self.pod_hours,
            "slots used": self.used,
            "waited at all": float((self.waits > TICK).mean()),
            "waited, seconds, p99": float(np.percentile(self.waits, 99)),
            "waited, seconds, most": float(self.waits.max()),
            "moved an hour": float(self.moved.sum() / (self.at[-1] / 3600)),
        }


class Pod:
    __slots__ = ("moved_at", "open", "ready_at", "slow_from", "streams")

    def __init__(self, ready_at: float, slow_from: float) -> None:
        self.ready_at, self.slow_from = ready_at, slow_from
        self.streams: set[int] = set()
        self.open = True  # says the controller
        self.moved_at = ready_at  # when it last sent a stream on


class Fleet:
    """Pods and the streams on them; streams are numbers."""

    def __init__(
        self, slots: int, pods: int, placement: Placement, seed: int, gateways: int = 1, slow: float = 0.0
    ) -> None:
        """slow: share of the pods that become slow in the first `FAULT` seconds of their life."""
        self.slots, self.placement, self.random, self.gateways = slots, placement, random.Random(seed), gateways
        self.slow, self.faults = slow, random.Random(f"faults {seed}")
        self.starting: list[Pod] = []  # by the time at which they are ready
        self.ready: list[Pod] = [self._pod(0.0) for _ in range(pods)]
        self.where: dict[int, Pod] = {}
        self.by_load = [set(self.ready), *(set() for _ in range(slots))]
        self.known = list(self.ready)  # to the gateways, as pods that take streams
        self.closed: collections.deque[tuple[float, set[Pod]]] = collections.deque()  # seen by them from then on

    def __len__(self) -> int:
        return len(self.starting) + len(self.ready)

    def place(self, stream: int) -> bool:
        if self.placement.packed:
            pod = next((next(iter(pods)) for pods in reversed(self.by_load[: self.slots]) if pods), None)
        else:
            pod = self._least_busy(stream % self.gateways)
        if pod is None or len(pod.streams) >= self.slots:
            return False
        self._load(pod, pod.streams | {stream})
        self.where[stream] = pod
        return True

    def _least_busy(self, gateway: int) -> Pod | None:
        among = self.known or self.ready  # rather one that is full than none
        seen = self.random.sample(among, min(self.placement.choices, len(among)))
        return min(seen, key=lambda pod: sum(one % self.gateways == gateway for one in pod.streams), default=None)

    def end(self, stream: int) -> None:
        pod = self.where.pop(stream)
        self._load(pod, pod.streams - {stream})

    def scale(self, wanted: int, now: float, start_seconds: float) -> list[int]:
        """Returns the streams that lost their pod."""
        while len(self) < wanted:
            self.starting.append(self._pod(now + start_seconds))
        lost: list[int] = []
        while len(self) > wanted:
            if self.starting:  # a ReplicaSet removes pods that are not ready first
                self.starting.pop()
                continue
            if self.placement.packed or self.placement.controlled:
                pod = min(self.ready, key=lambda pod: (len(pod.streams), -pod.ready_at))
            else:
                pod = max(self.ready, key=lambda pod: pod.ready_at)
            lost += pod.streams
            self.ready.remove(pod)
            self.by_load[len(pod.streams)].discard(pod)
        self.known = [pod for pod in self.known if pod in self.by_load[len(pod.streams)]]
        for stream in lost:
            del self.where[stream]
        return lost

    def arrive(self, now: float) -> list[int]:
        """Pods that have started take streams; the controller looks, and the gateways follow. Returns the streams that
        slow pods send on."""
        while self.starting and self.starting[0].ready_at <= now:
            pod = self.starting.pop(0)
            self.ready.append(pod)
            self.known.append(pod)
            self.by_load[0].add(pod)
        moved = self._control(now) if self.placement.controlled else []
        if not self.placement.blind:
            self.closed.append((now + SEEN, {p for p in self.ready if not p.open or len(p.streams) >= self.slots}))
        while self.closed and self.closed[0][0] <= now:
            _, closed = self.closed.popleft()
            self.known = [pod for pod in self.ready if pod not in closed]
        return moved

    def _control(self, now: float) -> list[int]:
        pods = {str(index): pod for index, pod in enumerate(sorted(self.ready, key=lambda pod: pod.ready_at))}
        views = []
        for name, pod in pods.items():
            slow = pod.slow_from <= now
            views.append(controller.Pod(name, len(pod.streams), self.slots, pod.open, fit=not slow, slow=slow))
        opened = controller.open_pods(views, controller.room_wanted(views, ROOM))
        for name, pod in pods.items():
            pod.open = name in opened
        moved = []
        for pod in [pods[name] for name in controller.to_move(views, opened)]:
            if now - pod.moved_at >= MOVE_EVERY:
                pod.moved_at = now
                moved.append(max(pod.streams))  # the newest
                self.end(moved[-1])
        return moved

    def _pod(self, ready_at: float) -> Pod:
        slow = self.faults.random() < self.slow
        return Pod(ready_at, ready_at + self.faults.uniform(0.0, FAULT) if slow else math.inf)

    def _load(self, pod: Pod, streams: set[int]) -> None:
        self.by_load[len(pod.streams)].discard(pod)
        pod.streams = streams
        self.by_load[len(streams)].add(pod)


class Signal:
    """`fastar:slots_wanted` of base/rules.yaml. buffer: False leaves its slots_buffer out."""

    def __init__(self, slots: int, start_seconds: float, buffer: bool) -> None:
        self.slots, self.start_seconds, self.buffer = slots, start_seconds, buffer
        self.kept = int(WINDOW / TICK)
        self.opened: collections.deque[int] = collections.deque(maxlen=self.kept)
        self.active: collections.deque[int] = collections.deque(maxlen=self.kept)
        self.values: collections.deque[float] = collections.deque(maxlen=int(LAG / TICK) + 1)

    def see(self, opened: int, active: int, waiting: int) -> None:
        """One tick: streams admitted in it, and what there is at its end."""
        self.opened.append(opened)
        self.active.append(active)
        rate = sum(self.opened) / (len(self.opened) * TICK)
        trend = max(slope(self.active) / TICK, 0.0)
        arriving = 2 * math.sqrt(rate * self.start_seconds) + trend * self.start_seconds
        self.values.append(active + waiting + (max(self.slots, arriving) if self.buffer else 0.0))

    @property
    def value(self) -> float:
        """As the autoscaler sees it."""
        return self.values[0]


def slope(values: collections.deque[int]) -> float:
    """Least squares, per step."""
    count = len(values)
    if count < 2:
        return 0.0
    steps = np.arange(count) - (count - 1) / 2
    return float(steps @ np.fromiter(values, float, count) / (steps @ steps))


def simulate(
    shipped: Shipped, demand: Demand, placement: Placement, seed: int = 0, buffer: bool = True, slow: float = 0.0
) -> Run:
    """A day under the shipped autoscaler, with this share of pods that become slow. Deterministic in its arguments;
    arrivals depend on the seed alone."""
    generator = np.random.default_rng(seed)
    start = max(shipped.smallest, math.ceil(1.2 * demand.rate(0.0) * demand.life / shipped.slots))
    fleet = Fleet(shipped.slots, min(start, shipped.largest), placement, seed, shipped.gateways, slow)
    hpa = Hpa(shipped.behavior, shipped.target, shipped.smallest, shipped.largest)
    signal, numbers = Signal(shipped.slots, shipped.start_seconds, buffer), itertools.count()
    wanted, next_sync = len(fleet), WINDOW  # the rules need their window first
    ends: list[tuple[float, int]] = []
    queue: list[tuple[float, int, float, float]] = []  # asks next at, stream, arrived at, life; moved ones: arrived -1
    rows: list[tuple[float, int, int, int, int, int]] = []
    waits: list[float] = []
    lives: dict[int, float] = {}  # when it ends
    for now in np.arange(0.0, demand.seconds, TICK).tolist():
        while ends and ends[0][0] <= now:
            _, stream = heapq.heappop(ends)
            if stream in fleet.where:
                fleet.end(stream)
                del lives[stream]
        lost = fleet.arrive(now)
        for _ in range(generator.poisson(demand.rate(now) * TICK)):
            heapq.heappush(queue, (now, next(numbers), now, generator.exponential(demand.life)))
        if now >= next_sync:
            next_sync += shipped.sync_seconds
            wanted = hpa.decide(now, signal.value, wanted)
            lost += fleet.scale(wanted, now, shipped.start_seconds)
        moved = len(lost)
        for stream in lost:
            heapq.heappush(queue, (now, stream, -1.0, max(lives.pop(stream) - now, TICK)))
        opened, refused = 0, []
        while queue and queue[0][0] <= now:
            _, stream, arrived, life = heapq.heappop(queue)
            if not fleet.place(stream):
                again = now + (TICK if placement.packed else RETRY)
                refused.append((again, stream, arrived, life))
                continue
            opened += 1
            if arrived >= 0:
                waits.append(now - arrived)
            lives[stream] = now + life
            heapq.heappush(ends, (now + life, stream))
        for item in refused:
            heapq.heappush(queue, item)
        signal.see(opened, len(fleet.where), len(queue))
        rows.append((now, len(fleet.where), len(queue), wanted, len(fleet.ready), moved))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return Run(*columns, waits=np.array(waits), slots=shipped.slots)
