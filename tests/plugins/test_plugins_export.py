"""Exported graphs: what the files say, and that they compute what the modules do, alone and in whole streams."""
# ruff: noqa: E402 - without the exporter's packages this module is skipped

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="exports need onnx and onnxscript: extra trt-test")
pytest.importorskip("onnxscript", reason="exports need onnx and onnxscript: extra trt-test")
pytest.importorskip("onnxruntime", reason="runs the files' standard nodes: extra trt-test")

from onnx import TensorProto, helper
from plugins_eager import EagerExecutor
from plugins_streams import SPARSE, make_world

from fastar_backend.config import AttentionConfig
from fastar_backend.engine.engine import StreamEngine, cache_shape
from fastar_backend.engine.snapshot import fingerprint
from fastar_backend.engine.stream import StreamOptions
from fastar_backend.errors import InvalidInput
from fastar_backend.model.world import World
from plugins import export, runner, step
from plugins.evaluator import Evaluator
from plugins.table import OPERATORS, table_hash

ATTENTION = AttentionConfig(budget_frames=14, recent_frames=4, merge_threshold=0.5, fold_threshold=0.2)
BUCKET = ATTENTION.model_copy(update={"sparse_density": 0.3, "dense_steps": 0.4, "sparse_order": "bucket"})
MORE = 256  # rows of another budget
# Tracing a kind of layer takes seconds. The other two are made of the same pieces.
QUICK = ("denoise", "write", "write_sparse", "begin", "update", "prompt")
UNUSED = {"keep_text", "text_mass", "condense_text"}  # AnnCA's


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world") / "export")


@pytest.fixture(scope="module")
def files(world, tmp_path_factory) -> dict[str, Path]:
    return export.export(world, BUCKET, tmp_path_factory.mktemp("onnx"), QUICK, "fp32")


@pytest.fixture(scope="module")
def plan(world):
    return step.plan(world.config, BUCKET)


def random_tensors(plan: step.Plan, graph: str, batch: int, rows: int) -> dict[str, torch.Tensor]:
    """Bindings of a stream in its middle: some slots free, each stream at another place of its ring."""
    shape, slots, heads = plan.shape, plan.caches.slots, plan.shape.heads * batch
    places = torch.arange(batch, dtype=torch.int32) % (plan.caches.places // shape.chunk_frames) * shape.chunk_tokens
    own = {"row": slots + places, "origin_row": places, "far": plan.caches.far[:1], "lines": plan.caches.far}
    tensors = {}
    for binding in step.bindings(plan, graph):
        if binding.alias:
            continue
        name, size = binding.name.split(".")[0], binding.size(B=batch, R=rows, G=heads)
        if name in own:
            value = own[name].clone()
        elif name == "first":
            value = torch.randint(0, slots, size, dtype=torch.int32)
        elif name == "code":
            value = torch.ops.fastar.quantise(torch.randn(*size[:2], shape.head_dim))
        elif name == "count":
            value = torch.randint(1, 4, size).float()
            value[:, slots:] = 1
            value[:, slots + plan.caches.places * shape.frame_tokens :] = 0
        elif name == "text_count":
            value = torch.randint(0, 3, size).float()
            value[:, -1] = 5
        else:
            value = torch.rand(size) if binding.kind == "f32" else torch.randn(size)
        tensors[binding.name] = value.to(binding.type(shape.dtype))
    for name, count in tensors.items():  # what is not held has neither count nor value
        if name.split(".")[0] == "count":
            first = tensors[name.replace("count", "first")]
            count[torch.arange(rows) < first[:, None]] = 0
            tensors[name.replace("count", "values")][count == 0] = 0
    return tensors


@pytest.mark.parametrize("graph", QUICK)
@pytest.mark.parametrize(("batch", "more"), [(1, 0), (3, MORE)])
def test_files_compute_what_the_modules_do(files, plan, world, graph, batch, more):
    """From one file, whatever the number of streams and rows."""
    compare(files[graph], plan, world, graph, batch, plan.rows + (0 if graph == "update" else more))


@pytest.mark.slow  # traces one more kind of layer
def test_denoise_sparse_computes_what_the_module_does(world, tmp_path):
    for order in ("bucket", "place"):
        attention = BUCKET.model_copy(update={"sparse_order": order})
        (path,) = export.export(world, attention, tmp_path, ["denoise_sparse"], "fp32").values()
        plan = step.plan(world.config, attention)
        for batch in (1, 2):
            compare(path, plan, world, "denoise_sparse", batch, plan.rows)


def compare(path: Path, plan: step.Plan, world: World, graph: str, batch: int, rows: int) -> None:
    torch.manual_seed(seed := torch.seed() % 1000)
    given = random_tensors(plan, graph, batch, rows)
    mine, theirs = ({name: value.clone() for name, value in given.items()} for _ in range(2))
    Evaluator(path).run(mine)
    EagerExecutor(plan, world.dit, graph).run(theirs)
    changed = {binding.alias or binding.name for binding in step.bindings(plan, graph) if binding.output}
    for name, before in given.items():
        if name not in changed:
            assert torch.equal(mine[name], before), f"{name} is an input only"
        else:
            assert not torch.equal(mine[name], before), f"{name} is written"
            assert torch.allclose(mine[name].float(), theirs[name].float(), atol=2e-4), (name, seed)


def test_files_say_what_they_are(files, plan, world):
    for graph, path in files.items():
        model = onnx.load(str(path), load_external_data=False)
        stated = {entry.key.removeprefix("fastar."): entry.value for entry in model.metadata_props}
        assert stated.pop("attention") == BUCKET.model_dump_json()
        assert stated == {
            "world": "random", "fingerprint": fingerprint(world), "dtype": "fp32", "graph": graph,
            "operators": table_hash(), "operators_version": "1",
        }  # fmt: skip
        text = path.read_bytes().decode("latin1")
        assert ".py" not in text, "names of source files"
        assert str(Path(__file__).parents[2]) not in text


def test_inputs_and_outputs_are_the_bindings(files, plan):
    kinds = {"half": TensorProto.FLOAT, "f32": TensorProto.FLOAT, "i32": TensorProto.INT32}
    for graph, path in files.items():
        model = onnx.load(str(path), load_external_data=False).graph
        for value, binding in zip((*model.input, *model.output), step.bindings(plan, graph), strict=True):
            assert value.name == binding.name
            assert value.type.tensor_type.elem_type == kinds[binding.kind]
            if binding.alias:
                assert binding.name == f"{binding.alias}.after"
            for dim, expression in zip(value.type.tensor_type.shape.dim, binding.shape, strict=True):
                fixed = expression.isdigit()
                assert (dim.dim_value == int(expression)) if fixed else dim.dim_param, (binding.name, expression)


def test_nodes_are_the_tables(files):
    """All attributes are written out, with the values that the graph was made for."""
    seen = {}
    for path in files.values():
        for node in onnx.load(str(path), load_external_data=False).graph.node:
            if node.domain != "fastar":
                continue
            operator = OPERATORS[node.op_type]
            assert len(node.input) == len(operator.inputs)
            assert len(node.output) == len(operator.outputs)
            given = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
            assert {name: type(value) for name, value in given.items()} == {
                name: int if isinstance(value, bool) else type(value) for name, value in operator.attributes.items()
            }
            seen.setdefault(node.op_type, []).append(given)
    assert set(seen) == set(OPERATORS) - UNUSED
    assert seen["turn_into"] == [{"row": 200}]
    assert {entry["own"] for entry in seen["choose_blocks"]} == {40}
    assert {round(entry["density"], 6) for entry in seen["choose_blocks"]} == {0.3}
    assert [entry["renew"] for entry in seen["merge"]] == [1, 0]


def test_weights_are_there_once(files, world):
    """Of all graphs together, and as PyTorch has them."""
    stored = files["denoise"].with_name(export.WEIGHTS).stat().st_size
    mine = sum(weight.nbytes for weight in world.dit.parameters())
    assert mine < stored < 1.5 * mine + (1 << 18), "each begins at a page"
    denoise = onnx.load(str(files["denoise"])).graph
    names = {weight.name: weight for weight in denoise.initializer}
    weight = onnx.numpy_helper.to_array(names["layer.1.block.ffn.0.weight"])
    assert torch.equal(torch.from_numpy(weight.copy()), world.dit.blocks[1].ffn[0].weight)


@pytest.mark.slow  # traces two more kinds of layer
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_types(world, dtype, tmp_path):
    """Exported and checked; fp16 also run, against the module in the same type."""
    kind = export.TYPES[dtype]
    world = dataclasses.replace(world, dit=copy.deepcopy(world.dit).to(kind))
    (path,) = export.export(world, SPARSE, tmp_path, ["denoise"], dtype).values()
    graph = onnx.load(str(path), load_external_data=False).graph
    element = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[dtype]
    assert {value.name: value.type.tensor_type.elem_type for value in graph.input}["keys.0"] == element
    if dtype == "bf16":
        with pytest.raises(InvalidInput, match="bf16"):
            Evaluator(path)
        return
    plan = step.plan(world.config, SPARSE, kind)
    mine = random_tensors(plan, "denoise", 2, plan.rows)
    theirs = {name: value.clone() for name, value in mine.items()}
    Evaluator(path).run(mine)
    EagerExecutor(plan, world.dit, "denoise").run(theirs)
    error = (mine["output"].float() - theirs["output"].float()).norm() / theirs["output"].float().norm()
    assert error < 1e-2, error


def test_what_cannot_be_exported_is_named(world, tmp_path):
    with pytest.raises(InvalidInput, match="dtype: got 'int8'"):
        export.export(world, SPARSE, tmp_path, dtype="int8")
    with pytest.raises(InvalidInput, match="dtype: got fp16"):
        export.export(world, SPARSE, tmp_path, dtype="fp16")
    with pytest.raises(InvalidInput, match="attention.guard"):
        export.export(world, SPARSE.model_copy(update={"guard": "hold"}), tmp_path, dtype="fp32")
    with pytest.raises(InvalidInput, match="attention.sparse_density"):
        export.export(world, AttentionConfig(budget_frames=6, recent_frames=4), tmp_path, ["write_sparse"], "fp32")
    assert list(tmp_path.iterdir()) == [], "what is wrong is said before anything is written"


def broken(path: Path, change) -> Path:
    model = onnx.load(str(path))
    change(model)
    onnx.save(model, str(there := path.with_name("broken.onnx")))
    return there


def test_files_that_tensorrt_could_not_read_are_refused(files, plan):
    def wide(model):
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE

    def unknown(model):
        next(node for node in model.graph.node if node.domain == "fastar").op_type = "dream"

    def renamed(model):
        model.graph.input[2].name = model.graph.node[0].input[2] = "line"

    def complicated(model):
        model.graph.node.append(helper.make_node("NonZero", ["keys"], ["where"]))

    def older(model):
        model.opset_import[0].version = 19

    for change, error in {
        wide: "float|DOUBLE|type", unknown: "dream", renamed: "inputs and outputs", complicated: "NonZero",
        older: "opset",
    }.items():  # fmt: skip
        with pytest.raises(Exception, match=error):
            export.check(broken(files["begin"], change), step.bindings(plan, "begin"))
    export.check(files["begin"], step.bindings(plan, "begin"))


def test_what_is_not_bound_is_named(files, plan):
    tensors = random_tensors(plan, "begin", 1, plan.rows)
    evaluator = Evaluator(files["begin"])
    with pytest.raises(InvalidInput, match="lines: bound is nothing"):
        evaluator.run({name: value for name, value in tensors.items() if name != "lines"})
    with pytest.raises(InvalidInput, match=r"keys: bound is torch\.float16"):
        evaluator.run(tensors | {"keys": tensors["keys"].half()})


def test_an_export_leaves_no_graphs_of_an_earlier_one(world, tmp_path):
    """Their weights are gone."""
    (tmp_path / "denoise.onnx").write_bytes(b"old")
    export.export(world, SPARSE, tmp_path, ["begin"], "fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begin.onnx", "weights.bin"]
    assert json.loads(Evaluator(tmp_path / "begin.onnx").metadata["fastar.attention"])["budget_frames"] == 24


def rollout(engine: StreamEngine, chunks: int) -> list[torch.Tensor]:
    """Clean latents of a stream, the same noise and actions for every engine."""
    generator, world = torch.Generator().manual_seed(17), engine.world
    engine.open(1, "a dark maze", StreamOptions(start="nothing"))
    (stream,), levels = engine.streams.values(), len(world.config.sampler.sigmas) + 1
    result = []
    for _ in range(chunks):
        noise = torch.randn(levels, 1, *engine.latent_shape, generator=generator)
        actions = torch.randint(0, 2, (1, engine.shape.chunk_frames, len(world.config.buttons)), generator=generator)
        phases = {"denoise": 0.0, "write": 0.0}
        with torch.inference_mode():
            result.append(engine._generate([stream], actions.float(), noise, phases))
        stream.latent_frame += engine.shape.chunk_frames
    assert stream.caches.stats().merged > 0
    return result


def same_streams(world: World, attention: AttentionConfig, files: dict[str, Path], chunks: int, merging: int) -> None:
    """By the files, by the modules and, until groups are attended to (from chunk `merging` on), by plain PyTorch."""
    plan, shape = step.plan(world.config, attention), cache_shape(world)
    by_files = {graph: Evaluator(files[graph]) for graph in plan.graphs}
    by_modules = {graph: EagerExecutor(plan, world.dit, graph) for graph in plan.graphs}
    runtimes = [runner.EngineRuntime(world, shape, attention, executors) for executors in (by_files, by_modules)]
    mine, theirs = (rollout(StreamEngine(world, attention, runtime=runtime), chunks) for runtime in runtimes)
    plain = rollout(StreamEngine(world, attention), chunks)
    for index, (a, b, c) in enumerate(zip(mine, theirs, plain, strict=True)):
        # In the mean, for a rounded code may decide where a token goes, and there things differ by more.
        assert (a - b).norm() < 1e-3 * b.norm(), (index, (a - b).norm() / b.norm())
        if index < merging:
            assert torch.allclose(a, c, atol=1e-3), (index, (a - c).abs().max())
    assert not torch.allclose(mine[-1], mine[-2], atol=0.1)


def test_whole_streams_by_the_files(world, files):
    same_streams(world, ATTENTION, files, chunks=10, merging=3)  # the last two overflow


@pytest.mark.slow  # the embedded world: a minute of export, more of passes
def test_whole_streams_of_the_embedded_world_by_the_files(doom_world, tmp_path):
    attention = AttentionConfig(budget_frames=6, recent_frames=4)
    files = export.export(doom_world, attention, tmp_path, dtype="fp32")
    same_streams(doom_world, attention, files, chunks=14, merging=3)
