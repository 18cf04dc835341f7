"""Compiles the operators' kernels ahead of time, on a machine without a GPU: PTX and cubin by type, constexprs and GPU.

`python -m plugins.aot --out build --arch 90,100 --head-dim 64,128` fills the folder with kernels.json (a list of
`Kernel` as objects) and a .ptx and a .cubin of each; what is there and up to date is not compiled again.

The contract of a kernel: its parameters are the operator's inputs (pointers, 16-byte aligned), `extras` (int32) and
outputs (pointers), and no others. Triton's compiler adds pointers to scratch memory, which nobody could pass; that no
kernel uses them is proved here, and they are removed before the PTX is assembled.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import triton
import typer
from rich.progress import Progress
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastar_backend.errors import InvalidInput
from plugins.table import OPERATORS, Operator

TYPES = ("fp16", "bf16", "fp32")
# GPU (compute capability) -> bytes of shared memory that a block may have. A kernel is for that very GPU.
ARCHS = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TENSOR_MEMORY = 512  # columns of it that a block of 100 may have
BLOCKED = {"Q", "K", "BLOCK_M"}  # in an operator's dimensions: its block sizes are part of its meaning
CONTRACT = "1"  # what is made of the PTX here: part of the cache's key


class ContractError(RuntimeError):
    """A compiled kernel is not what TensorRT can launch."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """constants: values of the operator's `constants`, by which a kernel is chosen. tiles: block sizes, for the grid.
    type: "" where no tensor has the network's type. shared, local: bytes a block, a thread."""

    operator: str
    type: str
    arch: int
    constants: Mapping[str, int | float | bool]
    tiles: Mapping[str, int]
    name: str  # of the PTX's entry
    warps: int
    shared: int
    registers: int
    local: int
    key: str
    ptx: str = dataclasses.field(repr=False)
    cubin: bytes = dataclasses.field(repr=False)

    @property
    def stem(self) -> str:
        """Of its files' names."""
        constants = [f"{name}{value:g}" for name, value in self.constants.items()]
        return "-".join(filter(None, [self.operator, self.type, *constants, f"sm{self.arch}"]))


def own_type(operator: Operator, type: str) -> str:
    """ "" for an operator that no tensor of the network's type goes through."""
    if type not in TYPES:
        raise InvalidInput("type", repr(type), ", ".join(TYPES))
    return type if any(argument.kind == "half" for argument in operator.inputs) else ""


def parameters(operator: Operator) -> list[str]:
    """What a kernel takes, in order, as types of PTX."""
    return ["u64"] * len(operator.inputs) + ["u32"] * len(operator.extras) + ["u64"] * len(operator.outputs)


def strip(ptx: str, operator: Operator) -> str:
    """The PTX without Triton's hidden parameters. Raises ContractError where one is used, or others are not as the
    contract has them."""
    entry = re.search(r"(\.visible \.entry (\w+)\()(.*?)(\n?\))", ptx, re.DOTALL)
    if not entry:
        raise ContractError(f"{operator.name}: the PTX has no entry")
    declared = [line.strip() for line in entry[3].split(",\n") if line.strip()]
    wanted = parameters(operator)
    for at, line in enumerate(declared):
        of_type, name = re.match(r"\.param \.(\w+)\b.*?(\w+)$", line).groups()
        if at < len(wanted) and of_type.replace("b", "u") != wanted[at]:
            raise ContractError(f"{operator.name}: parameter {at} is .{of_type}; the table says .{wanted[at]}")
        if at >= len(wanted) and re.search(rf"\b{name}\b", ptx[entry.end() :]):
            raise ContractError(f"{operator.name}: uses hidden parameter {at}: memory that nobody could pass")
    if len(declared) < len(wanted):
        raise ContractError(f"{operator.name}: {len(declared)} parameters; the table says {len(wanted)}")
    kept = ",\n".join(f"\t{line}" for line in declared[: len(wanted)])
    return f"{ptx[: entry.start()]}{entry[1]}\n{kept}{entry[4]}{ptx[entry.end() :]}"


def tilings(operator: Operator, wide: bool) -> Iterator[dict[str, int]]:
    """Block sizes and launch options: the table's, then such as need less and less shared memory."""
    chosen = dict(operator.tiled[wide])
    yield dict(chosen)
    names = {name for argument in (*operator.inputs, *operator.outputs) for dim in argument.dims
             for name in re.findall(r"\w+", str(dim))}  # fmt: skip
    while chosen.get("num_stages", 1) > 1:
        chosen["num_stages"] -= 1
        yield dict(chosen)
    if names & BLOCKED:
        return
    while max(sizes := [chosen.get(name, 0) for name in ("BLOCK_M", "BLOCK_N")]) > 32:
        chosen["BLOCK_N" if sizes[1] >= sizes[0] else "BLOCK_M"] //= 2
        yield dict(chosen)


def _assemble(source: ASTSource, arch: int, options: Mapping[str, int], operator: Operator) -> Any:
    """triton.compile, with the hidden parameters removed between PTX and cubin."""

    def hook(*stages: Any) -> Any:
        if not stages:
            return CONTRACT, CONTRACT
        make = stages[1]["ptx"]
        stages[1]["ptx"] = lambda module, metadata: strip(make(module, metadata), operator)
        return None

    with knobs.runtime.scope(), knobs.compilation.scope():
        knobs.runtime.add_stages_inspection_hook = hook
        knobs.compilation.disable_line_info = True  # no paths of this machine; the same bytes everywhere
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))


def _source(operator: Operator, type: str, constexprs: Mapping[str, Any]) -> ASTSource:
    pointers = {"half": f"*{type}", "f32": "*fp32", "i32": "*i32"}
    kinds = [*(pointers[argument.kind] for argument in operator.inputs), *("i32" for _ in operator.extras),
             *(pointers[argument.kind] for argument in operator.outputs)]  # fmt: skip
    names = operator.kernel.arg_names
    unknown = set(names[len(kinds) :]) ^ set(constexprs)
    if unknown:
        raise ContractError(f"{operator.name}: {', '.join(sorted(unknown))}: of the kernel or the table alone")
    signature = dict(itertools.zip_longest(names, kinds, fillvalue="constexpr"))
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(kinds) if kind.startswith("*")}
    return ASTSource(operator.kernel, signature, {(names.index(name),): v for name, v in constexprs.items()}, aligned)


def compile_kernel(
    operator: Operator, type: str, arch: int, values: Mapping[str, float], known: Mapping[str, Kernel] | None = None
) -> Kernel:
    """type: of TYPES. values: of all names in the operator's `constants` (dimensions, attributes). known: kernels by
    key, not to be compiled again. Raises InvalidInput; ContractError where a kernel is not fit for TensorRT."""
    if arch not in ARCHS:
        raise InvalidInput("arch", str(arch), ", ".join(map(str, ARCHS)))
    if not isinstance(operator.kernel, triton.JITFunction):
        raise InvalidInput("TRITON_INTERPRET", "set: kernels are interpreted, not compiled", "a process without it")
    type, wide = own_type(operator, type), type == "fp32"
    constants = {name: value for name, value in operator.constexprs(values, wide).items() if name in operator.constants}
    table = _source(operator, type, operator.constexprs(values, wide))
    text = f"{table.hash()} {arch} {operator.tiled[wide]} {triton.__version__} {CONTRACT}"
    key = hashlib.sha256(text.encode()).hexdigest()
    if known and key in known:
        return known[key]
    made = None
    for tiled in tilings(operator, wide):
        sized = dataclasses.replace(operator, tiled=(tiled, tiled))
        source = _source(sized, type, sized.constexprs(values, wide))
        made = _assemble(source, arch, sized.launch_options(wide), operator)
        if made.metadata.shared <= ARCHS[arch] and (made.metadata.tmem_size or 0) <= TENSOR_MEMORY:
            break
    else:
        raise ContractError(
            f"{operator.name} {type} {constants} sm_{arch}: {made.metadata.shared} bytes of shared memory a block, and "
            f"its block sizes are part of its meaning; allowed: {ARCHS[arch]}"
        )
    if made.metadata.global_scratch_size or made.metadata.profile_scratch_size:
        raise ContractError(f"{operator.name}: wants scratch memory that nobody could pass")
    registers, local = _resources(made.asm["cubin"])
    return Kernel(operator.name, type, arch, constants, sized.tiles(wide), made.metadata.name, made.metadata.num_warps,
                  made.metadata.shared, registers, local, key, made.asm["ptx"], made.asm["cubin"])  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(tool, capture_output=True, check=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return int(found[1]), int(found[2]) + int(found[3])


def _named(operator: Operator) -> set[str]:
    """Dimensions and attributes in the operator's `constants`."""
    trees = (ast.parse(str(expression)) for expression in operator.constants.values())
    return {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}


def settings(
    operator: Operator, head_dims: Sequence[int], values: Mapping[str, Sequence[float]]
) -> Iterator[dict[str, Any]]:
    """All values of the names in the operator's `constants`: head dimensions, what goes with them, and `values` (else
    an attribute's default). C, the turned half, is a model's choice; by default that of Wan's split in three."""
    names = _named(operator)
    seen = []
    for dim in head_dims:
        if dim < 16 or dim & (dim - 1):
            raise InvalidInput("head_dim", str(dim), "powers of two from 16 on")
        sizes = {"D": [dim], "W": [dim // 4], "C": [(dim - 4 * (dim // 6)) // 2]}
        lists = {name: values.get(name) or sizes.get(name) or [operator.attributes[name]] for name in sorted(names)}
        for chosen in itertools.product(*lists.values()):
            found = dict(zip(lists, chosen, strict=True))
            if found.get("C", 0) * 2 <= dim and found not in seen:
                seen.append(found)
                yield found


def read(folder: Path) -> list[Kernel]:
    """The kernels of a folder; none where nothing was compiled. One whose files are gone is left out."""
    if not (folder / "kernels.json").exists():
        return []
    found = []
    for entry in json.loads((folder / "kernels.json").read_text()):
        stem = entry.pop("stem")
        ptx, cubin = (folder / f"{stem}.{kind}" for kind in ("ptx", "cubin"))
        kernel = Kernel(**entry, ptx="", cubin=b"")
        if ptx.exists() and cubin.exists():
            found.append(dataclasses.replace(kernel, ptx=ptx.read_text(), cubin=cubin.read_bytes()))
    return found


def write(folder: Path, kernels: Sequence[Kernel]) -> None:
    """Replaces what the folder has; kernels.json last, as whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for kernel in kernels:
        (folder / f"{kernel.stem}.ptx").write_text(kernel.ptx)
        (folder / f"{kernel.stem}.cubin").write_bytes(kernel.cubin)
        fields = dataclasses.asdict(kernel)
        entries.append({"stem": kernel.stem} | {k: v for k, v in fields.items() if k not in ("ptx", "cubin")})
    part = folder / f"kernels.json.{os.getpid()}"
    part.write_text(json.dumps(entries, indent=1))
    part.replace(folder / "kernels.json")


def compile_all(
    folder: Path,
    archs: Sequence[int],
    types: Sequence[str],
    head_dims: Sequence[int],
    values: Mapping[str, Sequence[float]] | None = None,
    operators: Sequence[str] = (),
) -> list[Kernel]:
    """Every kernel that is asked for, compiled or found in `folder`, and written there. operators: () = all of them.
    Raises InvalidInput, ContractError."""
    for name in operators:
        if name not in OPERATORS:
            raise InvalidInput("operators", repr(name), ", ".join(OPERATORS))
    allowed = set().union(*(_named(operator) for operator in OPERATORS.values())) - {"D", "W"}
    for name in values or {}:
        if name not in allowed:
            raise InvalidInput("values", repr(name), ", ".join(sorted(allowed)))
    wanted: dict[tuple, tuple] = {}
    for operator, arch, type in itertools.product([OPERATORS[n] for n in operators or OPERATORS], archs, types):
        for chosen in settings(operator, head_dims, values or {}):
            of = own_type(operator, type), arch, operator.name, *chosen.items()
            wanted.setdefault(of, (operator, type, arch, chosen))
    known = {kernel.key: kernel for kernel in read(folder)}
    made: list[Kernel] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("Kernels", total=len(wanted))
        for request in wanted.values():
            progress.update(task, description=f"{request[0].name} {request[1]} sm_{request[2]}")
            made.append(compile_kernel(*request, known))
            progress.advance(task)
    write(folder, made)
    return made


def numbers(text: str) -> list[int]:
    """Of a comma-separated list. Raises InvalidInput."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInput("list", repr(text), "whole numbers, comma-separated") from None


def pairs(texts: Sequence[str]) -> dict[str, list[float]]:
    """Of "name=number,number" each. Raises InvalidInput."""
    found = {}
    for text in texts:
        name, _, listed = text.partition("=")
        try:
            found[name] = [json.loads(part) for part in listed.split(",")]
        except ValueError:
            raise InvalidInput("values", repr(text), "name=number,number (true and false for a bool)") from None
    return found


def main(
    out: Annotated[Path, typer.Option(help="Folder for kernels.json and the kernels.")],
    arch: Annotated[str, typer.Option(help=f"Comma-separated; of {', '.join(map(str, ARCHS))}.")] = "90",
    type: Annotated[str, typer.Option(help=f"Comma-separated; of {', '.join(TYPES)}.")] = "fp16,bf16",
    head_dim: Annotated[str, typer.Option(help="Comma-separated.")] = "64,128",
    value: Annotated[
        list[str] | None, typer.Option(help='What else is compiled in: "density=0.25,0.5", "C=22".')
    ] = None,
    operator: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
) -> None:
    """Compiles the kernels of the TensorRT plugins ahead of time."""
    try:
        made = compile_all(out, numbers(arch), type.split(","), numbers(head_dim), pairs(value or ()), operator or ())
    except (InvalidInput, ContractError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{len(made)} kernels, {sum(len(k.cubin) for k in made)} bytes of cubins: {out / 'kernels.json'}")


if __name__ == "__main__":
    typer.run(main)
