"""The loop: list, scrape, decide, write what has changed."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import time

from fastar_controller.admin import AdminError, close, move
from fastar_controller.api import ERRORS, Found, Pods, reason
from fastar_controller.health import Health, Limits
from fastar_controller.lease import Leader
from fastar_controller.placement import Pod, deletion_cost, open_pods, room_wanted, to_move
from fastar_controller.scrape import Reading, ScrapeError, scrape
from fastar_controller.status import Status

LONGEST_PAUSE = 30.0  # seconds, after errors
CLOSED_SECONDS = 60  # that a pod stays closed without being told again: well above the longest pause
SCRAPERS = 32  # at once


@dataclasses.dataclass(frozen=True)
class Settings:
    """In seconds: interval, timeout (of a server's answer), move_every (between two streams that a slow pod sends on;
    0: none). room: free slots to keep open at least."""

    interval: float = 5.0
    timeout: float = 2.0
    room: int = 8
    move_every: float = 120.0
    limits: Limits = Limits()


class Controller:
    def __init__(self, pods: Pods, leader: Leader, status: Status, settings: Settings) -> None:
        self.pods, self.leader, self.status, self.settings = pods, leader, status, settings
        self.known: dict[str, Health] = {}
        self.moved: dict[str, float] = {}  # pod -> when it was last asked to send a stream on, monotonic seconds

    def run(self, stop: threading.Event) -> None:
        """Until `stop`. After an error of the API server the pauses double, up to LONGEST_PAUSE."""
        pause = self.settings.interval
        with concurrent.futures.ThreadPoolExecutor(SCRAPERS) as scrapers:
            while not stop.is_set():
                try:
                    self.status.led(self.leader.leads)
                    if self.leader.leads:
                        self.round(scrapers)
                    pause = self.settings.interval
                except ERRORS as error:
                    self.status.error("api", reason(error))
                    pause = min(2 * pause, LONGEST_PAUSE)
                self.status.alive()
                stop.wait(pause)

    def round(self, scrapers: concurrent.futures.Executor) -> None:
        """Raises one of ERRORS."""
        found = list(self.pods.list())
        self.known = {pod.name: self.known.get(pod.name, Health()) for pod in found}
        asked = [pod for pod in found if pod.url]
        for pod, reading in zip(asked, scrapers.map(self._ask, asked), strict=True):
            if reading is None:
                self.known[pod.name].miss()
            else:
                self.known[pod.name].see(reading, time.monotonic(), self.settings.limits)
        pods = self.ready(found)
        opened = open_pods(pods, room_wanted(pods, self.settings.room))
        list(scrapers.map(lambda pod: self._tell(pod, pod.name in opened), asked))
        for pod in found:
            self._write(pod, pod.name in opened if pod.url else None)
        self._relieve(found, to_move(pods, opened))
        streams = sum(health.last.streams for health in self.known.values() if health.last)
        self.status.seen(len(opened), len(found) - len(opened), streams)

    def ready(self, found: list[Found]) -> list[Pod]:
        """What counts of them. One that has not answered yet counts as full."""
        pods = []
        for pod in found:
            health = self.known[pod.name]
            if pod.url is None:  # not ready: no Service sends it anything
                continue
            last = health.last or Reading(0, 0, False, {})
            leaving = pod.leaving or last.draining
            fit = health.fit(self.settings.limits) and not leaving
            slow = health.slow and health.missed == 0
            pods.append(Pod(pod.name, last.streams, last.slots, pod.open, fit, leaving, slow))
        return pods

    def _tell(self, pod: Found, open_: bool) -> None:
        """Closed ones again and again: they open by themselves when nobody leads. One that does not answer is left."""
        if not pod.admin or pod.leaving or (open_ and pod.open) or not self.leader.leads:
            return
        try:
            close(pod.admin, 0 if open_ else CLOSED_SECONDS, self.settings.timeout)
        except AdminError as error:
            self.status.error("close", str(error))

    def _relieve(self, found: list[Found], names: list[str]) -> None:
        """Where the rates of the last window may show what the stream before has helped."""
        now = time.monotonic()
        self.moved = {pod.name: self.moved[pod.name] for pod in found if pod.name in self.moved}
        for pod in found:
            waited = now - self.moved.get(pod.name, float("-inf"))
            if pod.name not in names or not pod.admin or not self.settings.move_every or not self.leader.leads:
                continue
            if waited < self.settings.move_every:
                continue
            self.moved[pod.name] = now
            try:
                move(pod.admin, 1, self.settings.timeout)
                self.status.moved()
            except AdminError as error:
                self.status.error("move", str(error))

    def _ask(self, pod: Found) -> Reading | None:
        try:
            return scrape(pod.url, self.settings.timeout)
        except ScrapeError as error:
            self.status.error("scrape", str(error))
            return None

    def _write(self, pod: Found, open_: bool | None) -> None:
        """open_: None leaves the label. A pod that never answered gets no cost: nobody knows."""
        last, missed = self.known[pod.name].last, self.known[pod.name].missed
        cost = str(deletion_cost(last.streams)) if last else None
        if not last and missed < self.settings.limits.misses:
            open_ = None  # too early to tell
        cost, open_ = (None if cost == pod.cost else cost), (None if open_ == pod.open else open_)
        if (cost is not None or open_ is not None) and self.leader.leads and self.pods.patch(pod.name, cost, open_):
            self.status.patched()
