"""The shipped gateway, run here: the servers' addresses and the ports are other ones, the rest is what ships."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml
from rendered import rendered

from k8s.simulate.manifest import one

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

    def healthy(self) -> int:
        """Servers that both of its clusters take for well; -1: it does not answer."""
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            found = re.findall(
                r'^envoy_cluster_membership_healthy\{envoy_cluster_name="triton.*"\} (\d+)',
                self.get("/stats/prometheus"),
                re.MULTILINE,
            )
            if len(set(found)) == 1:
                return int(found[0])
        return -1

    def wait_for(self, servers: int, timeout: float = 15.0) -> None:
        deadline = time.monotonic() + timeout
        while (found := self.healthy()) != servers:
            assert time.monotonic() < deadline, f"{found} healthy servers, not {servers}"
            time.sleep(0.1)


def resolver(port: int) -> dict[str, object]:
    return {
        "name": "envoy.network.dns_resolver.cares",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
            "resolvers": [{"socket_address": {"address": "127.0.0.1", "port_value": port}}],
            "dns_resolver_options": {"no_default_search_domain": True},
        },
    }


@contextlib.contextmanager
def gateway(folder: Path, servers: list[int], dns: int | None = None, port: int | None = None) -> Iterator[Gateway]:
    """In front of the servers at these ports of 127.0.0.1; looks at them every half second.

    dns: asks this port of 127.0.0.1 for the servers' addresses, as it would in a cluster; they have one port then.
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
        ports = [admin] if cluster["name"] == "admin" else servers
        addresses = [{"socket_address": {"address": "127.0.0.1", "port_value": port}} for port in ports]
        endpoints = [{"endpoint": {"address": address}} for address in addresses]
        if dns and cluster["name"] != "admin":
            endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
            endpoint["address"]["socket_address"]["port_value"] = servers[0]
            cluster |= {"dns_refresh_rate": "0.2s", "typed_dns_resolver_config": resolver(dns)}
        else:
            cluster["type"] = "STATIC"
            cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
        if "health_checks" in cluster:
            check = {"interval": "0.5s", "no_traffic_interval": "0.5s", "timeout": "0.4s", "unhealthy_threshold": 2}
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
