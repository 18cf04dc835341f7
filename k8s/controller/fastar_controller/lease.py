"""Leader election by one Lease: who holds it acts. The client library's own elector blocks, and keeps its Lease when it
ends; this one is a step that a loop takes, and lets go.

A holder's clock is not trusted: a Lease is free when it has not changed for its duration by our own clock.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from fastar_controller.api import ERRORS


class Leader:
    """name: of the Lease. seconds: how long it holds without being renewed; an integer, by its format."""

    def __init__(
        self, api: client.ApiClient, namespace: str, name: str, identity: str, seconds: int,
        failed: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        self.leases, self.namespace, self.name = client.CoordinationV1Api(api), namespace, name
        self.identity, self.seconds, self.failed = identity, seconds, failed
        self.timeout = seconds / 3
        self._until = 0.0  # we lead until then
        self._seen: tuple[str | None, float] = (None, 0.0)  # version of the Lease, and when it was new to us
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    @property
    def leads(self) -> bool:
        """Ends before others may take over, even if the API server does not answer."""
        return time.monotonic() < self._until

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Lets go, so that another can lead at once."""
        self._stop.set()
        self._thread.join(2 * self.timeout + 1)
        led, self._until = self.leads, 0.0
        if led:
            try:
                self._release()
            except ERRORS as error:
                self.failed(error)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.step()
            except ERRORS as error:
                self.failed(error)
            self._stop.wait(self.seconds / 6)

    def step(self) -> None:
        """Takes the Lease if it is free, renews it if it is ours. Raises one of ERRORS, unless another was faster."""
        asked = time.monotonic()
        try:
            lease = self._read()
            if lease is not None and not self._free(lease):
                self._until = 0.0
                return
            self._take(lease)
        except ApiException as error:
            if error.status != 409:
                raise
            self._until = 0.0  # another wrote it since we read it
            return
        self._until = asked + self.seconds * 2 / 3

    def _read(self) -> client.V1Lease | None:
        try:
            return self.leases.read_namespaced_lease(self.name, self.namespace, _request_timeout=self.timeout)
        except ApiException as error:
            if error.status != 404:
                raise
            return None

    def _free(self, lease: client.V1Lease) -> bool:
        version, now = lease.metadata.resource_version, time.monotonic()
        if version != self._seen[0]:
            self._seen = (version, now)
        holder = lease.spec.holder_identity
        old = now - self._seen[1] > (lease.spec.lease_duration_seconds or self.seconds)
        return not holder or holder == self.identity or old

    def _take(self, lease: client.V1Lease | None) -> None:
        """Its resourceVersion goes along: the API server refuses if the Lease has changed. None: there is no Lease."""
        spec, now = (
            lease.spec if lease else client.V1LeaseSpec(lease_transitions=-1),
            datetime.datetime.now(datetime.UTC),
        )
        if spec.holder_identity != self.identity:
            spec.lease_transitions, spec.acquire_time = (spec.lease_transitions or 0) + 1, now
        spec.holder_identity, spec.lease_duration_seconds, spec.renew_time = self.identity, self.seconds, now
        if lease:
            self.leases.replace_namespaced_lease(self.name, self.namespace, lease, _request_timeout=self.timeout)
        else:
            lease = client.V1Lease(metadata=client.V1ObjectMeta(name=self.name), spec=spec)
            self.leases.create_namespaced_lease(self.namespace, lease, _request_timeout=self.timeout)

    def _release(self) -> None:
        lease = self._read()
        if lease is not None and lease.spec.holder_identity == self.identity:
            lease.spec.holder_identity = ""
            self.leases.replace_namespaced_lease(self.name, self.namespace, lease, _request_timeout=self.timeout)
