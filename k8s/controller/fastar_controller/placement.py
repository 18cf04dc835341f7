"""Which pods take new streams, and which give one away. Pure: no clock, no network; the simulator asks the first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

SHARE = 0.1  # of all slots are kept open for those who come until the next look reaches the gateways


@dataclasses.dataclass(frozen=True)
class Pod:
    """What counts of one ready server.

    streams, slots: live, and how many it admits. open: takes new streams now. fit: answers, is not draining, and is not
    below the frame rate. leaving: draining; it refuses streams. slow: below the frame rate.
    """

    name: str
    streams: int
    slots: int
    open: bool = True
    fit: bool = True
    leaving: bool = False
    slow: bool = False

    @property
    def free(self) -> int:
        return max(self.slots - self.streams, 0)


def deletion_cost(streams: int) -> int:
    """`controller.kubernetes.io/pod-deletion-cost`: a ReplicaSet removes the pod with the least first."""
    return 100 * streams


def room_wanted(pods: Iterable[Pod], least: int) -> int:
    """Free slots to keep open: at least `least`, and `SHARE` of all."""
    return max(least, math.ceil(SHARE * sum(pod.slots for pod in pods)))


def open_pods(pods: Iterable[Pod], room: int) -> set[str]:
    """Names of the pods that take new streams: of those that are fit and have a slot, the fullest, until `room` slots
    are free. One that is open stays open until twice as many are free without it, so that pods do not flutter.

    If no such pod is there, the full ones that are fit stay open, else all that do not leave: a server refuses with a
    reason and a time to come back, and its refusals make the autoscaler add pods. A gateway without pods does neither.
    """
    pods = list(pods)
    taken, free = set(), 0
    for pod in sorted(
        (pod for pod in pods if pod.fit and pod.free), key=lambda pod: (-pod.streams, not pod.open, pod.free, pod.name)
    ):
        if free < room or (pod.open and free < 2 * room):
            taken.add(pod.name)
            free += pod.free
    return taken or {p.name for p in pods if p.fit} or {p.name for p in pods if not p.leaving}


def to_move(pods: Iterable[Pod], opened: set[str]) -> list[str]:
    """Names of the pods that are to send one live stream on: those that are slow, the fullest first, as far as the pods
    of `opened` that are fit have slots. A pod's only stream stays: it has the pod to itself, and would only wander."""
    pods = list(pods)
    free = sum(pod.free for pod in pods if pod.name in opened and pod.fit)
    slow = [pod for pod in pods if pod.slow and not pod.leaving and pod.streams > 1]
    return [pod.name for pod in sorted(slow, key=lambda pod: (-pod.streams, pod.name))][:free]
