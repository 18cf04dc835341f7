"""The floors of docs/structure.md: imports run downward only, files stay small, the two ends of the wire agree."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FILE = 450  # lines
EDGE = ROOT / "model_repository" / "fastar" / "1" / "model.py"
PACKAGE = sorted((ROOT / "fastar_backend").rglob("*.py"))
CLIENT = sorted((ROOT / "client" / "fastar_client").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
RUNS = ("bindings", "engines", "ops", "qdp", "runner", "step", "table")  # of plugins: what serving or building imports
CONTROLLER = sorted((ROOT / "k8s" / "controller" / "fastar_controller").rglob("*.py"))

# What each part of the package may import of the package; the first prefix that fits a module counts.
MAY_IMPORT = {
    "fastar_backend.errors": (),
    "fastar_backend.config": ("errors",),
    "fastar_backend.model.layers": ("config", "errors"),
    "fastar_backend.kernels": ("kernels",),
    "fastar_backend.attention.reference": (),  # shares no code, hence no mistake, with what it checks
    "fastar_backend.attention": ("config", "errors", "kernels", "model.layers", "attention"),
    "fastar_backend.model": ("config", "errors", "kernels", "model"),
    "fastar_backend.engine": ("config", "errors", "attention", "model", "engine"),
    "fastar_backend.service": ("config", "errors", "engine", "service"),
    "fastar_backend.serve": ("config", "errors", "service.config", "serve"),
    "fastar_backend.evaluation": ("config", "errors", "attention", "model", "engine", "evaluation"),
    "fastar_backend.cli": ("",),
    "fastar_backend": (),
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, module: str = "") -> set[str]:
    """Modules that a file imports, anywhere in it. `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the floor"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def forbidden(module: str, imported: set[str]) -> list[str]:
    rule = next(rule for rule in MAY_IMPORT if within(module, rule))
    allowed = [f"fastar_backend.{part}".rstrip(".") for part in MAY_IMPORT[rule]]
    ours = [name for name in imported if within(name, "fastar_backend")]
    return sorted(name for name in ours if not any(within(name, prefix) for prefix in allowed))


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_imports_run_downward(path):
    module = module_of(path)
    assert forbidden(module, imports(path.read_text(), module)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastar_backend.attention.cache", "from fastar_backend.engine import stream"),
        ("fastar_backend.attention.cache", "from fastar_backend.model import dit"),
        ("fastar_backend.model.world", "def f():\n    import fastar_backend.attention.cache"),
        ("fastar_backend.attention.reference", "from fastar_backend.attention.cache import attention"),
        ("fastar_backend.config", "from fastar_backend import model"),
    ],
)
def test_upward_imports_are_seen(module, source):
    assert forbidden(module, imports(source)) != []


def test_plugins_are_imported_only_where_an_engine_is_asked_for():
    """The command's sub-commands by name, the runner by a setting; so a server without TensorRT never loads them."""
    from fastar_backend.engine import runtime

    found = {}
    for path in PACKAGE:
        if names := {name for name in imports(path.read_text()) if within(name, "plugins")}:
            found[module_of(path)] = names
    assert found == {"fastar_backend.cli": {"plugins.cli.app"}}
    assert runtime.RUNNER == "plugins.runner"
    assert (ROOT / "plugins" / "runner.py").exists()
    heavy = "{'onnx', 'onnxruntime', 'tensorrt', 'plugins.runner', 'plugins.ops', 'plugins.table'}"
    loaded = "import sys, fastar_backend.cli as _, fastar_backend.engine.engine as _"
    code = f"{loaded}; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("path", PLUGINS, ids=module_of)
def test_plugins_find_tensorrt_when_they_need_it(path):
    """Nothing imports it by name; ONNX is for exporting, not for running."""
    outside = ["tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings"]
    if path.stem in RUNS:
        outside += ["onnx", "onnxscript", "onnxruntime"]
    assert not [name for name in imports(path.read_text(), module_of(path)) if name.split(".")[0] in outside]


@pytest.mark.parametrize("path", [*PACKAGE, *CLIENT, *PLUGINS, EDGE], ids=module_of)
def test_service_does_not_need_training_benchmarks_or_tests(path):
    outside = ["training", "benchmarks", "tests", "pytest", "k8s"]
    if "evaluation" not in path.parts and path.name != "plots.py":  # which measure: they are no part of the service
        outside += ["matplotlib", "cv2", "vizdoom", "scipy", "torchmetrics", "flip_evaluator"]
    assert not [name for name in imports(path.read_text()) if name.split(".")[0] in outside]


@pytest.mark.parametrize("path", CLIENT, ids=module_of)
def test_client_is_independent(path):
    assert not [name for name in imports(path.read_text()) if name.split(".")[0] in ("torch", "fastar_backend")]


def test_importing_the_client_loads_no_torch():
    code = "import sys, fastar_client; print([m for m in ('torch', 'fastar_backend') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_edge_has_no_maths():
    """It may use torch to hand tensors over, but the models and the attention only through the engine."""
    ours = [name for name in imports(EDGE.read_text()) if within(name, "fastar_backend")]
    assert not [name for name in ours if not re.match(r"fastar_backend\.(config|errors|engine|service)\.", name)]
    assert "torch.nn" not in EDGE.read_text()


# Of the controller; placement and health are pure: what they decide depends on what they are given alone.
CONTROLLER_MAY_IMPORT = {
    "placement": (),
    "scrape": (),
    "admin": (),
    "status": (),
    "api": (),
    "health": ("scrape",),
    "lease": ("api",),
    "controller": ("admin", "api", "health", "lease", "placement", "scrape", "status"),
    "cli": ("",),
    "__main__": ("cli",),
    "__init__": (),
}
PURE = {"placement", "health"}


@pytest.mark.parametrize("path", CONTROLLER, ids=lambda path: path.stem)
def test_the_controller_is_a_package_of_its_own(path):
    imported = imports(path.read_text())
    assert not [name for name in imported if name.split(".")[0] in ("torch", "fastar_backend", "fastar_client", "k8s")]
    allowed = [f"fastar_controller.{part}".rstrip(".") for part in CONTROLLER_MAY_IMPORT[path.stem]]
    ours = [name for name in imported if within(name, "fastar_controller")]
    assert [name for name in ours if not any(within(name, prefix) for prefix in allowed)] == []
    if path.stem in PURE:
        assert not {name.split(".")[0] for name in imported} & {"kubernetes", "urllib", "http", "threading", "time"}


@pytest.mark.parametrize("path", [*PACKAGE, *CLIENT, *CONTROLLER, EDGE], ids=module_of)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


def test_no_machine_paths_in_the_package():
    for path in [*PACKAGE, *CLIENT, *CONTROLLER, EDGE]:
        assert not re.search(r"[\"' ]/(tmp|home|root|work)/", path.read_text()), path


def block(text: str, name: str) -> dict[str, str]:
    """Tensor name -> data type of config.pbtxt's `input [...]` or `output [...]`."""
    body = re.search(rf"^{name} \[$(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert body, f"config.pbtxt has no {name}"
    return dict(re.findall(r'name: "(\w+)" data_type: TYPE_(\w+)', body[1]))


def test_config_pbtxt_is_the_clients_protocol():
    from fastar_client import protocol

    config = (ROOT / "model_repository" / "fastar" / "config.pbtxt").read_text()
    stated = dict(re.findall(r"^([A-Z]+) +(BYTES|UINT8) \[", protocol.__doc__, re.MULTILINE))
    kinds = {"STRING": "BYTES", "UINT8": "UINT8"}
    assert re.search(r'^name: "(\w+)"', config, re.MULTILINE)[1] == protocol.MODEL
    inputs, outputs = ({k: kinds[v] for k, v in block(config, side).items()} for side in ("input", "output"))
    assert tuple(inputs) == protocol.INPUTS
    assert tuple(outputs) == protocol.OUTPUTS
    assert inputs | outputs == stated


def test_both_ends_agree_on_stats_world_options_and_limits(world):
    from fastar_client import protocol

    from fastar_backend.engine import engine, stream
    from fastar_backend.service import session

    ours = {field.name for field in dataclasses.fields(stream.ChunkStats)}
    theirs = {field.name for field in dataclasses.fields(protocol.ChunkStats)}
    service = {"received", "applied", "actions", "encoding", "packets", "queue_seconds", "encode_seconds"}
    service |= {"late", "snapshot_chunk", "process_bytes", "world", "token"}
    assert theirs == ours | service
    assert {field.name for field in dataclasses.fields(protocol.World)} == set(world.info())
    full = protocol.StreamOptions(
        "a maze", seed=1, start="auto", attention={"kind": "dense"}, measure_recall=True, fps=24.0, encoding="jpeg"
    )
    read = session.read_options(full.as_json())
    assert (read.seed, read.attention.kind, read.fps, read.encoding) == (1, "dense", 24.0, "jpeg")
    engines = {"seed", "start", "attention", "measure_recall"}
    assert set(stream.StreamOptions.model_fields) == engines
    assert set(session.StartOptions.model_fields) == engines | {"fps", "encoding", "resume", "fork"}
    assert (engine.PROMPT_BYTES, engine.ACTION_BYTES) == (protocol.MAX_PROMPT_BYTES, protocol.MAX_ACTION_BYTES)
    stream.StreamOptions(seed=protocol.MAX_SEED)
