"""Every kernel compiles for Hopper on a machine without a GPU, at the types and sizes that are served."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# In a process of its own: this one may run Triton's interpreter, whose kernels cannot be compiled.
SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from importlib import import_module

module, name, signature, constants, warps = json.loads(sys.argv[1])
kernel = getattr(import_module(f"fastar_backend.kernels.{module}.kernel"), name)
order = kernel.arg_names
types = {arg: constants.get(arg) is None and signature.get(arg, "i32") or "constexpr" for arg in order}
source = ASTSource(kernel, types, {(order.index(arg),): value for arg, value in constants.items()},
                   {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(order) if types[arg].startswith("*")})
built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
print(json.dumps({"cubin": len(built.asm["cubin"]), "shared": built.metadata.shared,
                  "scratch": built.metadata.global_scratch_size, "wgmma": "wgmma" in built.asm["ptx"]}))
"""
B, F, INT, I8 = "*bf16", "*fp32", "*i32", "*i8"
ATTEND = {"query": B, "key": B, "value": B, "count": F, "first": INT, "order": "*i64", "counts": INT,
          "blocks": INT, "before": B, "before_lse": F, "scale": "fp32", "out": B}  # fmt: skip
TILES = {"BLOCK_M": 128, "BLOCK_N": 128, "PRECISION": "tf32"}
ROWS = {"new_key": B, "new_value": B, "new_code": I8, "new_count": F, "new_stay": F, "key": B, "value": B,
        "code": I8, "count": F, "stay": F}  # fmt: skip
KERNELS = {
    "dense": ("attend", "attend_kernel", ATTEND, {"D": 128, "SPARSE": False, "BEFORE": True} | TILES, 8),
    "sparse": ("attend", "attend_kernel", ATTEND, {"D": 128, "SPARSE": True, "BEFORE": False} | TILES, 8),
    "small": ("attend", "attend_kernel", ATTEND, {"D": 64, "SPARSE": False, "BEFORE": False} | TILES, 8),
    "nearest": ("nearest", "nearest_kernel", {"probe": I8, "code": I8, "first": INT, "similarity": F, "match": INT},
                {"D": 128, "BLOCK_M": 128, "BLOCK_N": 64}, 8),
    "turn": ("turn", "turn_kernel", {"source": B, "turns": INT, "cos": F, "sin": F, "out": B},
             {"D": 128, "TIME": 44, "BLOCK": 32}, 4),
    "place": ("merge", "place_kernel", ROWS | {"slot": "*i64", "newcomer": "*i64", "replace": I8}, {"D": 128}, 1),
    "merge": ("merge", "merge_kernel", ROWS | {"target": INT, "order": INT}, {"D": 128, "RENEW": True}, 1),
    "modulate": ("norm", "modulate_kernel", dict.fromkeys(("x", "y", "table", "change", "weight", "bias", "out",
                 "normed"), B) | {"eps": "fp32"},
                 {"BLOCK": 2048, "RESIDUAL": True, "GATED": True, "NORM": True, "AFFINE": False}, 4),
    "heads": ("norm", "heads_kernel", {"source": B, "weight": B, "cos": F, "sin": F, "eps": "fp32", "out": B},
              {"D": 128, "HEADS": 16, "ROTATE": True}, 4),
}  # fmt: skip
TENSOR_CORES = {"dense", "sparse", "small", "nearest"}


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_hopper(name, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, json.dumps(KERNELS[name])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    built = json.loads(done.stdout)
    assert built["cubin"] > 0
    assert built["scratch"] == 0, "no hidden scratch memory: the kernels become plugins"
    assert built["shared"] <= 227 * 1024
    assert built["wgmma"] == (name in TENSOR_CORES)
