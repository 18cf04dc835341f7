"""Builds the C++ library of TensorRT plugins: kernels (plugins/aot.py), the table as C++, and csrc/ by CMake.

`python -m plugins.build --out build --arch 90 --head-dim 64,128`. Needs CMake and a C++17 compiler, TensorRT's headers
(`TENSORRT_INCLUDE`, the system's, or those in the `kernel-lens` wheel) and cuda.h (Triton brings it); no CUDA compiler.
"""

from __future__ import annotations

import ast
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastar_backend.errors import FastarError, InvalidInput
from plugins.aot import ARCHS, TYPES, numbers, pairs  # TYPES: in the order of csrc/table.h
from plugins.table import OPERATIONS, OPERATORS, Argument, Operator

SOURCES = Path(__file__).parent / "csrc"
SYSTEM_INCLUDES = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include")


class BuildError(FastarError):
    """The library cannot be built here."""

    code = "FAILED_PRECONDITION"


def postfix(expression: str | int, symbols: Sequence[str]) -> list[tuple[str, int]]:
    """An expression of the table in reverse Polish notation: ("#", number), ("$", symbol's index), (operation, 0)."""

    def walk(node: ast.AST) -> list[tuple[str, int]]:
        match node:
            case ast.Expression(body):
                return walk(body)
            case ast.Constant(int() as number):
                return [("#", number)]
            case ast.Name(name):
                return [("$", symbols.index(name))]
            case ast.Call(ast.Name("cdiv"), [a, b], []):
                return [*walk(a), *walk(b), ("^", 0)]
            case ast.BinOp(left, op, right) if type(op) in OPERATIONS:
                return [*walk(left), *walk(right), (OPERATIONS[type(op)][0], 0)]
        raise ValueError(f"expression {expression!r}: only + - * // and cdiv(a, b) over names and whole numbers")

    return walk(ast.parse(str(expression), mode="eval"))


def _quoted(text: str) -> str:
    return json.dumps(text)


def _braced(items: Sequence[str]) -> str:
    return "{" + ", ".join(items) + "}"


def _operator(operator: Operator) -> str:
    """A row of csrc/table.h's `Operator`."""
    bindings, tiles = operator.bindings(), [operator.tiles(False), operator.tiles(True)]
    if list(tiles[0]) != list(tiles[1]):
        raise ValueError(f"{operator.name}: the block sizes of both kinds of types have the same names")
    symbols = [*bindings, *operator.attributes, *tiles[0]]
    rows = [f"{{{_quoted(name)}, Symbol::Source::kDIM, {at}, {axis}}}" for name, (at, axis) in bindings.items()]
    for source, names in (("kATTRIBUTE", operator.attributes), ("kTILE", tiles[0])):
        rows += [f"{{{_quoted(name)}, Symbol::Source::{source}, {at}, 0}}" for at, name in enumerate(names)]

    def expression(text: str | int) -> str:
        return _braced([f"{{'{op}', {value}}}" for op, value in postfix(text, symbols)])

    def argument(item: Argument) -> str:
        kind = {"half": "kHALF", "f32": "kF32", "i32": "kI32"}[item.kind]
        alias = next((at for at, source in enumerate(operator.inputs) if source.name == item.alias), -1)
        dims = _braced([expression(dim) for dim in item.dims])
        return f"{{{_quoted(item.name)}, Kind::{kind}, {dims}, {_quoted(', '.join(item.dims))}, {alias}}}"

    def bounds(items: Mapping[str, str], divides: str) -> list[str]:
        return [_braced([divides, expression(value), expression(other), _quoted(value), _quoted(other)])
                for value, other in items.items()]  # fmt: skip

    kinds = {bool: "kBOOL", int: "kINT", float: "kFLOAT"}
    return _braced([
        _quoted(operator.name),
        _braced([argument(item) for item in operator.inputs]),
        _braced([argument(item) for item in operator.outputs]),
        _braced([expression(text) for text in operator.grid]),
        _braced([expression(text) for text in operator.extras]),
        _braced([_quoted(name) for name in operator.constants]),
        _braced([expression(text) for text in operator.constants.values()]),
        _braced([f"{{{_quoted(name)}, Attribute::Type::{kinds[type(value)]}, {float(value)!r}}}"
                 for name, value in operator.attributes.items()]),
        _braced(rows),
        _braced(bounds(operator.divides, "true") + bounds(operator.at_most, "false")),
        _braced([_braced(list(map(str, each.values()))) for each in tiles]),
    ])  # fmt: skip


def generate(folder: Path, kernels: Path) -> None:
    """Writes table.cpp and cubins.S into `folder`, of the table and the kernels in the folder `kernels`."""
    entries, names = json.loads((kernels / "kernels.json").read_text()), list(OPERATORS)
    lines = ['#include "table.h"', "", 'extern "C"', "{"]
    lines += [f"extern unsigned char const fastar_cubin_{at}[];" for at in range(len(entries))]
    lines += ["}", "", "namespace fastar", "{", "", "std::vector<Operator> const& operators()", "{",
              "    static std::vector<Operator> const all = {"]  # fmt: skip
    lines += [f"        {_operator(operator)}," for operator in OPERATORS.values()]
    lines += ["    };", "    return all;", "}", "", "std::vector<Kernel> const& kernels()", "{",
              "    static std::vector<Kernel> const all = {"]  # fmt: skip
    blobs = ['.section .rodata, "a"']
    for at, entry in enumerate(entries):
        of_type = TYPES.index(entry["type"]) if entry["type"] else -1
        constants = _braced([repr(float(value)) for value in entry["constants"].values()])
        tiles = _braced(list(map(str, entry["tiles"].values())))
        row = [str(names.index(entry["operator"])), str(of_type), str(entry["arch"]), constants, tiles,
               _quoted(entry["name"]), str(entry["warps"]), str(entry["shared"]), f"fastar_cubin_{at}"]  # fmt: skip
        lines.append(f"        {_braced(row)},")
        stem = (kernels / entry["stem"]).resolve()
        blobs += [".balign 64", f".global fastar_cubin_{at}", f".hidden fastar_cubin_{at}", f"fastar_cubin_{at}:",
                  f".incbin {_quoted(f'{stem}.cubin')}"]  # fmt: skip
    lines += ["    };", "    return all;", "}", "", "} // namespace fastar", ""]
    blobs += ['.section .note.GNU-stack, "", @progbits', ""]
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("table.cpp", "\n".join(lines)), ("cubins.S", "\n".join(blobs))):
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def _includes() -> tuple[Path, Path]:
    """Folders of NvInferRuntime.h and of cuda.h."""
    places = [Path(os.environ["TENSORRT_INCLUDE"])] if "TENSORRT_INCLUDE" in os.environ else []
    places += map(Path, SYSTEM_INCLUDES)
    wheel = importlib.util.find_spec("kernel_lens")
    if wheel and wheel.origin:
        places.append(Path(wheel.origin).parent / "include" / "tensorrt")
    tensorrt = next((place for place in places if (place / "NvInferRuntime.h").exists()), None)
    if not tensorrt:
        raise BuildError("TensorRT's headers are missing: set TENSORRT_INCLUDE, or `pip install --no-deps kernel-lens`")
    triton = importlib.util.find_spec("triton")
    cuda = Path(triton.origin).parent / "backends" / "nvidia" / "include" if triton and triton.origin else Path()
    if not (cuda / "cuda.h").exists():
        raise BuildError("cuda.h is missing: `pip install triton` brings it")
    return tensorrt, cuda


def _run(command: Sequence[str], what: str, **environment: str | None) -> None:
    chosen = {name: value for name, value in (os.environ | environment).items() if value is not None}
    done = subprocess.run(command, capture_output=True, text=True, env=chosen, check=False)
    if done.returncode:
        output = (done.stdout + done.stderr).strip()
        last = output.splitlines()[-1] if output else ""
        if last.startswith("error: "):  # of plugins.aot: a user's mistake, said in one line
            raise BuildError(last.removeprefix("error: "))
        raise BuildError(f"{what} failed: {' '.join(command)}\n{output[-4000:]}")


def library(
    build_dir: Path,
    archs: Sequence[int],
    types: Sequence[str],
    head_dims: Sequence[int],
    auto: bool = False,
    values: Mapping[str, Sequence[float]] | None = None,
    operators: Sequence[str] = (),
) -> Path:
    """Path of libfastar_plugins.so (`auto`: the one that registers itself) with the kernels that are asked for, as in
    aot.compile_all; beside it lies the host's library. Built in `build_dir`, where nothing is done twice. Kernels are
    compiled in a process of its own, so this one may have TRITON_INTERPRET set. Raises BuildError, InvalidInput."""
    for field, listed, allowed in (
        ("archs", archs, ARCHS),
        ("types", types, TYPES),
        ("operators", operators, OPERATORS),
    ):
        if unknown := [str(item) for item in listed if item not in allowed]:
            raise InvalidInput(field, ", ".join(unknown), ", ".join(map(str, allowed)))
    for field, listed in (("archs", archs), ("types", types), ("head_dims", head_dims)):
        if not listed:
            raise InvalidInput(field, "empty", "one at least")
    build_dir = Path(build_dir).resolve()
    build_dir.mkdir(parents=True, exist_ok=True)
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if not cmake:
        raise BuildError("CMake is missing: `pip install cmake`")
    tensorrt, cuda = _includes()
    kernels, generated = build_dir / "kernels", build_dir / "generated"
    command = [sys.executable, "-m", "plugins.aot", "--out", str(kernels), "--arch", ",".join(map(str, archs)),
               "--type", ",".join(types), "--head-dim", ",".join(map(str, head_dims))]  # fmt: skip
    for name, listed in (values or {}).items():
        command += ["--value", f"{name}={','.join(json.dumps(value) for value in listed)}"]
    for name in operators:
        command += ["--operator", name]
    path = os.pathsep.join(filter(None, [str(SOURCES.parents[1]), os.environ.get("PYTHONPATH", "")]))
    with (build_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes that build here, one waits
        _run(command, "compiling the kernels", TRITON_INTERPRET=None, PYTHONPATH=path)
        generate(generated, kernels)
        settings = {"CMAKE_BUILD_TYPE": "Release", "GENERATED": generated, "TENSORRT_INCLUDE": tensorrt,
                    "CUDA_INCLUDE": cuda}  # fmt: skip
        defined = [f"-D{name}={value}" for name, value in settings.items()]
        _run([cmake, "-S", str(SOURCES), "-B", str(build_dir / "cmake"), *defined], "configuring")
        _run([cmake, "--build", str(build_dir / "cmake"), "--parallel", str(os.cpu_count() or 1)], "compiling")
    return build_dir / "cmake" / f"libfastar_plugins{'_auto' if auto else ''}.so"


def main(
    out: Annotated[Path, typer.Option(help="Folder to build in.")],
    arch: Annotated[str, typer.Option(help="GPUs, comma-separated: 80, 86, 89, 90, 100, 120.")] = "90",
    type: Annotated[str, typer.Option(help=f"Comma-separated; of {', '.join(TYPES)}.")] = "fp16,bf16",
    head_dim: Annotated[str, typer.Option(help="Comma-separated.")] = "64,128",
    value: Annotated[list[str] | None, typer.Option(help='What else is compiled in: "density=0.25", "C=22".')] = None,
) -> None:
    """Builds the library of TensorRT plugins."""
    try:
        with Console().status("Compiling kernels, then C++: minutes, the first time"):
            made = library(out, numbers(arch), type.split(","), numbers(head_dim), values=pairs(value or ()))
    except FastarError as error:
        raise SystemExit(f"error: {error}") from None
    print(made)
    print(made.with_name("libfastar_plugins_auto.so"))


if __name__ == "__main__":
    typer.run(main)
