"""Kernels compiled ahead of time: what TensorRT passes is what they take, in PTX and in the cubin."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from triton import knobs

from fastar_backend.errors import InvalidInput
from plugins import aot
from plugins.table import OPERATORS

TENSOR_CORES = {"attend", "attend_sparse", "near_blocks", "nearest"}
HIDDEN = (".param .u64 .ptr .global .align 1 k_param_9", ".param .u64 .ptr .global .align 1 k_param_10")


def apart(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """In a process of its own: in this one kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = ["-c", code] if code else ["-m", "plugins.aot"]
    return subprocess.run([sys.executable, *program, *arguments], capture_output=True, text=True, timeout=600,
                          env=environment | {"PYTHONPATH": os.getcwd()}, check=False)  # fmt: skip


@pytest.fixture(scope="session")
def compiled(plugin_library) -> list[aot.Kernel]:
    """All operators for Hopper."""
    return aot.read(plugin_library.parents[1] / "kernels")


def cubin_parameters(cubin: bytes, folder: Path) -> list[int]:
    """Sizes in bytes, as the machine code has them."""
    (folder / "kernel.cubin").write_bytes(cubin)
    tool = [knobs.nvidia.cuobjdump.path, "-elf", str(folder / "kernel.cubin")]
    text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"EIATTR_KPARAM_INFO.*?Ordinal : (0x\w+).*?Size +: (0x\w+)", text, re.DOTALL)
    return [size for _, size in sorted((int(at, 16), int(size, 16)) for at, size in found)]


def check(kernel: aot.Kernel, folder: Path) -> None:
    """The contract, read anew from PTX and cubin."""
    operator = OPERATORS[kernel.operator]
    wanted = [8] * len(operator.inputs) + [4] * len(operator.extras) + [8] * len(operator.outputs)
    entry = kernel.ptx.split(".entry")[1].split(")")[0]
    assert [int(bits) // 8 for bits in re.findall(r"\.param \.[ub](\d+)", entry)] == wanted
    assert cubin_parameters(kernel.cubin, folder) == wanted
    assert len(re.findall(r"\.entry", kernel.ptx)) == 1
    assert f".entry {kernel.name}(" in kernel.ptx
    assert f".target sm_{kernel.arch}" in kernel.ptx
    assert kernel.shared <= {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[kernel.arch] * 1024
    assert f".reqntid {32 * kernel.warps}" in kernel.ptx
    assert ".file" not in kernel.ptx, "a path of this machine"


def test_every_operator_is_there(compiled):
    found = {(kernel.operator, kernel.type) for kernel in compiled}
    wanted = {(name, aot.own_type(operator, type)) for name, operator in OPERATORS.items() for type in ("fp16", "bf16")}
    assert found == wanted
    assert len(compiled) == len({kernel.stem for kernel in compiled})


@pytest.mark.parametrize("name", OPERATORS)
def test_the_contract(compiled, name, tmp_path):
    for kernel in compiled:
        if kernel.operator == name:
            check(kernel, tmp_path)
            assert kernel.local <= 16, "bytes of a thread's registers that did not fit"
            assert kernel.tiles == OPERATORS[name].tiles(False), "Hopper has the memory for the table's block sizes"
            assert "wgmma" in kernel.ptx or name not in TENSOR_CORES


def test_other_gpus_and_a_cache(tmp_path):
    """Where shared memory is short, attention gets by with less; what is there is not compiled again; the same source
    gives the same bytes."""
    arguments = ["--out", str(tmp_path / "a"), "--type", "bf16", "--head-dim", "128", "--operator", "attend"]
    done = apart(*arguments, "--arch", "86")
    assert done.returncode == 0, done.stderr
    (attend,) = aot.read(tmp_path / "a")
    check(attend, tmp_path)
    assert attend.shared > 48 * 1024
    script = """if True:
        import os, sys
        from pathlib import Path
        from plugins import aot
        folder = Path(sys.argv[1])
        archs = [80, 89, 90, 100, 120]
        made = aot.compile_all(folder / "b", archs, ["fp16"], [64], operators=["quantise"])
        os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
        again = aot.compile_all(folder / "c", archs[2:4], ["fp16"], [64], operators=["quantise"])
        assert [k.cubin for k in again] == [k.cubin for k in made[2:4]], "not the same bytes"
        aot._assemble = None
        kept = aot.compile_all(folder / "b", archs, ["fp16"], [64], operators=["quantise"])
        assert kept == made
        (folder / "b" / f"{made[0].stem}.ptx").unlink()
        try:
            aot.compile_all(folder / "b", archs, ["fp16"], [64], operators=["quantise"])
        except TypeError:
            print("compiled anew")"""
    done = apart(str(tmp_path), code=script)
    assert done.returncode == 0, done.stderr
    assert "compiled anew" in done.stdout
    found = aot.read(tmp_path / "c")
    assert [kernel.arch for kernel in found] == [90, 100]
    for kernel in found:
        check(kernel, tmp_path)


@pytest.mark.slow  # minutes: all that can be compiled
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_every_variant(arch, tmp_path):
    options = [
        "--arch",
        str(arch),
        "--head-dim",
        "32,64,128",
        "--value",
        "density=0.25,0.3",
        "--value",
        "renew=true,false",
    ]
    done = apart("--out", str(tmp_path), "--type", "fp16,bf16", *options)
    assert done.returncode == 0, done.stderr
    for kernel in aot.read(tmp_path):
        check(kernel, tmp_path)


@pytest.mark.slow  # minutes
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_float32_where_it_fits(arch, tmp_path):
    """Of the type for comparisons, 128 keys of 128 dimensions are more than a block may have on some."""
    done = apart("--out", str(tmp_path), "--type", "fp32", "--arch", str(arch), "--head-dim", "128")
    if aot.ARCHS[arch] < 100 * 1024:
        assert re.search(r"^error: attend_sparse fp32 .*bytes of shared memory", done.stderr, re.MULTILINE)
        done = apart("--out", str(tmp_path), "--type", "fp32", "--arch", str(arch), "--head-dim", "64")
    assert done.returncode == 0, done.stderr
    for kernel in aot.read(tmp_path):
        check(kernel, tmp_path)


def ptx(*parameters: str, body: str = "\tret;") -> str:
    return ".version 8.7\n.visible .entry k(\n\t" + ",\n\t".join(parameters) + f"\n)\n.reqntid 128\n{{\n{body}\n}}\n"


def declared(name: str) -> list[str]:
    return [f".param .{kind}{' .ptr .global .align 16' if kind == 'u64' else ''} k_param_{at}"
            for at, kind in enumerate(aot.parameters(OPERATORS[name]))]  # fmt: skip


def test_hidden_parameters_are_removed_where_they_are_not_used():
    given = declared("attend")  # nine
    body = "\tld.param.u64 %rd1, [k_param_1];"
    assert aot.strip(ptx(*given, *HIDDEN, body=body), OPERATORS["attend"]) == ptx(*given, body=body)
    assert aot.strip(ptx(*given), OPERATORS["attend"]) == ptx(*given)


def test_a_kernel_that_breaks_the_contract_is_refused():
    attend, given = OPERATORS["attend"], declared("attend")
    with pytest.raises(aot.ContractError, match="attend: uses hidden parameter 10"):
        aot.strip(ptx(*given, *HIDDEN, body="\tld.param.u64 %rd1, [k_param_10];"), attend)
    with pytest.raises(aot.ContractError, match="attend: 8 parameters; the table says 9"):
        aot.strip(ptx(*given[:-1]), attend)
    with pytest.raises(aot.ContractError, match=r"attend: parameter 4 is \.u32; the table says \.u64"):
        aot.strip(ptx(*given[:4], *given[5:], given[4]), attend)
    with pytest.raises(aot.ContractError, match="attend: the PTX has no entry"):
        aot.strip("", attend)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("wide", [False, True])
def test_smaller_blocks_need_no_other_shapes(name, wide):
    operator = OPERATORS[name]
    tried = list(aot.tilings(operator, wide))
    assert tried[0] == operator.tiled[wide]
    shaped = any("BLOCK_M" in dim for argument in (*operator.inputs, *operator.outputs) for dim in argument.dims)
    blocks = [tuple(each.get(key) for key in ("BLOCK_M", "BLOCK_N")) for each in tried]
    assert not shaped or len(set(blocks)) == 1
    assert all(x == 0 or x & (x - 1) == 0 for pair in blocks for x in pair if x)
    assert all(each.keys() == tried[0].keys() for each in tried)


def test_settings_are_all_combinations():
    turn = OPERATORS["turn"]
    assert list(aot.settings(turn, [64, 128], {})) == [{"C": 12, "D": 64}, {"C": 22, "D": 128}]
    wide = list(aot.settings(turn, [16, 64], {"C": [4, 22]}))
    assert wide == [{"C": 4, "D": 16}, {"C": 4, "D": 64}, {"C": 22, "D": 64}]  # 2 * 22 dimensions do not fit 16
    assert list(aot.settings(OPERATORS["nearest"], [64], {})) == [{"W": 16}]
    assert [each["density"] for each in aot.settings(OPERATORS["choose_blocks"], [64], {"density": [0.25, 0.5]})] == [
        0.25,
        0.5,
    ]
    with pytest.raises(InvalidInput, match="head_dim: 96; allowed: powers of two"):
        list(aot.settings(turn, [96], {}))


def test_what_cannot_be_compiled_is_said(tmp_path):
    operator, values = OPERATORS["quantise"], {"D": 64}
    with pytest.raises(InvalidInput, match="arch: 75; allowed: 80"):
        aot.compile_kernel(operator, "fp16", 75, values)
    with pytest.raises(InvalidInput, match="TRITON_INTERPRET: set"):
        aot.compile_kernel(dataclasses.replace(operator, kernel=types.SimpleNamespace()), "fp16", 90, values)
    with pytest.raises(InvalidInput, match="type: 'int8'; allowed: fp16, bf16, fp32"):
        aot.own_type(operator, "int8")
    with pytest.raises(InvalidInput, match="operators: 'none'; allowed: attend, "):
        aot.compile_all(tmp_path, [90], ["fp16"], [64], operators=["none"])
    with pytest.raises(InvalidInput, match="values: 'densty'; allowed: C, density, "):
        aot.compile_all(tmp_path, [90], ["fp16"], [64], values={"densty": [0.5]})
    with pytest.raises(InvalidInput, match="list: '90;80'"):
        aot.numbers("90;80")
    with pytest.raises(InvalidInput, match="values: 'density=x'"):
        aot.pairs(["density=x"])
    assert aot.pairs(["density=0.25,1", "renew=true"]) == {"density": [0.25, 1], "renew": [True]}
    assert aot.read(tmp_path) == []
