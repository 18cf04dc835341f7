"""The shipped gateway, run here: the servers' addresses and the ports are other ones, the rest is what ships."""

from __future__ import annotations

import contextlib
import copy
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rendered import rendered

from k8s.simulate.manifest import one

WORKERS = 1.2  # seconds: Envoy's workers hear of changes once a second
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one_socket in sockets:
            one_socket.bind(("127.0.0.1", 0))
        return [one_socket.getsockname()[1] for one_socket in sockets]


class Gateway:
    def __init__(self, grpc: int, status: int) -> None:
        self.port, self.url, self.status = grpc, f"127.0.0.1:{grpc}", f"http://127.0.0.1:{status}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.status}{path}", timeout=5) as reply:
            return reply.read().decode()

    def members(self, cluster: str, kind: str) -> int:
        """Servers that it takes for `healthy` (open), `degraded` (full or closed); -1: it does not answer."""
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            found = re.search(
                rf'^envoy_cluster_membership_{kind}\{{envoy_cluster_name="{cluster}"\}} (\d+)',
                self.get("/stats/prometheus"),
                re.MULTILINE,
            )
            return int(found[1])
        return -1

    def alive(self) -> tuple[int, int]:
        """Servers that each of its clusters takes for alive."""
        looked_for_room = self.members("triton", "healthy") + self.members("triton", "degraded")
        return looked_for_room, self.members("triton-hashed", "healthy")

    def wait_for(self, servers: int, timeout: float = 15.0) -> None:
        deadline = time.monotonic() + timeout
        while (found := self.alive()) != (servers, servers):
            assert time.monotonic() < deadline, f"{found} servers alive, not {servers}"
            time.sleep(0.1)

    def wait_for_open(self, servers: int, timeout: float = 15.0) -> None:
        deadline = time.monotonic() + timeout
        while (found := self.members("triton", "healthy")) != servers:
            assert time.monotonic() < deadline, f"{found} open servers, not {servers}"
            time.sleep(0.05)
        time.sleep(WORKERS)


def resolver(port: int) -> dict[str, object]:
    return {
        "name": "envoy.network.dns_resolver.cares",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
            "resolvers": [{"socket_address": {"address": "127.0.0.1", "port_value": port}}],
            "dns_resolver_options": {"no_default_search_domain": True},
        },
    }


def readdress(cluster: dict[str, Any], servers: list[tuple[int, int]], keep_name: bool = False) -> None:
    """Its only endpoint, at each of these ports (for calls, for health checks), by its name or at 127.0.0.1."""
    (shipped,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    endpoints = []
    for port, checked in servers:
        endpoints.append(copy.deepcopy(shipped))
        endpoint = endpoints[-1]["endpoint"]
        endpoint["address"]["socket_address"] |= {"port_value": port} | ({} if keep_name else {"address": "127.0.0.1"})
        if "health_check_config" in endpoint:
            endpoint["health_check_config"]["port_value"] = checked
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
    if not keep_name:
        cluster["type"] = "STATIC"


@contextlib.contextmanager
def gateway(
    folder: Path, servers: list[tuple[int, int]], dns: int | None = None, port: int | None = None
) -> Iterator[Gateway]:
    """In front of the servers with these ports (gRPC, admin) of 127.0.0.1; looks at them every half second.

    dns: asks this port of 127.0.0.1 for the servers' addresses, as in a cluster; `servers` are the ports
    of each of them then.
    port: where it listens, beside another Envoy that does; None: a free one.
    """
    grpc, status, admin = free_ports(3)
    grpc = port or grpc
    config = yaml.safe_load(one(rendered("prod-h100"), "ConfigMap", "gateway-envoy")["data"]["envoy.yaml"])
    listeners, clusters = config["static_resources"]["listeners"], config["static_resources"]["clusters"]
    config["admin"]["address"]["socket_address"]["port_value"] = admin
    for listener, port in zip(listeners, (grpc, status), strict=True):
        listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    for cluster in clusters:
        if cluster["name"] == "admin":
            readdress(cluster, [(admin, 0)])
        elif dns:
            readdress(cluster, servers, keep_name=True)
            cluster |= {"dns_refresh_rate": "0.2s", "typed_dns_resolver_config": resolver(dns)}
        else:
            readdress(cluster, servers)
        if "health_checks" in cluster:
            check = {"interval": "0.5s", "no_traffic_interval": "0.5s", "timeout": "3s", "unhealthy_threshold": 2}
            cluster["health_checks"] = [cluster["health_checks"][0] | check]
    file = folder / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [
        BIN / "envoy",
        "--config-path",
        file,
        "--concurrency",
        "1",
        "--log-level",
        "error",
        "--use-dynamic-base-id",
    ]
    with (folder / "envoy.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Gateway(grpc, status)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
