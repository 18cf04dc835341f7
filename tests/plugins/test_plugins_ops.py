"""Each operator's kernel against its plain reference in float64 (without a GPU in Triton's interpreter): fresh random
inputs, odd sizes, outputs that hold poison before; and the operators as PyTorch sees them."""

from __future__ import annotations

import plugins_cases as cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastar_backend.attention import ann, flat_select
from fastar_backend.attention.ann_ca import TextCache
from fastar_backend.attention.flat_cache import _rows
from fastar_backend.config import AttentionConfig
from fastar_backend.errors import InvalidInput
from fastar_backend.kernels import ops as kernel_ops
from plugins import ops, reference
from plugins.table import OPERATORS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = pytest.mark.parametrize("name", OPERATORS)
POISON = -123456789
# Sizes beside each case's own: whole tiles, fewer than a tile, one.
SIZES = {
    "attend": [{"n": 32, "rows": 64}, {"n": 1, "rows": 1, "groups": 1}, {"n": 65, "rows": 33}],
    "attend_sparse": [{"n": 64, "rows": 128}, {"n": 7, "rows": 256, "groups": 1}],
    "append": [{"n": 64, "rows": 64, "streams": 1}, {"n": 1, "groups": 2, "streams": 2}],
    "turn": [{"n": 64, "frames": 1, "turned": 8}, {"n": 5, "frames": 5, "turned": 0}],
    "turn_into": [{"n": 64, "rows": 64, "frames": 2, "turned": 1}],
    "quantise": [{"n": 64, "dim": 64}, {"n": 1}],
    "nearest": [{"n": 5, "slots": 1}, {"n": 63, "slots": 200}],
    "place": [{"pairs": 1}, {"pairs": 9, "slots": 16}],
    "merge": [{"n": 1}, {"n": 33, "renew": False}, {"n": 17, "slots": 1}],
    "arrange": [{"n": 1}, {"n": 128}],
    "block_means": [{"n": 64}, {"n": 1}],
    "near_blocks": [{"lines": 1, "rows": 128}, {"lines": 32}],
    "choose_blocks": [
        {"blocks": 3, "density": 1.0},
        {"blocks": 64, "density": 0.01},
        {"blocks": 130, "lines": 1, "groups": 2, "streams": 1},
    ],
    "signatures": [{"n": 32, "bits": 30, "groups": 1}, {"n": 1, "bits": 1}],
    "keep_text": [{"n": 64, "tokens": 64, "tables": 1, "bits": 5}, {"n": 1, "tokens": 65, "bits": 3}],
    "text_mass": [{"n": 1}, {"n": 64, "tokens": 64}, {"n": 65, "tokens": 3, "quantised": True}],
    "condense_text": [{"tokens": 1}, {"tokens": 64, "share": 1.0}, {"share": 0.01}, {"tokens": 2}],
}
KERNELS = [(name, sizes) for name in OPERATORS for sizes in ({}, *SIZES[name])]
HALF = [  # float16: the interpreter takes bfloat16 for integers. Blocks of queries are larger: sizes that pass them
    ("attend", {}), ("attend", {"n": 130, "rows": 200}), ("attend_sparse", {"n": 140, "block": 128}),
    ("append", {}), ("turn", {}), ("turn_into", {}), ("quantise", {}), ("place", {}), ("merge", {}),
    ("block_means", {"n": 140}), ("near_blocks", {"lines": 66}), ("signatures", {}), ("keep_text", {}),
    ("text_mass", {}), ("text_mass", {"quantised": True}), ("condense_text", {}),
]  # fmt: skip


def drawn(name, half=torch.float32, **sizes):
    """(inputs by name, attributes) as the operator takes them."""
    inputs, attributes = cases.CASES[name](**sizes)
    return {k: v.to(DEVICE) for k, v in cases.cast(OPERATORS[name], inputs, half).items()}, attributes


def expected(name, inputs, attributes):
    """By the reference in float64, with the blocks of the inputs' type."""
    operator = OPERATORS[name]
    exact = [value.double() if value.is_floating_point() else value for value in inputs.values()]
    exact = [value.cpu() for value in exact]
    half = next((inputs[a.name].dtype for a in operator.inputs if a.kind == "half"), torch.float32)
    block = (
        {"BLOCK_M": operator.tiles(half.itemsize > 2)["BLOCK_M"]} if name in ("attend_sparse", "block_means") else {}
    )
    result = getattr(reference, name)(*exact, **attributes, **block)
    return result if isinstance(result, tuple) else (result,)


def launched(name, inputs, attributes):
    """By the kernel, in place on copies, into poison."""
    operator = OPERATORS[name]
    inputs = {key: value.clone() for key, value in inputs.items()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = getattr(torch.ops.fastar, name)(*(torch.empty_like(v) for v in inputs.values()), **attributes)
    outputs = []
    for argument, like in zip(operator.outputs, shapes if isinstance(shapes, tuple | list) else [shapes], strict=True):
        if argument.alias:
            outputs.append(inputs[argument.alias])
        else:
            poison = torch.nan if like.dtype.is_floating_point else POISON
            outputs.append(torch.full(like.shape, poison, dtype=like.dtype, device=DEVICE))
    ops.launch(name, list(inputs.values()), attributes, outputs)
    return outputs


def close(out, exact, tolerance):
    """Relative in the norm; infinities in the same places."""
    out, exact = out.double().cpu(), exact.double().cpu()
    assert out.shape == exact.shape
    finite = exact.isfinite()
    assert torch.equal(out.isfinite(), finite), "poison, or a value where none belongs"
    assert torch.equal(out[~finite], exact[~finite])
    assert (out[finite] - exact[finite]).norm() <= tolerance * max(exact[finite].norm().item(), 1e-3)


def check(name, inputs, attributes, tolerance):
    outputs, exact = launched(name, inputs, attributes), expected(name, inputs, attributes)
    for argument, out, wanted in zip(OPERATORS[name].outputs, outputs, exact, strict=True):
        if argument.name == "match":  # any of equally near ones
            check_nearest(out.cpu(), wanted, inputs)
        elif name == "quantise":  # halves may be rounded either way
            codes, right = out.cpu().view(torch.int8).int(), wanted.view(torch.int8).int()
            assert (codes - right).abs().max() <= 1
            assert (codes != right).sum() <= max(1, 0.01 * codes.numel())
        elif argument.kind == "i32":
            assert torch.equal(out.cpu(), wanted), argument.name
        else:
            close(out, wanted, tolerance)


def check_nearest(match, wanted, inputs):
    probe, code = (inputs[name].cpu().view(torch.int8).int() for name in ("probe", "code"))
    assert torch.equal(match >= 0, wanted >= 0)
    assert torch.equal(match >= inputs["first"].cpu()[:, None], wanted >= 0), "of the held ones"
    products = [(probe * _rows(code, index.clamp(min=0).long())).sum(-1) for index in (match, wanted)]
    assert torch.equal(*products)


@pytest.mark.parametrize(("name", "sizes"), KERNELS)
def test_kernel(name, sizes):
    inputs, attributes = drawn(name, **sizes)
    check(name, inputs, attributes, 1e-5)


@pytest.mark.parametrize(("name", "sizes"), HALF)
def test_kernel_in_half_precision(name, sizes):
    inputs, attributes = drawn(name, torch.float16, **sizes)
    check(name, inputs, attributes, 3e-3)


def test_what_is_not_a_number_never_leaves_a_block_unwritten():
    """A stream that went wrong must not make the next kernel read rows that are not there."""
    inputs, attributes = drawn("choose_blocks")
    inputs["near"][0, 0, ::3] = torch.nan
    counts, blocks = launched("choose_blocks", inputs, attributes)
    everything = torch.arange(blocks.shape[2], device=DEVICE).int().expand_as(blocks)
    assert torch.equal(blocks.sort(-1).values, everything)
    assert counts.max() <= blocks.shape[2]


IN_PLACE = [name for name, operator in OPERATORS.items() if any(argument.alias for argument in operator.outputs)]


@pytest.mark.parametrize("name", [*IN_PLACE, "nearest"])
def test_function_and_kernel_in_place_are_one(name):
    inputs, attributes = drawn(name)
    before = {key: value.clone() for key, value in inputs.items()}
    result = ops._by_kernel(OPERATORS[name], list(inputs.values()), dict(OPERATORS[name].attributes) | attributes)
    assert all(torch.equal(inputs[key], before[key]) for key in inputs), "a function changes nothing"
    for out, wanted in zip(result if isinstance(result, tuple) else (result,), launched(name, inputs, attributes),
                           strict=True):  # fmt: skip
        assert torch.equal(out, wanted)


@ALL
def test_operator_is_the_reference_on_the_cpu_and_the_fake_has_its_shapes(name):
    for half in (torch.float64, torch.float32, torch.bfloat16):
        if half == torch.bfloat16 and name == "attend_sparse":
            inputs, attributes = cases.attend_sparse(n=140, block=128)
            inputs = cases.cast(OPERATORS[name], inputs, half)
        else:
            inputs, attributes = cases.CASES[name]()
            inputs = cases.cast(OPERATORS[name], inputs, half)
        call = getattr(torch.ops.fastar, name)
        real = call(*inputs.values(), **attributes)
        positional = call(*inputs.values(), *(dict(OPERATORS[name].attributes) | attributes).values())
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = call(*(torch.empty_like(value) for value in inputs.values()), **attributes)
        flat = [value if isinstance(value, tuple | list) else [value] for value in (real, positional, fake)]
        exact = expected(name, inputs, attributes)
        for out, again, like, right in zip(*flat, exact, strict=True):
            assert torch.equal(out, again)
            assert (out.shape, out.dtype, out.stride()) == (like.shape, like.dtype, like.stride())
            if half == torch.float64:
                assert torch.equal(out, right)


@ALL
def test_opcheck(name):
    inputs, attributes = cases.CASES[name]()
    inputs = cases.cast(OPERATORS[name], inputs, torch.float32)
    checks = ["test_schema", "test_faketensor"]
    if name in ("condense_text", "place"):  # attributes, many outputs; all are registered by the same lines
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    call = getattr(torch.ops.fastar, name).default
    torch.library.opcheck(call, tuple(inputs.values()), attributes, test_utils=checks)


class Steps(torch.nn.Module):
    """A chunk's attention, sparse and dense, as graphs hold it."""

    def forward(self, query, new, key, value, count, row):
        f = torch.ops.fastar
        key = f.append(key, new, row)
        order = f.arrange(f.signatures(query, torch.ones(query.shape[2], 5)))
        near = f.near_blocks(f.block_means(query, order), key, count)
        counts, blocks = f.choose_blocks(near, row, own=9, density=0.5)
        sparse = f.attend_sparse(query, key, value, count, order, counts, blocks)
        return sparse + f.attend(query, key, value, count, torch.zeros(key.shape[0], dtype=torch.int32)), key


def test_export_with_dynamic_sizes():
    def inputs(n, rows):
        held = cases.cache(4, rows, 16)
        held["count"][:, 127::128] = 1
        row = torch.tensor([3, 40], dtype=torch.int32)
        tensors = (cases.normal(n, 4, 16), cases.normal(n, 4, 16), held["key"], held["value"], held["count"])
        return tuple(tensor.float() for tensor in tensors) + (row,)

    n, blocks = torch.export.Dim("n", min=33, max=200), torch.export.Dim("blocks", min=2, max=64)
    shapes = ({0: n}, {0: n}, *({1: 128 * blocks},) * 3, {})
    program = torch.export.export(Steps(), inputs(40, 256), dynamic_shapes=shapes)
    used = {str(node.target) for node in program.graph.nodes}
    assert {"fastar.append.default", "fastar.attend_sparse.default"} <= used, "operators stay whole"
    fresh = inputs(77, 384)
    for out, wanted in zip(program.module()(*fresh), Steps()(*fresh), strict=True):
        assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("attend", {"key": torch.zeros(4, 45, 16)}, r"attend.key: G is 4; allowed: == 3"),
        ("attend", {"count": torch.zeros(3, 45, dtype=torch.float64)}, r"attend.count: is torch.float64"),
        ("attend", {"query": torch.zeros(33, 48)}, r"attend.query: has shape \[33, 48\]; allowed: \[N, G, D\]"),
        ("attend_sparse", {"counts": torch.ones(2, 1, dtype=torch.int32)}, r"counts: cdiv\(N,BLOCK_M\) is 1"),
        ("append", {"row": torch.zeros(4, dtype=torch.int32)}, r"append: G is 6; allowed: a multiple of 4"),
        ("turn_into", {"source": torch.zeros(3, 55, 16)}, r"turn_into: row \+ n is .*; allowed: at most 50"),
        ("nearest", {"first": torch.zeros(3)}, r"nearest.first: is torch.float32; allowed: torch.int32"),
    ],
)
def test_wrong_inputs_are_refused_alike_everywhere(name, change, message):
    inputs, attributes = drawn(name)
    tensors = list((inputs | change).values())
    call = getattr(torch.ops.fastar, name)
    with pytest.raises(InvalidInput, match=message):
        call(*tensors, **attributes)
    with pytest.raises(InvalidInput, match=message):
        ops.launch(name, tensors, dict(OPERATORS[name].attributes) | attributes, [])
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(InvalidInput, match=message):
        call(*(torch.empty_like(value) for value in tensors), **attributes)


def test_an_output_in_place_is_the_input_itself():
    inputs, _ = drawn("append")
    with pytest.raises(InvalidInput, match="cache_after: is not in place"):
        ops.launch("append", list(inputs.values()), {}, [inputs["cache"].clone()])


# What FlatCaches does, step by step.


@pytest.mark.parametrize("density", [0.1, 0.37, 1.0])
def test_selection_is_that_of_the_pytorch_path(density):
    tokens, heads, dim, rows, own = 70, 3, 16, 1280, slice(640, 710)
    held = {key: value.float() for key, value in cases.cache(heads, rows, dim).items()}
    held["count"][:, 256:512] = 0
    config = AttentionConfig(kind="fastar", sparse_density=density, sparse_order="bucket")
    query = torch.randn(tokens, heads, dim)
    order, counts, blocks = flat_select.select(
        query, held["key"], held["count"], own, rows, config, torch.arange(tokens)
    )
    f, row = torch.ops.fastar, torch.tensor([own.start], dtype=torch.int32)
    ours = f.arrange(f.signatures(query, ann.planes(dim, 1, config.index_bits, query.device)))
    assert torch.equal(ours, order.int())
    near = f.near_blocks(f.block_means(query, ours), held["key"], held["count"])
    count, chosen = f.choose_blocks(near, row, own=70, density=density)
    assert torch.equal(count, counts)
    near[:, :, own.start // 128 : -(-own.stop // 128)] = torch.inf
    for head in range(heads):
        for line in range(count.shape[1]):
            kept = count[head, line]
            worth = [near[head, line, index[head, line, :kept].long()] for index in (chosen, blocks)]
            assert torch.allclose(*worth, atol=1e-5), "the same blocks, or as good"


def test_codes_are_those_of_the_pytorch_path():
    x = torch.randn(2, 50, 32)
    assert torch.equal(torch.ops.fastar.quantise(x).view(torch.int8), kernel_ops.quantise(x))


def test_schema_has_inputs_and_attributes_by_name():
    for name, operator in OPERATORS.items():
        declared = getattr(torch.ops.fastar, name).default._schema
        assert [argument.name for argument in declared.arguments][: len(operator.inputs)] == [
            argument.name for argument in operator.inputs
        ]
        assert {a.name: a.default_value for a in declared.arguments if a.has_default_value()} == operator.attributes


@pytest.mark.parametrize(("mass", "index"), [(0.8, "quantised"), (0.99, "exact"), (0.3, "quantised")])
def test_prompt_is_attended_to_as_by_the_pytorch_path(mass, index):
    tokens, heads, dim, queries = 40, 3, 16, 150
    text = torch.randint(0, 2, (tokens, 5), device=DEVICE).float()  # with equal tokens
    _, same = torch.unique(text, dim=0, return_inverse=True)
    key, value = (torch.randn(tokens, heads, dim, device=DEVICE)[same] for _ in range(2))
    cache = TextCache(key, value, text, AttentionConfig(select_text=True, text_mass=mass, index=index))
    cache.use_kernel()
    counts, first = cache.groups
    query = torch.randn(queries, heads, dim, device=DEVICE)
    wanted = cache.attend(query.transpose(0, 1)).transpose(0, 1)
    f = torch.ops.fastar
    share = f.text_mass(query, cache.keys, counts, quantised=index == "quantised")
    condensed = f.condense_text(share, cache.keys, cache.values, counts, share=mass)
    close(f.attend(query, *condensed, first), wanted, 1e-4)
    assert (condensed[2] > 0).float().sum(-1).mean() == cache.kept


def test_prompt_is_chosen_by_buckets_as_by_the_pytorch_path():
    heads, tokens, dim = 3, 30, 16
    config = AttentionConfig(select_text=True, text_mass=None, index_tables=2, index_bits=5)
    cache = TextCache(*torch.randn(2, tokens, heads, dim), torch.randn(tokens, 5), config)
    cache.use_kernel()
    query, (counts, _) = torch.randn(4, heads, dim), cache.groups
    planes = ann.planes(dim, config.index_tables, config.index_bits, query.device)
    always = cache.always.float().expand_as(counts).contiguous()
    after = torch.ops.fastar.keep_text(query, cache.keys, counts, planes, always, bits=config.index_bits)
    keep, _ = cache.choose(query.transpose(0, 1), counts)
    assert torch.equal(after, counts * keep)
    assert 0 < keep.float().mean() < 1
