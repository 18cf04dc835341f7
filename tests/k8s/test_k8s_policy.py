"""The overlays keep every rule of policy.py, and each seeded mistake breaks exactly the one that is there for it."""

from __future__ import annotations

import copy

import policy
import pytest
from mistakes import MISTAKES
from rendered import VARIANTS, rendered


@pytest.mark.parametrize("variant", VARIANTS)
def test_overlays_keep_every_rule(variant):
    assert policy.problems(rendered(variant)) == {}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_noticed(mistake):
    objects = copy.deepcopy(rendered(mistake.variant))
    mistake.change(objects)
    found = policy.problems(objects)
    assert list(found) == [mistake.rule], found
    assert all(found[mistake.rule])


def test_every_rule_has_a_mistake():
    assert policy.RULES.keys() == {mistake.rule for mistake in MISTAKES}
    assert len(MISTAKES) >= 25


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ('sum by (namespace) (rate(a_total{reason=~"x|y"}[5m]))', {"a_total"}),
        ("(a:b > on (namespace) c) or c", {"a:b", "c"}),
        ("histogram_quantile(0.1, sum by (le) (rate(f_bucket[5m])))", {"f_bucket"}),
        ("vector(240)", set()),
        ("1 - clamp_min(deriv(x[5m]), 0) / y unless z", {"x", "y", "z"}),
    ],
)
def test_names_in_a_query(query, names):
    assert policy.names_in(query) == names
