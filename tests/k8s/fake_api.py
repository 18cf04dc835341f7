"""An API server and servers' metrics, small, as real HTTP servers: for the controller's tests.

The API server knows what the controller may ask, and no more: pods of one namespace (list, patch), Leases (get, create,
update with resourceVersion). It notes each call as (verb, resource, body), and can refuse or delay the next ones.
"""

from __future__ import annotations

import collections
import contextlib
import http.server
import json
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CODE = Path(__file__).parents[2] / "k8s" / "controller"  # a package of its own, not necessarily installed
sys.path.insert(0, str(CODE))
NAMESPACE = "fastar"
MICRO = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|\+00:00)"  # the only form of MicroTime that Go reads


class Quiet(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(
        self, code: int, body: bytes, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        with contextlib.suppress(ConnectionError):  # the caller did not wait
            self.send_response(code)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Served:
    """A handler on a port of its own, until `stop`."""

    def __init__(self, handler: type[Quiet], host: str = "127.0.0.1", port: int = 0) -> None:
        self.server = http.server.ThreadingHTTPServer((host, port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Server(Served):
    """A server's /metrics. silent: answers 500."""

    def __init__(self, streams: int, slots: int) -> None:
        self.streams, self.slots, self.draining, self.silent = streams, slots, 0, False
        self.rates: collections.Counter[str] = collections.Counter()
        self.asked: list[str] = []  # to send streams on
        self.closed: list[str] = []  # and to be, for so long
        self.refuses = False
        outer = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                if self.path != "/metrics" or outer.silent:
                    return self.reply(500, b"", "text/plain")
                return self.reply(200, outer.text().encode(), "text/plain; charset=utf-8")

            def do_POST(self) -> None:
                (outer.closed if self.path.startswith("/close") else outer.asked).append(self.path)
                self.reply(409 if outer.refuses else 202, b"", "text/plain")

        super().__init__(Handler)

    def watch(self, rate: float, times: int) -> None:
        """Observes a frame rate."""
        for bound in ("8.0", "12.0", "16.0", "24.0", "+Inf"):
            if rate <= float(bound):
                self.rates[bound] += times

    def text(self) -> str:
        lines = [
            "# HELP nv_gpu_utilization GPU utilization",
            "# TYPE nv_gpu_utilization gauge",
            'nv_gpu_utilization{gpu_uuid="x"} 0.5',
            "# TYPE fastar_streams_active gauge",
            f'fastar_streams_active{{model="fastar",version="1"}} {self.streams}',
            "# TYPE fastar_streams_capacity gauge",
            f"fastar_streams_capacity {self.slots}",
            "# TYPE fastar_draining gauge",
            f"fastar_draining {self.draining}",
            "# TYPE fastar_stream_fps_bucket counter",
            *(f'fastar_stream_fps_bucket{{le="{bound}"}} {count}' for bound, count in self.rates.items()),
        ]
        return "\n".join(lines) + "\n"


class Api(Served):
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.pods: dict[str, dict[str, Any]] = {}
        self.leases: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, str, Any]] = []
        self.version = 1
        self.broken: dict[str, int] = {}  # verb -> status that it answers
        self.slow = 0.0  # seconds before each answer
        outer = self

        class Handler(Quiet):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                time.sleep(outer.slow)
                with outer.lock:
                    code, reply = outer.answer(self.command, self.path, self.headers.get("Content-Type"), body)
                self.reply(code, json.dumps(reply).encode())

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        super().__init__(Handler)
        self.url = f"http://127.0.0.1:{self.port}"

    def add(self, name: str, port: int, ready: bool = True, admin: int | None = None) -> None:
        """port: of its /metrics, on 127.0.0.1; admin: None: the same."""
        ports = [{"name": "grpc", "containerPort": 1}, {"name": "metrics", "containerPort": port}]
        ports.append({"name": "admin", "containerPort": admin or port})
        with self.lock:
            self.pods[name] = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "namespace": NAMESPACE,
                    "labels": {"app.kubernetes.io/name": "triton"},
                },
                "spec": {"containers": [{"name": "triton", "ports": ports}]},
                "status": {
                    "podIP": "127.0.0.1",
                    "phase": "Running",
                    "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
                },
            }

    def costs(self) -> dict[str, str | None]:
        with self.lock:
            key = "controller.kubernetes.io/pod-deletion-cost"
            return {name: pod["metadata"].get("annotations", {}).get(key) for name, pod in self.pods.items()}

    def opened(self) -> set[str]:
        """By their label."""
        with self.lock:
            return {n for n, pod in self.pods.items() if pod["metadata"]["labels"].get("fastar/placement") != "closed"}

    def holder(self) -> str:
        with self.lock:
            return next((lease["spec"]["holderIdentity"] for lease in self.leases.values()), "")

    def did(self, verb: str, resource: str | None = None) -> list[Any]:
        with self.lock:
            return [body for v, r, body in self.calls if v == verb and resource in (None, r)]

    def answer(self, method: str, path: str, kind: str | None, body: Any) -> tuple[int, dict[str, Any]]:
        url = urllib.parse.urlsplit(path)
        match = re.fullmatch(
            rf"/(?:api/v1|apis/coordination.k8s.io/v1)/namespaces/{NAMESPACE}/(\w+)(?:/([\w.-]+))?", url.path
        )
        verb = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[method]
        if not match or match[1] not in ("pods", "leases"):
            self.calls.append((verb, f"outside: {url.path}", body))
            return failure(403, f"{url.path}: forbidden")
        resource, name = match.groups()
        verb = "list" if verb == "get" and name is None else verb
        self.calls.append((verb, resource, body))
        if status := self.broken.get(verb):
            return failure(status, f"{verb} is broken")
        act = getattr(self, f"{verb}_{resource}", None)
        if act is None:
            return failure(405, verb)
        return act(name, body, kind=kind, query=urllib.parse.parse_qs(url.query))

    def list_pods(self, _: None, __: Any, query: dict[str, list[str]], **___: Any) -> tuple[int, dict[str, Any]]:
        key, value = query["labelSelector"][0].split("=")
        items = [pod for pod in self.pods.values() if pod["metadata"]["labels"].get(key) == value]
        return 200, {"apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": "1"}, "items": items}

    def patch_pods(self, name: str, body: Any, kind: str, **_: Any) -> tuple[int, dict[str, Any]]:
        if kind != "application/merge-patch+json":
            return failure(415, str(kind))
        if name not in self.pods:
            return failure(404, name)
        merge(self.pods[name], body)
        return 200, self.pods[name]

    def get_leases(self, name: str, _: Any, **__: Any) -> tuple[int, dict[str, Any]]:
        return (200, self.leases[name]) if name in self.leases else failure(404, name)

    def create_leases(self, _: None, body: Any, **__: Any) -> tuple[int, dict[str, Any]]:
        name = body["metadata"]["name"]
        return failure(409, "exists") if name in self.leases else self._store(name, body)

    def update_leases(self, name: str, body: Any, **_: Any) -> tuple[int, dict[str, Any]]:
        if body["metadata"].get("resourceVersion") != self.leases[name]["metadata"]["resourceVersion"]:
            return failure(409, "the object has been modified")
        return self._store(name, body)

    def _store(self, name: str, body: Any) -> tuple[int, dict[str, Any]]:
        for field in ("acquireTime", "renewTime"):
            if not re.fullmatch(MICRO, body["spec"][field]):
                return failure(400, f"{field}: {body['spec'][field]} is no MicroTime")
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self.leases[name] = body
        return 200, body


def failure(code: int, message: str) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


def merge(target: dict[str, Any], patch: dict[str, Any]) -> None:
    """RFC 7386, as far as it is needed."""
    for key, value in patch.items():
        if isinstance(value, dict):
            merge(target.setdefault(key, {}), value)
        else:
            target[key] = value


@contextlib.contextmanager
def fleet(*loads: tuple[int, int]) -> Iterator[tuple[Api, list[Server]]]:
    """An API server with pods triton-0, ..., which carry (streams, slots) each."""
    api, servers = Api(), [Server(*load) for load in loads]
    for index, server in enumerate(servers):
        api.add(f"triton-{index}", server.port)
    try:
        yield api, servers
    finally:
        for one in (api, *servers):
            one.stop()


def eventually(what, seconds: float = 8.0) -> None:
    """Until it is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
