"""Slots, memory, tenants and time: what does not fit is told what would, and when to come back."""

from __future__ import annotations

import random
import re

import pytest

from fastar_backend.errors import AtCapacity
from fastar_backend.service.admission import Admission, Booking, Cost
from fastar_backend.service.config import ServiceConfig

MIB = 1 << 20


def admission(**config) -> Admission:
    return Admission(ServiceConfig(**config), Cost({1: 0.12, 4: 0.3}), chunk_frames=4, cache_bytes=100 * MIB)


def booking(fps=None, tenant="a", mib=10) -> Booking:
    return Booking(tenant, mib * MIB, fps)


def test_the_cost_of_a_step_is_what_was_measured():
    cost = Cost({1: 0.12, 4: 0.3})
    assert cost(1) == pytest.approx(0.12)
    assert cost(4) == pytest.approx(0.3)
    assert cost(8) == pytest.approx(0.54)
    alone = Cost({1: 0.12, 4: 0.3}, deterministic=True)
    assert alone(4) == pytest.approx(4 * 0.12)


@pytest.mark.parametrize("measured", [{1: 0.1}, {1: 0.1, 4: 0.09}, {1: 0.1, 2: 0.5}])
def test_odd_measurements_give_a_usable_cost(measured):
    cost = Cost(measured)
    assert 0 < cost(1) < cost(2) < cost(8)


def test_the_cost_follows_the_machine_but_not_a_hiccup():
    cost = Cost({1: 0.1})
    cost.observe(1, 10.0)
    assert cost(1) < 0.12
    for _ in range(200):
        cost.observe(1, 0.2)
    assert cost(1) == pytest.approx(0.2, rel=0.02)


def test_streams_are_admitted_until_the_time_is_booked_and_the_offer_fits():
    gate, held = admission(max_streams=100), []
    while True:
        try:
            gate.check(booking(fps=8.0, mib=0), held, 7.4)
        except AtCapacity as error:
            refusal = error
            break
        held.append(booking(fps=8.0, mib=0))
    # base .06 s at 2 chunks a second, .06 s for each: .12 + .12 n <= .9
    assert len(held) == 6
    assert refusal.reason == "fps"
    match = re.fullmatch(r"fps: got 8; allowed: at most ([\d.]+) now, or null .*; retry in 7 s", str(refusal))
    offered = float(match[1])
    assert 0 < offered < 8
    gate.check(booking(fps=offered, mib=0), held, 1)
    with pytest.raises(AtCapacity):
        gate.check(booking(fps=offered * 1.1 + 0.1, mib=0), held, 1)
    gate.check(booking(fps=None, mib=0), held, 1)  # as fast as possible takes what is left


def test_a_machine_that_became_slower_admits_fewer():
    gate = admission(max_streams=100)
    held = [booking(fps=8.0, mib=0)] * 5
    gate.check(booking(fps=8.0, mib=0), held, 1)
    for _ in range(200):
        gate.cost.observe(4, 0.6)
    with pytest.raises(AtCapacity, match="fps: got 8; allowed: null"):
        gate.check(booking(fps=8.0, mib=0), held, 1)


def test_memory_slots_and_tenants():
    gate = admission(max_streams=4, max_streams_per_tenant=2)
    with pytest.raises(
        AtCapacity, match=r"its caches need \d+ bytes; allowed: at most 31457280 bytes are free"
    ) as refused:
        gate.check(booking(mib=40), [booking(mib=70, tenant="b")], 1)
    assert refused.value.reason == "memory"
    with pytest.raises(AtCapacity, match="tenant: it has 2 streams; allowed: 2; retry in 1 s") as refused:
        gate.check(booking(), [booking(), booking(), booking(tenant="b")], 0.1)
    assert refused.value.reason == "tenant"
    gate.check(booking(tenant="b"), [booking(), booking(), booking(tenant="b")], 1)
    with pytest.raises(AtCapacity, match="streams: 4 are open; allowed: 4"):
        gate.check(booking(tenant="c"), [booking(tenant=t) for t in "aabb"], 1)


def test_there_is_a_place_for_as_many_as_are_then_admitted():
    """Of the fastest and largest of those that are there; slots, time and memory each decide somewhere."""
    source, seen = random.Random(), set()
    for _ in range(300):
        gate = admission(max_streams=source.randint(1, 12), utilisation=source.choice([0.31, 0.87]))
        gate.cost.correction = source.choice([0.2, 1.0, 3.0])
        held = [
            booking(source.choice([None, 2.0, 8.0]), mib=source.choice([0, 5, 25]))
            for _ in range(source.randint(0, gate.config.max_streams))
        ]
        places, now = gate.capacity(held), list(held)
        rates = [other.fps for other in held if other.fps]
        another = Booking("b", max((o.cache_bytes for o in held), default=0), max(rates, default=None))
        for _ in range(places - len(held)):
            gate.check(another, now, 1)
            now.append(another)
        assert len(now) == places <= max(gate.config.max_streams, len(held))
        if held:
            with pytest.raises(AtCapacity) as refused:
                gate.check(another, now, 1)
            seen.add(refused.value.reason)
        else:
            assert places == gate.config.max_streams
    assert seen == {"streams", "fps", "memory"}


def test_a_machine_that_became_slower_has_fewer_places():
    gate, held = admission(max_streams=100), [booking(fps=8.0, mib=0)]
    assert gate.capacity(held) == 6
    for _ in range(200):
        gate.cost.observe(4, 0.6)
    assert gate.capacity(held) < 6
    assert gate.capacity([booking(fps=8.0, mib=0)] * 9) == 9, "who is there has his place"
