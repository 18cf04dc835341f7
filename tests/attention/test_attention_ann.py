"""Nearest neighbours, AnnSA's selection and AnnCA's text tokens."""

from __future__ import annotations

import pytest
import torch
from random_streams import distance, drive, shape_of, tokens

from fastar_backend.attention import TextCache, ann, ann_ca, ann_sa
from fastar_backend.attention.cache import CacheShape, attention, by_place
from fastar_backend.config import AttentionConfig, parse
from fastar_backend.errors import InvalidInput


def near_duplicates(heads: int = 3, keys: int = 63, dim: int = 22) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probes, keys, and which key each probe is a noisy copy of."""
    torch.manual_seed(0)
    stored = torch.randn(heads, keys, dim)
    truth = torch.randint(0, keys, (heads, 15))
    probes = torch.stack([stored[head, truth[head]] for head in range(heads)])
    return probes + 0.02 * torch.randn_like(probes), stored, truth


@pytest.mark.parametrize(
    ("index", "agreement"), [({"index": "exact"}, 1.0), ({"index": "quantised"}, 1.0), ({"index": "lsh"}, 0.9)]
)
def test_top1_finds_near_duplicates(index, agreement):
    probes, keys, truth = near_duplicates()
    found = ann.top1(probes, keys, torch.ones(3, 63, dtype=torch.bool), AttentionConfig(**index))
    assert (found == truth).float().mean() >= agreement
    assert ((found == truth) | (found == -1) | (index["index"] != "exact")).all()


def test_lsh_scores_its_candidates_exactly():
    """Of a bucket that holds everything LSH picks the best, as far as it looks (16 keys)."""
    torch.manual_seed(1)
    keys, probes = torch.randn(3, 15, 10), torch.randn(3, 7, 10)
    valid = torch.ones(3, 15, dtype=torch.bool)
    one_bucket = keys.abs() + 5, probes.abs() + 5
    lsh = ann.top1(one_bucket[1], one_bucket[0], valid, AttentionConfig(index="lsh", index_bits=1, index_tables=8))
    exact = ann.top1(one_bucket[1], one_bucket[0], valid, AttentionConfig(index="exact"))
    assert lsh.equal(exact)


def test_quantised_top1_on_unrelated_keys():
    torch.manual_seed(2)
    probes, keys, valid = torch.randn(4, 250, 22), torch.randn(4, 250, 22), torch.ones(4, 250, dtype=torch.bool)
    exact = ann.top1(probes, keys, valid, AttentionConfig(index="exact"))
    assert (ann.top1(probes, keys, valid, AttentionConfig(index="quantised")) == exact).float().mean() > 0.97


@pytest.mark.parametrize("index", ["exact", "quantised", "lsh"])
def test_top1_never_finds_invalid_keys(index):
    probes, keys, truth = near_duplicates()
    config = AttentionConfig(index=index)
    nothing = torch.zeros(3, 63, dtype=torch.bool)
    assert ann.top1(probes, keys, nothing, config).eq(-1).all()
    some = torch.rand(3, 63) < 0.5
    keys[~some] = torch.nan
    found = ann.top1(probes, keys, some, config)
    assert some.gather(1, found.clamp(min=0))[found >= 0].all()
    right = some.gather(1, truth)
    assert (found == truth)[right].float().mean() >= 0.9


def test_quantise_keeps_a_row_within_half_a_level():
    x = torch.randn(3, 15, 10, generator=torch.Generator().manual_seed(3)) * torch.tensor([1e-3, 1, 1e3])[:, None, None]
    x[0, 0] = 0
    error = (ann.quantise(x) - x).abs()
    assert (error <= x.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
    assert (ann.quantise(x) / (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)).round().abs().max() <= 127


def test_signatures_are_the_same_for_queries_and_keys_of_every_run():
    x = torch.ones(1, 10)
    assert ann.signatures(x, 2, 8).tolist() == ann.signatures(3 * x, 2, 8).tolist()
    assert ann.planes(10, 2, 8, x.device).equal(torch.randn(10, 16, generator=torch.Generator().manual_seed(20602))), (
        "the planes are part of what makes a stream repeatable"
    )


def clusters(shape):
    """Queries and cached keys of well separated clusters, and which cluster each is of."""
    torch.manual_seed(4)
    centres = 6 * torch.eye(shape.head_dim)[:4]
    of_query = torch.arange(16).remainder(4)
    of_key = torch.arange(64).remainder(4)
    query = centres[of_query] + 0.01 * torch.randn(shape.heads, 16, shape.head_dim)
    keys = centres[of_key] + 0.01 * torch.randn(shape.heads, 64, shape.head_dim)
    return query, keys, of_query, of_key


@pytest.mark.parametrize("index", ["exact", "quantised"])
def test_sparse_selection_takes_the_best_keys(index):
    """Four clusters, four blocks, a quarter of the keys: each block takes its own cluster; nearly nothing is lost."""
    shape = shape_of()
    config = AttentionConfig(index=index, sparse_density=0.25, sparse_block=4)
    query, keys, of_query, of_key = clusters(shape)
    selection = ann_sa.select(query, keys, None, config)
    assert selection.blocks == 4
    assert selection.keys_per_block == 16
    for head in range(shape.heads):
        for block in range(4):
            mine = of_query[selection.order[head, block * 4 : block * 4 + 4]].unique()
            taken = of_key[selection.keys[head, block]]
            assert len(mine) == 1, "queries of like content share a block"
            assert (taken == mine).all()
    own = torch.randn(2, shape.heads, 16, shape.head_dim)
    values = torch.randn(shape.heads, 64, shape.head_dim)
    everything = torch.cat([keys, 0.1 * own[0]], 1), torch.cat([values, own[1]], 1)
    sparse = ann_sa.attend(query, *everything, None, selection)
    assert distance(sparse, attention(query, *everything, None)) < 0.01


def test_sparse_selection_by_shared_buckets():
    shape = shape_of()
    config = AttentionConfig(index="lsh", index_bits=8, index_tables=8, sparse_density=0.25, sparse_block=4)
    query, keys, of_query, of_key = clusters(shape)
    selection = ann_sa.select(query, keys, None, config)
    right = [
        (of_key[selection.keys[head, block]] == of_query[selection.order[head, block * 4]]).float().mean()
        for head in range(shape.heads)
        for block in range(4)
    ]
    assert sum(right) / len(right) > 0.9


@pytest.mark.parametrize("index", ["exact", "quantised", "lsh"])
@pytest.mark.parametrize("counted", [False, True])
def test_sparse_attention_at_full_density_is_dense(index, counted):
    torch.manual_seed(5)
    q, k, v = torch.randn(3, 15, 10), torch.randn(3, 36, 10), torch.randn(3, 36, 10)
    bias = torch.randint(1, 5, (3, 36)).float().log() if counted else None
    config = AttentionConfig(index=index, sparse_density=1.0, sparse_block=5)
    selection = ann_sa.select(q, k[:, :21], None if bias is None else bias[:, :21], config)
    assert distance(ann_sa.attend(q, k, v, bias, selection), attention(q, k, v, bias)) < 1e-6


@pytest.mark.parametrize("index", ["exact", "quantised", "lsh"])
def test_sparse_selection_leaves_empty_slots_out(index):
    torch.manual_seed(6)
    query, keys, bias = torch.randn(3, 14, 10), torch.randn(3, 20, 10), torch.zeros(3, 20)
    bias[:, ::2] = -torch.inf
    config = AttentionConfig(index=index, sparse_density=0.5, sparse_block=7)
    assert (ann_sa.select(query, keys, bias, config).keys % 2 == 1).all()


@pytest.mark.parametrize(("tokens", "columns", "frames"), [(12, 4, 2), (35, 7, 3), (9, 0, 1)])
def test_order_by_place(tokens, columns, frames):
    shape = CacheShape(2, 16, tokens, frames, 4, (6, 6, 4), 1e4, torch.device("cpu"), torch.float32, columns)
    order = by_place(shape)
    assert order.sort().values.equal(torch.arange(tokens * frames))
    place = (order % tokens).unflatten(0, (tokens, frames))
    assert (place == place[:, :1]).all(), "all frames of a place stand together"
    if columns:
        row, column = place[:, 0] // columns, place[:, 0] % columns
        for first in range(0, tokens - 3):  # the Z-curve's cells of 2 x 2 places
            if (
                row[first] % 2 == column[first] % 2 == 0
                and row[first] + 1 < tokens // columns
                and (column[first] + 1 < columns)
            ):
                cell = slice(first, first + 4)
                assert row[cell].max() - row[cell].min() == column[cell].max() - column[cell].min() == 1


def test_blocks_of_places_find_what_their_part_of_the_picture_needs():
    """Keys belong to the left or to the right half of the picture; queries attend to their own half's."""
    torch.manual_seed(8)
    shape = CacheShape(3, 16, 32, 1, 4, (6, 6, 4), 1e4, torch.device("cpu"), torch.float32, 8)
    side = torch.arange(32) % 8 // 4
    directions = torch.randn(2, 16)
    query = 4 * directions[side] + torch.randn(3, 32, 16)
    of_key = torch.arange(40) % 2
    keys = directions[of_key] + 0.1 * torch.randn(3, 40, 16)
    config = AttentionConfig(sparse_density=0.5, sparse_block=16)
    selection = ann_sa.select(query, keys, None, config, by_place(shape))
    assert selection.blocks == 2
    for head in range(3):
        for block in range(2):
            mine = side[selection.order[head, block * 16 : block * 16 + 16]]
            if len(mine.unique()) == 1:
                assert (of_key[selection.keys[head, block]] == mine[0]).all()
    whole = ann_sa.select(query, keys, None, config.model_copy(update={"sparse_density": 1.0}), by_place(shape))
    everything = torch.cat([keys, query], 1)
    out = ann_sa.attend(query, everything, everything, None, whole)
    assert distance(out, attention(query, everything, everything, None)) < 1e-6
    bucket = ann_sa.select(query, keys, None, config.model_copy(update={"sparse_order": "bucket"}), by_place(shape))
    assert not bucket.order.equal(selection.order)


def test_sparse_attention_starts_after_the_dense_steps():
    shape = shape_of()
    qkv = tokens(shape, 10, seed=7, change=0.3)
    dense = drive(shape, AttentionConfig(budget_frames=8, recent_frames=4), qkv)
    late = drive(shape, AttentionConfig(budget_frames=8, recent_frames=4, sparse_density=0.3, dense_steps=0.3), qkv)
    for chunk in range(1, 5):
        assert late.outputs[chunk][0].equal(dense.outputs[chunk][0])
        assert not late.outputs[chunk][1].equal(dense.outputs[chunk][1])
        assert late.density[chunk] < dense.density[chunk]


def padded_prompt(words: int, length: int = 63, heads: int = 3, dim: int = 10):
    """text [length, 4] with `words` words and zeros behind, and the keys and values of a projection with an offset."""
    torch.manual_seed(8)
    text = torch.zeros(length, 4)
    text[:words] = torch.randn(words, 4)
    weight = torch.randn(2, 4, heads * dim, dtype=torch.float64)
    key, value = (((text.double() @ w) + 1).unflatten(-1, (heads, dim)) for w in weight)
    return text, key, value


@pytest.mark.parametrize("words", [0, 1, 7, 62, 63])
def test_folded_prompt_is_the_padded_prompt(words):
    text, key, value = padded_prompt(words)
    if words > 3:
        text[3], key[3], value[3] = text[1], key[1], value[1]  # a word said twice
    query = torch.randn(3, 15, 10, dtype=torch.float64)
    whole = TextCache(key, value, text, AttentionConfig(kind="dense"))
    folded = TextCache(key, value, text, AttentionConfig(select_text=False))
    assert whole.keys.shape[1] == 63
    assert folded.keys.shape[1] == len(text.unique(dim=0))
    assert distance(folded.attend(query), whole.attend(query)) < 1e-6


def test_text_selection_keeps_what_queries_are_near():
    text, key, value = padded_prompt(7)
    cache = TextCache(
        key, value, text, AttentionConfig(select_text=True, text_mass=None, index_bits=12, index_tables=2)
    )
    query = cache.keys[:, [2]] * 3  # near exactly one group
    keep = cache.near(query)
    assert keep[:, 2].all()
    cache.attend(query)
    assert cache.kept == pytest.approx(keep.sum(1).float().mean().item())
    assert cache.kept < 8


def test_no_neighbour_at_all_keeps_the_padding():
    """An empty set has no softmax: the padding's group stays, so the output is the padding's value."""
    text, key, value = padded_prompt(7)
    cache = TextCache(
        key, value, text, AttentionConfig(select_text=True, text_mass=None, index_bits=16, index_tables=1)
    )
    query = next(q for q in torch.randn(200, 3, 5, 10, dtype=torch.float64) if (cache.near(q).sum(1) == 1).all())
    out = cache.attend(query)
    torch.testing.assert_close(out, value[-1][:, None].expand_as(out))
    assert cache.kept == 1


def test_text_selection_with_every_bucket_shared_is_exact():
    text, key, value = padded_prompt(7)
    cache = TextCache(
        key, value, text, AttentionConfig(select_text=True, text_mass=None, index_bits=1, index_tables=32)
    )
    query = torch.randn(3, 63, 10, dtype=torch.float64)
    whole = TextCache(key, value, text, AttentionConfig(kind="window"))
    assert distance(cache.attend(query), whole.attend(query)) < 1e-6
    assert cache.kept == 8


def test_the_paper_s_bucket_test_goes_with_its_index_and_its_recipe():
    text, key, value = padded_prompt(7)
    recipe = AttentionConfig.paper_recipe(4, 1)
    query = torch.randn(3, 15, 10, dtype=torch.float64)
    for config in (recipe, AttentionConfig(select_text=True, index="lsh", text_mass=0.5)):
        cache = TextCache(key, value, text, config)
        keep, share = cache.choose(query, cache.bias.exp().expand(3, -1))
        assert share is None
        assert keep.equal(cache.near(query))


@pytest.mark.parametrize("words", [0, 1, 7, 63])
@pytest.mark.parametrize("mass", [1e-3, 0.6, 0.95, 1.0])
def test_text_kept_by_mass(words, mass):
    """No set is empty; what is kept holds the share by the queries that are asked, and one token fewer would not; all
    of it is all tokens."""
    text, key, value = padded_prompt(words)
    query = 2 * torch.randn(3, 2 * ann_ca.SAMPLES + 1, 10, dtype=torch.float64)
    cache = TextCache(key, value, text, AttentionConfig(select_text=True, text_mass=mass, index="exact"))
    keep, share = cache.choose(query, cache.bias.exp().expand(3, -1))
    asked = (query[:, ::3] @ cache.keys.transpose(1, 2) / 10**0.5 + cache.bias).softmax(-1).mean(1)
    held = (asked * keep).sum(-1)
    assert (held > mass - 1e-6).all()
    assert (held - asked.masked_fill(~keep, 1).amin(-1) < mass).all()
    torch.testing.assert_close(share, (asked * ~keep / (1 - held)[:, None]).float().nan_to_num(0) * ~keep)
    out, whole = cache.attend(query), TextCache(key, value, text, AttentionConfig()).attend(query)
    assert cache.kept == pytest.approx((keep.sum(-1) + (share > 0).any(-1)).float().mean().item())
    assert (distance(out, whole) < 1e-6) == (mass == 1 or words in (0, 1)), "one token left out is a group of one"


@pytest.mark.parametrize("mass", [0, -0.5, 1.01, "most"])
def test_a_share_that_makes_no_sense(mass):
    with pytest.raises(InvalidInput, match=r"attention\.text_mass: got .*; allowed: "):
        parse(AttentionConfig, {"select_text": True, "text_mass": mass}, "attention")


def test_tokens_left_out_with_one_key_lose_nothing():
    """What the mass test leaves out is a group: exact where its keys are equal, whatever its tokens' counts and
    values."""
    text, key, value = padded_prompt(9)
    text[8], value[8] = text[7], value[7]  # a word said twice
    key[:9] = key[0]
    query = 0.1 * torch.randn(3, 15, 10, dtype=torch.float64)  # the 54 tokens of padding hold more than half
    cache = TextCache(key, value, text, AttentionConfig(select_text=True, text_mass=0.5, index="exact"))
    whole = TextCache(key, value, text, AttentionConfig(select_text=False))
    assert distance(cache.attend(query), whole.attend(query)) < 1e-6
    assert cache.kept == 2
    assert whole.kept == 9


def test_a_merged_group_is_never_above_its_tokens():
    query, keys, counts = torch.randn(4, 30, 8), torch.randn(4, 9, 8), torch.randint(1, 6, (4, 9)).float()
    share = torch.rand(4, 9) * (torch.rand(4, 9) < 0.6)
    share[0] = 0
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-9)
    key, value, weight = ann_ca.merged(share, keys, keys, counts)
    assert key.equal(value)
    assert weight[0] == 0
    tokens = ((query @ keys.transpose(1, 2)).exp() * counts[:, None] * (share > 0)[:, None]).sum(-1)
    assert ((query @ key.transpose(1, 2)).exp()[..., 0] * weight <= tokens * (1 + 1e-5)).all()
    same, _, weight = ann_ca.merged(counts[:1] / counts[:1].sum(), keys[:1, :1].expand(1, 9, 8), keys[:1], counts[:1])
    torch.testing.assert_close(same[:, 0], keys[:1, 0])
    torch.testing.assert_close(weight[0, 0], counts[0].sum())
