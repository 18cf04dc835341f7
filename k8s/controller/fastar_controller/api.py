"""The API server, as far as the controller needs it: pods of one namespace, and one Lease."""

from __future__ import annotations

import dataclasses
import http.client
from collections.abc import Iterator

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

COST = "controller.kubernetes.io/pod-deletion-cost"
PLACEMENT = "fastar/placement"  # for the next leader, and for people: pods themselves are told by their admin port
ERRORS = (ApiException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError)
MERGE = "application/merge-patch+json"


@dataclasses.dataclass(frozen=True)
class Found:
    """A pod as the API server has it. url: its metrics; admin: its port for us; None while it has no address or is not
    ready, or has no such port."""

    name: str
    url: str | None
    cost: str | None
    open: bool
    leaving: bool
    admin: str | None = None


def connect(address: str | None) -> client.ApiClient:
    """address: None inside a cluster, with the pod's token. Raises config.ConfigException outside of one."""
    settings = client.Configuration()
    if address is None:
        config.load_incluster_config(client_configuration=settings)
    else:
        settings.host = address
    settings.retries = urllib3.Retry(0)  # the loops try again, at their own pace
    return client.ApiClient(settings)


class Pods:
    """Those that `selector` selects in `namespace`. Calls raise one of ERRORS."""

    def __init__(self, api: client.ApiClient, namespace: str, selector: str, timeout: float) -> None:
        self.core, self.namespace, self.selector, self.timeout = client.CoreV1Api(api), namespace, selector, timeout

    def list(self) -> Iterator[Found]:
        # Version 0: from the API server's cache. A stale list costs one patch that changes nothing.
        pods = self.core.list_namespaced_pod(
            self.namespace, label_selector=self.selector, resource_version="0", _request_timeout=self.timeout
        )
        for pod in pods.items:
            meta = pod.metadata
            yield Found(
                name=meta.name,
                url=url_of(pod, "metrics", "/metrics"),
                cost=(meta.annotations or {}).get(COST),
                open=(meta.labels or {}).get(PLACEMENT) != "closed",  # a new pod has no label
                leaving=meta.deletion_timestamp is not None,
                admin=url_of(pod, "admin"),
            )

    def patch(self, name: str, cost: str | None, open_: bool | None) -> bool:
        """Writes what is not None, and nothing else. False: the pod is gone."""
        meta: dict[str, dict[str, str]] = {}
        if cost is not None:
            meta["annotations"] = {COST: cost}
        if open_ is not None:
            meta["labels"] = {PLACEMENT: "open" if open_ else "closed"}
        try:
            self.core.patch_namespaced_pod(
                name, self.namespace, {"metadata": meta}, _content_type=MERGE, _request_timeout=self.timeout
            )
        except ApiException as error:
            if error.status == 404:
                return False
            raise
        return True


def url_of(pod: client.V1Pod, name: str, path: str = "") -> str | None:
    """Its container's port of that name, while the pod is ready."""
    ready = any(c.type == "Ready" and c.status == "True" for c in (pod.status.conditions or []))
    ports = [port for container in pod.spec.containers for port in container.ports or [] if port.name == name]
    if not (ready and pod.status.pod_ip and ports):
        return None
    host = f"[{pod.status.pod_ip}]" if ":" in pod.status.pod_ip else pod.status.pod_ip
    return f"http://{host}:{ports[0].container_port}{path}"


def reason(error: Exception) -> str:
    """One line."""
    said = f"{error.status} {error.body or error.reason}" if isinstance(error, ApiException) else str(error)
    return f"{type(error).__name__}: {' '.join(said.split())}"
