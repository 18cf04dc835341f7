"""C++ plugins in the thin host, on the CPU: what TensorRT asks a plugin, of every operator, against the table."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from plugins_sizes import HEAD_DIM, LIBRARY, attributes, shapes, types

from fastar_backend.errors import InvalidInput
from plugins.build import BuildError, library, postfix
from plugins.host import TYPES, Host, PluginError
from plugins.table import OPERATORS, evaluate

HALVES = ("float16", "bfloat16")
every = pytest.mark.parametrize("name", OPERATORS)


@pytest.fixture(scope="session")
def host(plugin_library) -> Host:
    return Host(plugin_library)


@pytest.fixture
def rng(request) -> random.Random:
    """Fresh every time; the seed is shown where a test fails."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


def numbers(fields) -> dict[str, float]:
    """As TensorRT keeps them: float32, int32."""
    return {key: float(np.float32(value)) if type(value) is float else int(value) for key, value in fields.items()}


def at_random(host: Host, name: str, rng: random.Random, half: str = "float16"):
    """A plugin, types and shapes of its inputs and outputs."""
    chosen = attributes(OPERATORS[name], rng)
    plugin = host.create(name, chosen)
    return plugin, types(OPERATORS[name], half), shapes(OPERATORS[name], chosen, rng)


def test_there_is_a_creator_for_every_operator(host):
    assert host.names == list(OPERATORS)
    assert host.namespaces == {("fastar", "1")}
    for name, operator in OPERATORS.items():
        assert host.fields[name] == numbers(operator.attributes), name


@every
@pytest.mark.parametrize("half", HALVES)
def test_types_and_shapes_are_the_tables(host, rng, name, half):
    inputs = len(OPERATORS[name].inputs)
    for _ in range(5):
        plugin, kinds, sizes = at_random(host, name, rng, half)
        assert plugin.types(kinds[:inputs]) == kinds[inputs:]
        assert plugin.shapes(sizes[:inputs]) == sizes[inputs:]
        plugin.configure(kinds, sizes)
        plugin.prepare(kinds, sizes)
        plugin.clone().prepare(kinds, sizes)


@every
def test_a_dimension_that_is_not_known_yet_stays_so(host, rng, name):
    """And only that one, and what follows from it."""
    operator = OPERATORS[name]
    plugin, kinds, sizes = at_random(host, name, rng)
    given = [list(shape) for shape in sizes[: len(operator.inputs)]]
    symbol, (at, axis) = rng.choice([item for item in operator.bindings().items() if item[0] not in ("D", "W")])
    given[at][axis] = -1
    plugin.types(kinds[: len(given)])
    for argument, dims, known in zip(operator.outputs, plugin.shapes(given), sizes[len(given) :], strict=True):
        for text, dim, size in zip(argument.dims, dims, known, strict=True):
            named = symbol in re.findall(r"\w+", text)
            assert dim == (-1 if named else size), (argument.name, text)


@every
def test_what_is_in_place(host, rng, name):
    plugin, kinds, sizes = at_random(host, name, rng)
    names = [argument.name for argument in OPERATORS[name].inputs]
    for at, argument in enumerate(OPERATORS[name].outputs):
        assert plugin.alias(at) == (names.index(argument.alias) if argument.alias else None)
        if argument.alias:
            addresses = [4096 * (each + 1) for each in range(len(kinds))]
            with pytest.raises(PluginError, match=f"^{name}: .*: another address than that of .*; allowed: the same"):
                plugin.run(kinds, sizes, addresses)
    assert plugin.alias(len(OPERATORS[name].outputs)) is None


@every
def test_formats(host, name):
    plugin, operator = host.create(name), OPERATORS[name]
    first = next((at for at, argument in enumerate(operator.inputs) if argument.kind == "half"), None)
    for half in HALVES:
        right = types(operator, half)
        for at in range(len(right)):
            assert plugin.supports(at, right)
            for other in set(TYPES) - {right[at]} - (set(HALVES) if at == first else set()):
                wrong = [*right[:at], other, *right[at + 1 :]]
                assert not plugin.supports(at, wrong), (at, other)
            assert not plugin.supports(at, right, [each != at for each in range(len(right))])


@every
def test_fields_go_through_an_engine(host, rng, name):
    given = {key: rng.random() if type(default) is float else rng.randint(0, 1 if type(default) is bool else 99)
             for key, default in OPERATORS[name].attributes.items()}  # fmt: skip
    plugin = host.create(name, given)
    assert plugin.fields() == numbers(given)
    assert plugin.clone().fields() == plugin.fields()
    assert host.create(name, plugin.fields(), runtime=True).fields() == plugin.fields()
    for key, value in given.items():  # one alone: the others have their defaults
        found = host.create(name, {key: value}).fields()
        assert found == numbers(OPERATORS[name].attributes | {key: value})


@every
def test_a_wrong_type_is_named(host, rng, name):
    operator, right = OPERATORS[name], types(OPERATORS[name], "float16")[: len(OPERATORS[name].inputs)]
    for at, argument in enumerate(operator.inputs):
        wrong = [*right[:at], "int64", *right[at + 1 :]]
        with pytest.raises(PluginError, match=f"^{name}: {argument.name}: type int64; allowed: .*{right[at]}"):
            host.create(name).types(wrong)
    with pytest.raises(PluginError, match=f"^{name}: {len(right) - 1} inputs; allowed: {len(right)}: "):
        host.create(name).types(right[:-1])


@every
def test_a_wrong_shape_is_named(host, rng, name):
    operator = OPERATORS[name]
    plugin, kinds, sizes = at_random(host, name, rng)
    bound = set(operator.bindings().values())
    for at, argument in enumerate(operator.inputs):
        longer = [*sizes[:at], (*sizes[at], 1), *sizes[at + 1 :]]
        what = rf"^{name}: {argument.name}: rank {len(sizes[at]) + 1}; allowed: {len(sizes[at])} \["
        with pytest.raises(PluginError, match=what):
            plugin.shapes(longer[: len(operator.inputs)])
        for axis in range(len(argument.dims)):
            if (at, axis) in bound:
                continue
            wrong = [list(shape) for shape in sizes]
            wrong[at][axis] += 1
            what = f"^{name}: {argument.name}: dimension {axis} is {wrong[at][axis]}; allowed: {sizes[at][axis]}, for"
            with pytest.raises(PluginError, match=what):
                plugin.shapes(wrong[: len(operator.inputs)])
            for call in (plugin.configure, plugin.prepare):
                with pytest.raises(PluginError, match=what):
                    call(kinds, wrong)
    wrong = [list(shape) for shape in sizes]
    wrong[-1][0] += 1
    with pytest.raises(PluginError, match=f"^{name}: {operator.outputs[-1].name}: not of the shape"):
        plugin.prepare(kinds, wrong)


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if operator.divides or operator.at_most])
def test_sizes_out_of_bounds_are_named(host, rng, name):
    operator = OPERATORS[name]
    checked = 0
    for value, other, word in ([(*item, "a multiple of") for item in operator.divides.items()]
                               + [(*item, "at most") for item in operator.at_most.items()]):  # fmt: skip
        for _ in range(4000):  # symbols at random, until this law is broken
            chosen = attributes(operator, rng, most=60)
            values = {symbol: {"D": HEAD_DIM}.get(symbol) or rng.randint(1, 99) for symbol in operator.bindings()}
            known = values | chosen
            is_now, bound = evaluate(value, known), evaluate(other, known)
            if (is_now % bound == 0) if word == "a multiple of" else (is_now <= bound):
                continue
            inputs = [tuple(evaluate(dim, known | operator.tiles(False)) for dim in argument.dims)
                      for argument in operator.inputs]  # fmt: skip
            with pytest.raises(PluginError) as refusal:
                host.create(name, chosen).shapes(inputs)
            if str(refusal.value).startswith(f"{name}: {value} is {is_now}; allowed: {word} {bound}"):
                checked += 1
                break
    assert checked == len(operator.divides) + len(operator.at_most)


def test_what_was_not_compiled_is_said(host):
    with pytest.raises(PluginError, match="^quantise: no kernel with D=32; allowed: D=64, as compiled"):
        host.create("quantise").shapes([(2, 9, 32)])
    with pytest.raises(PluginError, match="^quantise: x: type float32; allowed: bfloat16, float16, as compiled"):
        host.create("quantise").types(["float32"])
    with pytest.raises(PluginError, match="^choose_blocks: no kernel with DENSITY=0.5 KEYS=128; allowed: DENSITY=1 "):
        host.create("choose_blocks", {"density": 0.5}).shapes([(2, 3, 4), (1,)])


def test_wrong_fields_are_named(host):
    with pytest.raises(PluginError, match="^turn_into: rows: not an attribute; allowed: row$"):
        host.create("turn_into", {"rows": 1})
    with pytest.raises(PluginError, match="^quantise: row: not an attribute; allowed: none$"):
        host.create("quantise", {"row": 1})
    with pytest.raises(PluginError, match="^turn_into: row: 1.5.*; allowed: whole numbers"):
        host.create("turn_into", {"row": 1.5})
    with pytest.raises(PluginError, match="^merge: renew: 2.*; allowed: 0 or 1"):
        host.create("merge", {"renew": 2})
    with pytest.raises(PluginError, match="^condense_text: share: .*; allowed: finite numbers"):
        host.create("condense_text", {"share": float("nan")})
    with pytest.raises(InvalidInput, match="attend"):
        host.create("nothing")


def test_a_kernel_is_not_launched_in_vain(host):
    """Unaligned addresses, and a machine without a GPU: said, and no crash."""
    plugin, kinds, sizes = host.create("quantise"), ["float16", "int32"], [(2, 9, HEAD_DIM), (2, 9, HEAD_DIM // 4)]
    with pytest.raises(PluginError, match="^quantise: code: an address that is not aligned; allowed: multiples of 16"):
        plugin.run(kinds, sizes, [4096, 8200])
    with pytest.raises(PluginError, match="^quantise: x: an address"):
        plugin.run(kinds, sizes, [4098, 8192])
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(PluginError, match="^quantise: no CUDA|^quantise: the CUDA driver"):
            plugin.run(kinds, sizes, [4096, 8192])


def test_nothing_to_do_is_no_launch(host):
    host.create("quantise").run(["float16", "int32"], [(0, 9, HEAD_DIM), (0, 9, HEAD_DIM // 4)], [4096, 8192])


def test_the_library_needs_only_libc_and_shows_only_what_it_must(plugin_library):
    read = subprocess.run(["readelf", "-dW", str(plugin_library)], capture_output=True, text=True, check=True).stdout
    assert {line.split("[")[1].rstrip("]") for line in read.splitlines() if "(NEEDED)" in line} <= {
        "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2"}  # fmt: skip
    shown = {}
    for path in (plugin_library, plugin_library.with_name("libfastar_plugins_auto.so")):
        listed = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        shown[path.name] = {line.split()[-1] for line in listed.splitlines()}
    assert shown == {"libfastar_plugins.so": {"getCreators", "setLoggerFinder"}, "libfastar_plugins_auto.so": set()}


def opened(code: str, library) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": os.getcwd()}, check=True)  # fmt: skip


def test_the_other_form_registers_itself(plugin_library):
    library = plugin_library.with_name("libfastar_plugins_auto.so")
    code = """if True:
        import sys
        from pathlib import Path
        from plugins.host import Host
        host = Host(Path(sys.argv[1]), registered=True)
        print(*host.names, host.namespaces, host.create("quantise").shapes([(2, 9, 64)]))"""
    done = opened(code, library)
    assert done.stdout.split() == [*OPERATORS, *str({("fastar", "1")}).split(), *str([(2, 9, 16)]).split()]
    alone = opened("import ctypes, sys; ctypes.CDLL(sys.argv[1])", library)
    assert alone.stderr == "fastar: plugins are not registered: this process has no TensorRT loaded\n"


def test_the_other_form_does_not_register_with_another_tensorrt(plugin_library):
    pytest.importorskip("tensorrt_rtx_libs", reason="extra trt-test")
    library = plugin_library.with_name("libfastar_plugins_auto.so")
    done = opened("import ctypes, sys, tensorrt_rtx_bindings; ctypes.CDLL(sys.argv[1])", library)
    assert "built with the headers of TensorRT 10, and this process has version" in done.stderr


def test_building_is_done_once_and_refuses_kindly(plugin_library, tmp_path, monkeypatch):
    made = plugin_library.stat().st_mtime_ns
    again = library(plugin_library.parents[1], **LIBRARY)
    assert again == plugin_library
    assert again.stat().st_mtime_ns == made
    with pytest.raises(InvalidInput, match="types: empty"):
        library(tmp_path, archs=[90], types=[], head_dims=[64])
    with pytest.raises(InvalidInput, match="archs: 75; allowed: 80"):
        library(tmp_path, archs=[75], types=["fp16"], head_dims=[64])
    with pytest.raises(BuildError, match="^head_dim: 60; allowed: powers of two"):
        library(tmp_path, archs=[90], types=["fp16"], head_dims=[60])
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BuildError, match="CMake is missing"):
        library(tmp_path, archs=[90], types=["fp16"], head_dims=[64])


@pytest.mark.slow  # builds another library
def test_float32_has_blocks_of_its_own(tmp_path):
    made = Host(library(tmp_path, archs=[90], types=["fp32", "fp16"], head_dims=[64],
                        operators=["block_means", "attend_sparse"]))  # fmt: skip
    kinds = ["float32"] * 4 + ["int32"] * 3 + ["float32"]
    sizes = [(100, 3, 64), (3, 256, 64), (3, 256, 64), (3, 256), (3, 100), (3, 4), (3, 4, 2), (100, 3, 64)]
    made.create("attend_sparse", runtime=True).prepare(kinds, sizes)  # which was not asked for types before
    with pytest.raises(PluginError, match="^attend_sparse: counts: dimension 1 is 4; allowed: 1, for"):
        made.create("attend_sparse", runtime=True).prepare(["float16"] * 3 + kinds[3:7] + ["float16"], sizes)
    for kind, blocks in (("float32", 4), ("float16", 1)):
        plugin = made.create("block_means")
        assert plugin.types([kind, "int32"]) == [kind]
        for each in (plugin, plugin.clone()):
            assert each.shapes([(100, 3, 64), (3, 100)]) == [(3, blocks, 64)]
            each.prepare([kind, "int32", kind], [(100, 3, 64), (3, 100), (3, blocks, 64)])
            with pytest.raises(PluginError, match="^block_means: mean: not of the shape"):
                each.prepare([kind, "int32", kind], [(100, 3, 64), (3, 100), (3, blocks + 1, 64)])
    with pytest.raises(PluginError, match="^attend: query: type float16; allowed: none, as compiled"):
        made.create("attend").types(["float16"] * 3 + ["float32", "int32"])


def test_expressions_in_postfix():
    assert postfix("2 * C + cdiv(N, B) // 3", ["N", "B", "C"]) == [
        ("#", 2), ("$", 2), ("*", 0), ("$", 0), ("$", 1), ("^", 0), ("#", 3), ("/", 0), ("+", 0)]  # fmt: skip
    with pytest.raises(ValueError, match="expression 'N % 2'"):
        postfix("N % 2", ["N"])
