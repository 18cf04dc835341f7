"""The overlays as kubectl renders them, alone and with components. Rendered once; do not change what you get."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from k8s.simulate.manifest import ROOT, render

# name -> overlay, components. Components that no overlay has are tried on one.
VARIANTS = {
    "dev-cpu": ("dev-cpu", ()),
    "staging": ("staging", ()),
    "prod-h100": ("prod-h100", ()),
    "prod-h100+dra": ("prod-h100", ("dra",)),
    "staging+hpa-native": ("staging", ("hpa-native",)),
    "staging+redis": ("staging", ("redis",)),
}


@functools.cache
def rendered(variant: str) -> list[dict[str, Any]]:
    """Raises ManifestError."""
    overlay, components = VARIANTS[variant]
    folder = ROOT / "overlays" / overlay
    if not components:
        return render(folder)
    with tempfile.TemporaryDirectory() as temporary:
        near = functools.partial(os.path.relpath, start=Path(temporary).resolve())
        values = {
            "namespace": next(o["metadata"]["name"] for o in rendered(overlay) if o["kind"] == "Namespace"),
            "resources": [near(folder)],
            "components": [near(ROOT / "components" / name) for name in components],
        }
        Path(temporary, "kustomization.yaml").write_text(yaml.safe_dump(values))
        return render(Path(temporary))
