"""How a HorizontalPodAutoscaler decides, with one external metric and an AverageValue target.

After the Kubernetes controller (autoscaling/v2, pkg/controller/podautoscaler): the proposal is ceil(metric / target),
or no change within the tolerance; the stabilisation windows hold back what was not proposed throughout; the policies
limit the change against the number of pods at the start of their period.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Policy:
    """At most `value` pods, or `value` percent, in `period` seconds."""

    type: str  # Pods or Percent
    value: float
    period: float


@dataclasses.dataclass(frozen=True)
class Rules:
    """Of one direction."""

    window: float  # seconds
    policies: tuple[Policy, ...]
    select: str = "Max"  # or Min: which policy counts, by the size of the change; Disabled: never in this direction
    tolerance: float = 0.1  # relative distance from the target that is left alone


@dataclasses.dataclass(frozen=True)
class Behavior:
    up: Rules
    down: Rules


class Hpa:
    """One autoscaler. Call `decide` at every sync, in the order of time."""

    def __init__(self, behavior: Behavior, target: float, smallest: int, largest: int) -> None:
        self.behavior, self.target, self.smallest, self.largest = behavior, target, smallest, largest
        self.proposals: list[tuple[float, int]] = []
        self.changes: list[tuple[float, int]] = []

    def decide(self, now: float, metric: float, replicas: int) -> int:
        """now: seconds; metric: the sum over all pods; replicas: what spec says now -> what it is to say."""
        if not self.proposals:
            self.proposals.append((now, replicas))
        wanted = self._limit(now, replicas, self._stabilise(now, replicas, self._propose(metric, replicas)))
        if wanted != replicas:
            self.changes.append((now, wanted - replicas))
        return wanted

    def _propose(self, metric: float, replicas: int) -> int:
        ratio = metric / (self.target * replicas)
        if 1 - self.behavior.down.tolerance <= ratio <= 1 + self.behavior.up.tolerance:
            return replicas
        return math.ceil(metric / self.target)

    def _stabilise(self, now: float, replicas: int, proposal: int) -> int:
        """Up to the lowest proposal of the up window, down to the highest of the down window."""
        up, down = self.behavior.up.window, self.behavior.down.window
        self.proposals = [(at, n) for at, n in self.proposals if at > now - max(up, down)]
        lowest = min([proposal, *(n for at, n in self.proposals if at > now - up)])
        highest = max([proposal, *(n for at, n in self.proposals if at > now - down)])
        self.proposals.append((now, proposal))
        return min(max(replicas, lowest), highest)

    def _limit(self, now: float, replicas: int, wanted: int) -> int:
        if wanted > replicas:
            most = self._bound(now, replicas, self.behavior.up, +1)
            return min(wanted, max(most, replicas), self.largest)
        if wanted < replicas:
            least = self._bound(now, replicas, self.behavior.down, -1)
            return max(wanted, min(least, replicas), self.smallest)
        return replicas

    def _bound(self, now: float, replicas: int, rules: Rules, sign: int) -> int:
        """The number that the policies allow; sign: +1 up, -1 down."""
        if rules.select == "Disabled":
            return replicas
        bounds = []
        for policy in rules.policies:
            at_start = replicas - sum(change for at, change in self.changes if at > now - policy.period)
            if policy.type == "Pods":
                bounds.append(at_start + sign * int(policy.value))
            elif sign > 0:
                bounds.append(math.ceil(at_start * (1 + policy.value / 100)))
            else:
                bounds.append(int(at_start * (1 - policy.value / 100)))
        largest_change = rules.select == "Max"
        return max(bounds) if (sign > 0) == largest_change else min(bounds)
