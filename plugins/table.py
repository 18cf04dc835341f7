"""The operators of domain `fastar`, declared once: PyTorch's operators, the ahead-of-time compiled kernels, both kinds
of TensorRT plugins and the ONNX evaluator are all made from `OPERATORS`.

All tensors are contiguous. `half` is the network's type (float16, bfloat16; float32 for comparisons). Dimensions are
expressions over symbols, each bound by the first input dimension that is that symbol alone:

N queries of a chunk, G groups = streams x heads (a stream's heads adjacent), R rows of a cache, D head_dim (a power of
two), S slots of the memory (the first rows of a cache), B streams, n tokens of a frame or of a call, F latent frames
(which divide the tokens), L lines of the table of turns, C half of the dimensions turned in time, P pairs, Q query
blocks, K key blocks, T prompt tokens, V projections, W = D // 4: an int8 vector as 32-bit words, since TensorRT keeps
8-bit tensors for quantisation.

A kernel takes, in this order: the inputs, `extras` (int32), the outputs; then constexprs. Kernels need no scratch. An
output with `alias` is that input, changed in place; PyTorch and ONNX see a function.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from plugins import kernels, selection_kernels

Kind = Literal["half", "f32", "i32"]
LAUNCH = ("num_warps", "num_stages")
OPERATIONS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//"}


@dataclasses.dataclass(frozen=True)
class Argument:
    """A tensor of an operator. dims: expressions."""

    name: str
    kind: Kind
    dims: tuple[str, ...]
    alias: str | None = None  # of an output: the input that it is


@dataclasses.dataclass(frozen=True)
class Operator:
    """grid: expressions, along x and y. constants: constexprs that are expressions over dimensions and attributes (by
    name) or numbers; `tiled`: constexprs and launch options that follow from the type, (half, float32). attributes:
    name -> default, which gives the type. divides: value -> what it must be a multiple of; at_most: value -> bound."""

    name: str
    kernel: Any  # triton.JITFunction
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    grid: tuple[str, str]
    extras: tuple[str, ...]
    constants: Mapping[str, str | int] = dataclasses.field(default_factory=dict)
    tiled: tuple[Mapping[str, int], Mapping[str, int]] = ({}, {})
    attributes: Mapping[str, int | float | bool] = dataclasses.field(default_factory=dict)
    divides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    at_most: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def bindings(self) -> dict[str, tuple[int, int]]:
        """Symbol -> (input, dimension) that gives its value."""
        found: dict[str, tuple[int, int]] = {}
        for at, argument in enumerate(self.inputs):
            for axis, dim in enumerate(argument.dims):
                if dim.isidentifier():
                    found.setdefault(dim, (at, axis))
        return found

    def tiles(self, wide: bool) -> dict[str, int]:
        """Of float32, if `wide`, else of a half type: sizes by name, also of dimensions, grid and extras."""
        return {name: value for name, value in self.tiled[wide].items() if name not in LAUNCH}

    def launch_options(self, wide: bool) -> dict[str, int]:
        """num_warps and num_stages."""
        return {name: value for name, value in self.tiled[wide].items() if name in LAUNCH}

    def values(self, shapes: Sequence[Sequence[Any]], attributes: Mapping[str, Any], wide: bool) -> dict[str, Any]:
        """All that expressions may name, from the inputs' shapes (numbers or symbolic)."""
        sizes = {symbol: shapes[at][axis] for symbol, (at, axis) in self.bindings().items()}
        return sizes | self.tiles(wide) | dict(self.attributes) | dict(attributes)

    def constexprs(self, values: Mapping[str, Any], wide: bool) -> dict[str, Any]:
        """All constexprs of the kernel. PRECISION follows from the type: float32 is for comparisons, so its operands
        are not rounded."""
        found = {name: evaluate(expression, values) for name, expression in self.constants.items()} | self.tiles(wide)
        if "PRECISION" in self.kernel.arg_names:
            found["PRECISION"] = "ieee" if wide else "tf32"
        return found


def evaluate(expression: str | int, values: Mapping[str, Any], cdiv: Callable[[Any, Any], Any] | None = None) -> Any:
    """Of + - * // and cdiv(a, b) over names and whole numbers. `values` may be numbers, symbolic integers of PyTorch or
    of TensorRT. Raises ValueError for anything else, KeyError for an unknown name."""

    def walk(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body):
                return walk(body)
            case ast.Constant(int() as number):
                return number
            case ast.Name(name):
                return values[name]
            case ast.Call(ast.Name("cdiv"), [a, b], []):
                a, b = walk(a), walk(b)
                return cdiv(a, b) if cdiv else (a + b - 1) // b
            case ast.BinOp(left, op, right) if type(op) in OPERATIONS:
                left, right = walk(left), walk(right)
                return {"+": lambda: left + right, "-": lambda: left - right, "*": lambda: left * right,
                        "//": lambda: left // right}[OPERATIONS[type(op)]]()  # fmt: skip
        raise ValueError(f"expression {expression!r}: only + - * // and cdiv(a, b) over names and whole numbers")

    return walk(ast.parse(str(expression), mode="eval"))


def _args(*lines: str) -> tuple[Argument, ...]:
    """Each "name kind dim,dim,..." and, for an output in place, " = input"."""
    made = []
    for line in lines:
        text, _, alias = line.partition(" = ")
        name, kind, dims = text.split()
        made.append(Argument(name, kind, tuple(re.split(r",(?![^(]*\))", dims)), alias or None))
    return tuple(made)


CACHE = ("key half G,R,D", "value half G,R,D")
QUERY = "query half N,G,D"
NEW = ("new_value half G,n,D", "new_key half G,n,D", "new_code i32 G,n,D//4")
HELD = ("key half G,R,D", "value half G,R,D", "code i32 G,S,D//4", "count f32 G,R", "stay f32 G,S")
HELD_AFTER = tuple(f"{line.split()[0]}_after {' '.join(line.split()[1:])} = {line.split()[0]}" for line in HELD)
# Block sizes that measured best on Hopper (fastar_backend/kernels/ops.py); float32 is for comparisons.
DENSE = (
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
)
SPARSE = (
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4, "num_stages": 1},
)

_OPERATORS = [
    # softmax(q k / sqrt(D) + log count) v over rows from first[group] on; values are sums over a group's members.
    Operator(
        "attend", kernels.attend,
        _args(QUERY, *CACHE, "count f32 G,R", "first i32 G"), _args("out half N,G,D"),
        ("cdiv(N, BLOCK_M)", "G"), ("N", "G", "R"), {"D": "D"}, DENSE,
    ),
    # The same over the key blocks (128 rows each; R is a multiple) that each block of queries, taken in `order`,
    # visits. Rows without a key are zeros.
    Operator(
        "attend_sparse", kernels.attend_sparse,
        _args(QUERY, *CACHE, "count f32 G,R", "order i32 G,N", "counts i32 G,cdiv(N,BLOCK_M)",
              "blocks i32 G,cdiv(N,BLOCK_M),K"),
        _args("out half N,G,D"),
        ("cdiv(N, BLOCK_M)", "G"), ("N", "G", "R", "K"), {"D": "D"}, SPARSE,
        divides={"R": "128"},
    ),
    # Writes a chunk's keys or values into the rows of a cache that begin at row[stream].
    Operator(
        "append", kernels.append,
        _args("cache half G,R,D", "new half N,G,D", "row i32 B"), _args("cache_after half G,R,D = cache"),
        ("cdiv(N, BLOCK)", "G"), ("N", "G", "R", "B"), {"D": "D"}, ({"BLOCK": 32, "num_warps": 4},) * 2,
        divides={"G": "B"}, at_most={"N": "R"},
    ),
    # Rotary positions in time: token t of N by line lines[t // (N // F)] of the table of turns.
    Operator(
        "turn", kernels.turn,
        _args("source half N,G,D", "lines i32 F", "cos f32 L,C", "sin f32 L,C"), _args("out half N,G,D"),
        ("cdiv(N, BLOCK)", "G"), ("N", "G", "F"), {"D": "D", "TIME": "2 * C"}, ({"BLOCK": 32, "num_warps": 4},) * 2,
        divides={"N": "F"}, at_most={"2 * C": "D"},
    ),
    # Likewise, groups first, in place into the rows of a cache that begin at the attribute `row`.
    Operator(
        "turn_into", kernels.turn_into,
        _args("cache half G,R,D", "source half G,n,D", "lines i32 F", "cos f32 L,C", "sin f32 L,C"),
        _args("cache_after half G,R,D = cache"),
        ("cdiv(n, BLOCK)", "G"), ("n", "R", "F", "row"), {"D": "D", "TIME": "2 * C"},
        ({"BLOCK": 32, "num_warps": 4},) * 2, {"row": 0}, divides={"n": "F"}, at_most={"row + n": "R", "2 * C": "D"},
    ),
    # Unit vectors as int8 codes, 127 long.
    Operator(
        "quantise", kernels.quantise,
        _args("x half G,n,D"), _args("code i32 G,n,D//4"),
        ("cdiv(n, BLOCK)", "G"), ("n",), {"D": "D"}, ({"BLOCK": 32, "num_warps": 4},) * 2,
    ),
    # The held slot (from first[group] on) nearest to each probe by cosine of the codes; -1 and -1 where none is held.
    Operator(
        "nearest", kernels.nearest,
        _args("probe i32 G,n,W", "code i32 G,S,W", "first i32 G"), _args("similarity f32 G,n", "match i32 G,n"),
        ("cdiv(n, BLOCK_M)", "G"), ("n", "S"), {"D": "4 * W"},
        ({"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},) * 2,
    ),
    # TempCache: where `replace` is not 0, token newcomer[pair] founds a group of one in slot[pair]; slots of pairs are
    # distinct. loser: who is then without a place: the group that was there, else the token itself.
    Operator(
        "place", kernels.place,
        _args("slot i32 G,P", "newcomer i32 G,P", "replace i32 G,P", *NEW, "new_stay f32 n", *HELD),
        _args(*HELD_AFTER, "loser_value half G,P,D", "loser_code i32 G,P,D//4", "loser_count f32 G,P"),
        ("P", "G"), ("P", "n", "S", "R"), {"D": "D"}, ({"num_warps": 1},) * 2, at_most={"S": "R"},
    ),
    # TempCache: entry p, token order[p], joins the group in slot target[p] (ascending; S: none). `renew`: key, code
    # and stay become those of the last member.
    Operator(
        "merge", kernels.merge,
        _args("target i32 G,n", "order i32 G,n", *NEW, "new_count f32 G,n", "new_stay f32 n", *HELD),
        _args(*HELD_AFTER),
        ("n", "G"), ("n", "S", "R"), {"D": "D", "RENEW": "renew"}, ({"num_warps": 1},) * 2, {"renew": True},
        at_most={"S": "R"},
    ),
    # Numbers of tokens by ascending key, equal ones in order.
    Operator(
        "arrange", selection_kernels.arrange,
        _args("key i32 G,n"), _args("order i32 G,n"),
        ("cdiv(n, BLOCK)", "G"), ("n",), {}, ({"BLOCK": 64, "num_warps": 4},) * 2,
    ),
    # AnnSA: the mean of each block of queries, taken in `order`.
    Operator(
        "block_means", selection_kernels.block_means,
        _args(QUERY, "order i32 G,N"), _args("mean half G,cdiv(N,BLOCK_M),D"),
        ("cdiv(N, BLOCK_M)", "G"), ("N", "G"), {"D": "D"},
        ({"BLOCK_M": 128, "num_warps": 8}, {"BLOCK_M": 32, "num_warps": 4}),
    ),
    # AnnSA: the best product, log count added, of each query block's mean with a key of each block of 128; -inf where
    # no key is held.
    Operator(
        "near_blocks", selection_kernels.near_blocks,
        _args("mean half G,Q,D", "key half G,R,D", "count f32 G,R"), _args("near f32 G,Q,R//128"),
        ("R // 128", "G"), ("Q", "R"), {"D": "D", "BLOCK_N": 128},
        ({"BLOCK_M": 64, "num_warps": 4, "num_stages": 2}, {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}),
        divides={"R": "128"},
    ),
    # AnnSA: the key blocks of the chunk's `own` rows, from row[stream] on, and of the others that hold keys the share
    # `density` that is nearest: the first `counts` of `blocks`, which has all of them, best first, equal ones in order.
    Operator(
        "choose_blocks", selection_kernels.choose_blocks,
        _args("near f32 G,Q,K", "row i32 B"), _args("counts i32 G,Q", "blocks i32 G,Q,K"),
        ("Q", "G"), ("G", "Q", "K", "B", "own"), {"DENSITY": "density", "KEYS": 128},
        ({"BLOCK": 64, "num_warps": 4},) * 2, {"own": 1, "density": 1.0}, divides={"G": "B"},
    ),
    # Bucket numbers: bit b is the sign of the product with column b of `planes`, at most 30.
    Operator(
        "signatures", selection_kernels.signatures,
        _args("x half N,G,D", "planes f32 D,V"), _args("bucket i32 G,N"),
        ("cdiv(N, BLOCK)", "G"), ("N", "G", "V"), {"D": "D"}, ({"BLOCK": 32, "num_warps": 4},) * 2, at_most={"V": "30"},
    ),
    # AnnCA: a prompt token's count, 0 unless `always` is not 0 or some query of its head shares a bucket with it. Each
    # `bits` columns of `planes` make one table of buckets.
    Operator(
        "keep_text", selection_kernels.keep_text,
        _args(QUERY, "key half G,T,D", "count f32 G,T", "planes f32 D,V", "always f32 G,T"),
        _args("count_after f32 G,T"),
        ("cdiv(T, BLOCK_N)", "G"), ("N", "G", "T", "V", "bits"), {"D": "D"},
        ({"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4},) * 2, {"bits": 8},
        divides={"V": "bits"}, at_most={"bits": "30"},
    ),
    # AnnCA by mass: of the attention of a sample of queries (64 at most, evenly apart) to the prompt, each token's mean
    # share. `quantised`: products of rows rounded to 255 levels each.
    Operator(
        "text_mass", selection_kernels.text_mass,
        _args(QUERY, "key half G,T,D", "count f32 G,T"), _args("mass f32 G,T"),
        ("1", "G"), ("N", "G", "T"), {"D": "D", "QUANTISED": "quantised"},
        ({"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
         {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}),
        {"quantised": True},
    ),
    # Then: the fewest tokens that hold `share` of the mass stay (the others' count and value are 0); the others, as one
    # group, are the row after them: means by mass, log weight = sum of their shares' log count - log share.
    Operator(
        "condense_text", selection_kernels.condense_text,
        _args("mass f32 G,T", "key half G,T,D", "value half G,T,D", "count f32 G,T"),
        _args("key_after half G,T+1,D", "value_after half G,T+1,D", "count_after f32 G,T+1"),
        ("1", "G"), ("T",), {"D": "D", "SHARE": "share"}, ({"BLOCK": 32, "num_warps": 4},) * 2, {"share": 0.95},
    ),
]  # fmt: skip
OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _OPERATORS}


def table_hash() -> str:
    """Of what a graph and the plugins must agree on: the operators' names, tensors and attributes."""
    lines = [
        (op.name, [dataclasses.astuple(a) for a in (*op.inputs, *op.outputs)], sorted(op.attributes.items()))
        for op in OPERATORS.values()
    ]
    return hashlib.sha256(json.dumps(sorted(lines)).encode()).hexdigest()
