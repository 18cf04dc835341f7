"""The controller as real processes, beside a fake API server and fake servers that speak real HTTP."""

from __future__ import annotations

import time

import pytest
import yaml
from fake_api import CODE, Server, eventually, fleet
from running_controller import controller

pytest.importorskip("kubernetes")
META = {"annotations": {"controller.kubernetes.io/pod-deletion-cost"}, "labels": {"fastar/placement"}}
COMPONENT = CODE.parent / "components" / "stream-controller" / "controller.yaml"


def rounds(api, count: int = 4) -> None:
    """Until the leader has looked so often again."""
    seen = len(api.did("list"))
    eventually(lambda: len(api.did("list")) >= seen + count)


def test_costs_follow_the_streams_and_nothing_else_is_written():
    with fleet((3, 4), (0, 4), (2, 4)) as (api, servers), controller(api, room=6) as process:
        eventually(lambda: api.costs() == {"triton-0": "300", "triton-1": "0", "triton-2": "200"})
        rounds(api)
        quiet = len(api.did("patch"))
        assert quiet == 3, "one for each pod"
        rounds(api, 6)
        assert len(api.did("patch")) == quiet, "nothing has changed"
        servers[1].streams = 1
        eventually(lambda: api.costs() == {"triton-0": "300", "triton-1": "100", "triton-2": "200"})
        for body in api.did("patch"):
            assert body.keys() == {"metadata"}
            assert body["metadata"].keys() <= META.keys()
            for field, written in body["metadata"].items():
                assert written.keys() == META[field]
        rounds(api, 1)
        assert process.metric("streams") == 6
        assert process.metric("patches_total") == len(api.did("patch"))
        eventually(lambda: process.metric("leader") == 1)
        assert process.get("/healthz") == "ok\n"
        other = Server(4, 4)
        api.add("triton-3", other.port)
        del api.pods["triton-0"]
        eventually(lambda: api.costs() == {"triton-1": "100", "triton-2": "200", "triton-3": "400"})
        other.stop()


def test_full_draining_and_silent_pods_are_closed_and_come_back():
    with fleet((1, 2), (0, 2), (0, 2)) as (api, servers), controller(api, room=8):
        everyone = {"triton-0", "triton-1", "triton-2"}
        eventually(lambda: all(api.costs().values()))
        assert api.opened() == everyone
        assert not [server.closed for server in servers if server.closed], "a pod opens by itself"
        servers[0].streams = 2
        eventually(lambda: api.opened() == everyone - {"triton-0"})
        eventually(lambda: servers[0].closed.count("/close?seconds=60") > 3)  # else it would open again by itself
        servers[0].streams = 1
        eventually(lambda: api.opened() == everyone)
        assert servers[0].closed[-1] == "/close?seconds=0"
        told = len(servers[0].closed)
        rounds(api)
        assert len(servers[0].closed) == told
        assert not servers[1].closed
        servers[1].draining = 1
        eventually(lambda: api.opened() == everyone - {"triton-1"})
        servers[1].draining = 0
        eventually(lambda: api.opened() == everyone)
        servers[0].silent = True
        eventually(lambda: api.opened() == everyone - {"triton-0"})
        assert api.costs()["triton-0"] == "100", "the last that was known"
        servers[0].silent = False
        eventually(lambda: api.opened() == everyone)
        for server in servers:
            server.streams = 2
        rounds(api)
        assert api.opened() == everyone, "a full fleet refuses with a reason; an empty Service does not"


def test_a_slow_pod_gets_no_new_streams_until_it_was_well_for_a_while():
    with fleet((1, 2), (1, 2)) as (api, servers), controller(api, room=8):
        eventually(lambda: all(api.costs().values()))
        slow = time.monotonic()

        def watch(rate: float) -> None:
            servers[0].watch(rate, 10)
            servers[1].watch(16.0, 10)

        eventually(lambda: watch(11.0) or api.opened() == {"triton-1"})
        assert time.monotonic() - slow > 0.4, "one bad look is not enough"
        well = time.monotonic()
        eventually(lambda: watch(17.0) or len(api.opened()) == 2)
        assert time.monotonic() - well > 0.4


def test_a_slow_pod_sends_one_stream_on_and_then_waits():
    with fleet((3, 4), (1, 4), (1, 4)) as (api, servers), controller(api, room=1, move_every=1.5) as process:
        eventually(lambda: all(api.costs().values()))

        def watch(*slow: int) -> None:
            for index, server in enumerate(servers):
                server.watch(11.0 if index in slow else 17.0, 10)

        eventually(lambda: watch(0, 1) or servers[0].asked)
        asked = time.monotonic()
        assert api.opened() == {"triton-2"}
        eventually(lambda: watch(0, 1) or len(servers[0].asked) == 2)
        assert time.monotonic() - asked > 1.2
        assert set(servers[0].asked) == {"/move?streams=1"}
        assert servers[1].asked == [], "its only stream stays"
        assert process.metric("moves_total") == 2
        servers[0].refuses = True
        eventually(lambda: watch(0, 1) or process.metric('errors_total{call="move"}') == 1)
        assert process.metric('errors_total{call="close"}') >= 1
        servers[2].streams = 4
        eventually(lambda: watch(0, 1) or api.costs()["triton-2"] == "400")
        count, until = len(servers[0].asked), time.monotonic() + 1.8
        eventually(lambda: watch(0, 1) or time.monotonic() > until)
        assert len(servers[0].asked) == count, "nobody has a place for it"


def test_one_leads_and_the_other_takes_over():
    with fleet((1, 2)) as (api, servers), controller(api) as first:
        eventually(lambda: api.costs() == {"triton-0": "100"})
        with controller(api) as second:
            holder = api.holder()
            rounds(api)
            assert (first.metric("leader"), second.metric("leader")) == (1, 0)
            assert second.metric("patches_total") == 0
            first.kill()
            servers[0].streams = 2
            eventually(lambda: api.costs() == {"triton-0": "200"})
            eventually(lambda: second.metric("leader") == 1)
            assert api.holder() not in ("", holder)
            assert api.leases["stream-controller"]["spec"]["leaseTransitions"] == 1
            assert second.end() == 0
            assert api.holder() == "", "SIGTERM lets go of the Lease"


def test_a_broken_api_server_is_waited_for():
    with fleet((1, 2)) as (api, servers), controller(api) as process:
        eventually(lambda: api.costs() == {"triton-0": "100"})
        api.broken = {"list": 500}
        servers[0].streams = 2
        eventually(lambda: process.metric('errors_total{call="api"}') >= 2)
        asked = len(api.did("list"))
        time.sleep(0.6)
        assert len(api.did("list")) - asked <= 2, "pauses grow"
        api.broken = {"patch": 409}
        eventually(lambda: len(api.did("patch")) >= 2)
        api.broken = {"update": 500}  # the Lease cannot be renewed
        eventually(lambda: process.metric("leader") == 0)
        eventually(lambda: process.metric('errors_total{call="lease"}') >= 1)
        api.broken, api.slow = {}, 0.2
        eventually(lambda: api.costs() == {"triton-0": "200"})
        assert process.end() == 0


def test_the_role_is_what_the_controller_uses():
    """After all it can do: nothing that is not in the Role, and nothing in the Role that is not used."""
    with fleet((1, 2), (2, 2)) as (api, servers), controller(api) as process:
        eventually(lambda: len([body for body in api.did("patch") if "labels" in body["metadata"]]) >= 1)
        eventually(lambda: api.did("update"))
        assert process.end() == 0
        used = {(verb, resource) for verb, resource, _ in api.calls}
    (role,) = [item for item in yaml.safe_load_all(COMPONENT.read_text()) if item["kind"] == "Role"]
    given = {(verb, resource) for rule in role["rules"] for verb in rule["verbs"] for resource in rule["resources"]}
    assert used == given
    names = {name for rule in role["rules"] for name in rule.get("resourceNames", [])}
    assert names == set(api.leases), "the Lease that it may touch is the one that it takes"
