"""Metrics on their way to Triton, whose calls are slow and must never be two at a time."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from fastar_backend.service.telemetry import Metrics, triton_factory


class Triton:
    """Its custom metrics, as slow as beside a busy thread. `values[name][labels]`; `at_once`: calls, at most."""

    def __init__(self, seconds: float = 0.001) -> None:
        outer, self.values, self.at_once, self.inside = self, {}, 0, 0
        self.threads: set[str] = set()

        def call(act):
            outer.inside += 1
            outer.threads.add(threading.current_thread().name)
            outer.at_once = max(outer.at_once, outer.inside)
            time.sleep(seconds)
            act()
            outer.inside -= 1

        class Metric:
            def __init__(self, values, labels):
                self.values, self.key = values, tuple(sorted(labels.items()))
                call(lambda: values.setdefault(self.key, 0.0))

            def increment(self, value):
                call(lambda: self.values.update({self.key: self.values[self.key] + value}))

            def set(self, value):
                call(lambda: self.values.update({self.key: value}))

        class MetricFamily:
            COUNTER, GAUGE = "COUNTER", "GAUGE"

            def __init__(self, name, description, kind):
                self.values = outer.values.setdefault(name, {})

            def Metric(self, labels):  # noqa: N802
                return Metric(self.values, labels)

        self.pb_utils = SimpleNamespace(MetricFamily=MetricFamily)


def until(condition, seconds=10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(reached)


def test_many_threads_count_and_one_calls_triton():
    """Two calls at a time crash the model process (Triton 2.51: lock_exception, bad_alloc)."""
    triton = Triton()
    metrics = Metrics(triton_factory(triton.pb_utils))

    def work(index):
        for _ in range(50):
            metrics.control("seed", index % 2 == 0)
            metrics.ended("idle")
            metrics.snapshot(0.02, True)
            metrics.streams(3, 4, 1)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    controls = "fastar_controls_total"
    assert until(lambda: triton.values.get("fastar_streams_ended_total", {}).get((("reason", "idle"),)) == 400)
    for result in ("taken", "refused"):
        key = (("kind", "seed"), ("result", result))
        assert until(lambda key=key: triton.values[controls].get(key) == 200)
    assert until(lambda: triton.values["fastar_snapshot_seconds_bucket"][(("le", "+Inf"),)] == 400)
    assert until(lambda: triton.values["fastar_snapshot_seconds_sum"][()] == pytest.approx(8))
    assert triton.values["fastar_snapshot_seconds_bucket"][(("le", "0.01"),)] == 0
    assert triton.at_once == 1
    assert triton.threads == {"fastar-metrics"}


def test_a_slow_triton_delays_no_event_and_gauges_overtake_counters():
    triton = Triton(seconds=0.02)
    metrics = Metrics(triton_factory(triton.pb_utils))
    began = time.perf_counter()
    for phase in range(100):
        metrics.control(f"kind{phase}", True)
    metrics.streams(5, 8, 0)
    assert time.perf_counter() - began < 0.1
    assert until(lambda: triton.values.get("fastar_streams_active", {}).get(()) == 5, 1.0)
    assert len(triton.values.get("fastar_controls_total", {})) < 100


def test_a_server_without_metrics_goes_on(caplog):
    class MetricFamily:
        COUNTER, GAUGE = 0, 1

        def __init__(self, **_):
            raise RuntimeError("metrics are not enabled")

    metrics = Metrics(triton_factory(SimpleNamespace(MetricFamily=MetricFamily)))
    assert until(lambda: "fastar" in {record.name for record in caplog.records}), "said once, in the log"
    metrics.admitted()
    metrics.streams(1, 8, 0)
