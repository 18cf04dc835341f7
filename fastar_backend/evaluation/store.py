"""The folder of a run: its settings, and the result of every finished unit as a line of JSON. A run that was stopped
goes on from there; the report is made from nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from fastar_backend.config import AttentionConfig, parse
from fastar_backend.errors import InvalidInput
from fastar_backend.evaluation.suites import Part, Settings


@dataclasses.dataclass(frozen=True)
class Unit:
    """One measurement: a policy in one scene."""

    part: Part
    policy: str
    scenario: str
    seed: int
    kind: str = "walk"  # of scene

    @property
    def key(self) -> str:
        return "/".join((self.part, self.policy, self.kind, self.scenario or "world", str(self.seed)))


class Store:
    """settings.json, units.jsonl; beside them scenes/, reference/ (what dense attention made) and media/."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, folder / "units.jsonl"

    @property
    def scenes(self) -> Path:
        return self.folder / "scenes"

    def reference(self, name: str) -> Path:
        return self.folder / "reference" / f"{name}.npz"

    def media(self, name: str) -> Path:
        return self.folder / "media" / f"{name}.npz"

    def begin(self, settings: Settings, policies: dict[str, AttentionConfig], resume: bool) -> None:
        """Raises InvalidInput if the folder holds results and `resume` is not set, or they are of other settings.
        Policies may be added to those that a folder has."""
        path = self.folder / "settings.json"
        wanted = {name: config.model_dump(mode="json") for name, config in policies.items()}
        if path.exists():
            if not resume:
                raise InvalidInput("--out", f"{self.folder} holds results", "--resume, or another folder")
            held = self._read(path)
            mine = settings.model_dump(mode="json")
            other = [key for key in mine if held["settings"].get(key) != mine[key]]
            # Parsed: settings that did not exist yet when the folder was made had what is their default now.
            known = {name: parse(AttentionConfig, held["policies"][name], str(path)) for name in held["policies"]}
            other += [f"policy {name}" for name in policies if known.get(name, policies[name]) != policies[name]]
            if other:
                key = other[0]
                was = held["settings"].get(key, "another")
                raise InvalidInput("--out", f"{self.folder} is of other settings: {key} was {was!s:.120}",
                                   "the same settings, or another folder")  # fmt: skip
            wanted = held["policies"] | wanted
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(path, {"settings": settings.model_dump(mode="json"), "policies": wanted})
        if self.lines.exists():  # a killed run may have left half a line
            whole = self.lines.read_bytes()
            self.lines.write_bytes(whole[: whole.rfind(b"\n") + 1])

    def open(self) -> tuple[Settings, dict[str, dict[str, Any]]]:
        """Of an existing folder: its settings and its policies' attention settings. Raises InvalidInput."""
        path = self.folder / "settings.json"
        if not path.exists():
            raise InvalidInput("DIR", f"{path} is not there", "the --out folder of a run of `fastar eval`")
        held = self._read(path)
        return parse(Settings, held["settings"], str(path)), held["policies"]

    def add(self, unit: Unit, result: dict[str, Any]) -> None:
        line = json.dumps({"key": unit.key, **dataclasses.asdict(unit), "result": result})
        with self.lines.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def units(self) -> dict[str, dict[str, Any]]:
        """Key -> the unit's line (its fields and `result`); of a unit measured twice the last one."""
        if not self.lines.exists():
            return {}
        rows = (json.loads(line) for line in self.lines.read_text().splitlines() if line.endswith("}"))
        return {row["key"]: row for row in rows}

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            raise InvalidInput("DIR", f"{path} cannot be read", "the --out folder of a run of `fastar eval`") from None

    @staticmethod
    def _write(path: Path, value: dict[str, Any]) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(value, indent=1) + "\n")
        partial.replace(path)
