"""The recording and alert rules, run by promtool on made-up series: the numbers that the autoscaler gets."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from rendered import rendered

from k8s.simulate.manifest import one

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian, Ubuntu: apt install prometheus)"
)
FLEET = 'namespace="fastar"'
CLIMB = "0+0.5x40 20x200"  # by half a stream every 15 s for ten minutes, then 20


@pytest.fixture
def rules(tmp_path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(one(rendered("prod-h100"), "PrometheusRule", "fastar")["spec"]))
    return path


def run(rules: Path, series: dict[str, str], expect: list[dict], alerts: list[dict] = ()) -> None:
    """series: sampled every 15 s. Raises AssertionError with promtool's words."""
    test = {
        "rule_files": [str(rules)],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": expect,
                "alert_rule_test": list(alerts),
            }
        ],
    }
    file = rules.parent / "test.yaml"
    file.write_text(json.dumps(test))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr + done.stdout


def value(expression: str, at: str, number: float, labels: str = f"{{{FLEET}}}") -> dict:
    return {"expr": f"round({expression}, 0.01)", "eval_time": at, "exp_samples": [{"labels": labels, "value": number}]}


def pods(metric: str, *values: str, namespace: str = "fastar", more: str = "") -> dict[str, str]:
    return {f'{metric}{{namespace="{namespace}", pod="triton-{i}"{more}}}': text for i, text in enumerate(values)}


def fps_of(low: int, high: int) -> dict[str, str]:
    """Every 15 s, `low` streams seen at 12 to 16 FPS, the others of `high` at 16 to 20."""
    buckets = {"12.0": 0, "16.0": low, "20.0": high, "+Inf": high}
    return {
        name: value
        for bound, count in buckets.items()
        for name, value in pods("fastar_stream_fps_bucket", f"0+{count}x240", more=f', le="{bound}"').items()
    }


def steady(active: tuple[int, int] = (2, 1)) -> dict[str, str]:
    return (
        pods("fastar_streams_capacity", "2x240", "2x240")
        | pods("fastar_streams_active", *(f"{count}x240" for count in active))
        | pods("fastar_streams_admitted_total", "0x240", "0x240")
    )


def test_promtool_accepts_them(rules):
    done = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr + done.stdout


def test_a_quiet_fleet_wants_its_streams_and_one_pod(rules):
    expect = [value("fastar:slots_wanted", "30m", 3 + 2), value("fastar:slots_wanted_fps", "30m", 5)]
    run(rules, steady(), [*expect, value("fastar:slots", "30m", 4), value("fastar:streams_waiting", "30m", 0)])


def test_arrivals_and_trend_make_the_buffer(rules):
    """Four pods that opened a stream every 10 s altogether, and grow by two streams a minute."""
    series = pods("fastar_streams_capacity", *["2x240"] * 4) | pods("fastar_streams_active", CLIMB)
    series |= pods("fastar_streams_admitted_total", "0+1.5x240")  # .1 a second
    arriving = 2 * math.sqrt(0.1 * 240)
    expect = [
        value("fastar:slots_arriving", "9m", round(arriving + 2 / 60 * 240, 2)),
        value("fastar:slots_wanted", "9m", round(18 + arriving + 8, 2)),
        value("fastar:slots_wanted", "40m", round(20 + arriving, 2)),
    ]
    run(rules, series, expect)


def test_a_falling_trend_is_not_counted_against_the_buffer(rules):
    series = pods("fastar_streams_capacity", *["2x240"] * 9) | pods("fastar_streams_active", "100-0.5x160 20x80")
    series |= pods("fastar_streams_admitted_total", "0+1.5x240")
    run(rules, series, [value("fastar:slots_arriving", "20m", round(2 * math.sqrt(0.1 * 240), 2))])


def test_refused_viewers_count_as_waiting(rules):
    """Three refusals in 10 s, each comes back after 10 s: three wait. A tenant over its own limit does not."""
    series = steady((2, 2)) | pods("fastar_streams_rejected_total", "0+4.5x240", more=', reason="streams"')
    series |= pods("fastar_streams_rejected_total", "0+9x240", more=', reason="tenant"')
    alert = {"exp_labels": {"severity": "critical", "namespace": "fastar"}}
    alert["exp_annotations"] = {
        "summary": "About 3 viewers of fastar wait for a slot.",
        "description": "The fleet grows too slowly, is at maxReplicaCount, or has no GPU left.",
    }
    alerts = [
        {"alertname": "FastarRefusesViewers", "eval_time": "5m", "exp_alerts": []},
        {"alertname": "FastarRefusesViewers", "eval_time": "30m", "exp_alerts": [alert]},
    ]
    run(rules, series, [value("fastar:slots_wanted", "30m", 4 + 3 + 2)], alerts)


def test_slow_streams_want_more_slots_and_say_so(rules):
    """One in five at 12 to 16 FPS: the slowest tenth is at 14."""
    alert = {"exp_labels": {"severity": "warning", "namespace": "fastar"}}
    alert["exp_annotations"] = {
        "summary": "A tenth of the streams of fastar run at 14 FPS or less.",
        "description": "More pods do not help streams that are there already. Lower max_streams.",
    }
    alerts = [{"alertname": "FastarSlow", "eval_time": "30m", "exp_alerts": [alert]}]
    expect = [value("fastar:slots_wanted_fps", "30m", round(5 * 16 / 14, 2))]
    run(rules, steady() | fps_of(1, 5), expect, alerts)
    quick = [value("fastar:slots_wanted_fps", "30m", 5)]
    run(rules, steady() | fps_of(0, 5), quick, [{"alertname": "FastarSlow", "eval_time": "30m", "exp_alerts": []}])


def test_fleets_of_one_cluster_do_not_mix(rules):
    other = pods("fastar_streams_active", "50x240", namespace="other")
    other |= pods("fastar_streams_capacity", "64x240", namespace="other")
    other |= pods("fastar_streams_admitted_total", "0+9x240", namespace="other")
    run(rules, steady() | other, [value(f"fastar:slots_wanted{{{FLEET}}}", "30m", 5)])


def gateway(kind: str, values: str) -> dict[str, str]:
    """What one says of the servers that it finds."""
    return {f'envoy_cluster_membership_{kind}{{{FLEET}, pod="gateway-0", envoy_cluster_name="triton"}}': values}


@pytest.mark.parametrize(
    ("alert", "series", "severity", "summary"),
    [
        ("FastarNoServer", {}, "critical", "No server of fastar has reported for five minutes."),
        (
            "FastarNoHealthyUpstream",
            gateway("healthy", "0x240") | gateway("degraded", "0x240"),
            "critical",
            "No gateway of fastar finds a server that lives.",
        ),
        (
            "FastarSnapshotsFail",
            pods("fastar_snapshots_total", "0+1x240", more=', result="failed"'),
            "critical",
            "Snapshots of fastar are not stored. A pod that ends now loses its streams.",
        ),
        (
            "FastarSnapshotsSlow",
            pods("fastar_snapshot_seconds_bucket", "0+9x240", more=', le="10.0"')
            | pods("fastar_snapshot_seconds_count", "0+10x240"),
            "warning",
            "More than one snapshot in twenty of fastar takes over 10 s to store.",
        ),
        (
            "FastarLateChunks",
            pods("fastar_late_chunks_total", "0+1x240", more=', reason="step"')
            | pods("fastar_chunk_seconds_count", "0+50x240", more=', phase="queue"'),
            "warning",
            "More than one chunk in a hundred of fastar came late, not for a slow viewer.",
        ),
        (
            "FastarStreamsFail",
            pods("fastar_streams_ended_total", "0+1x240", more=', reason="error"'),
            "warning",
            "Streams of fastar end by errors.",
        ),
    ],
)
def test_alerts(rules, alert, series, severity, summary):
    expected = {"exp_labels": {"severity": severity, "namespace": "fastar"}, "exp_annotations": {"summary": summary}}
    quiet = steady() | pods("fastar_snapshots_total", "0+1x240", more=', result="stored"')
    quiet |= gateway("healthy", "0x240") | gateway("degraded", "2x240")  # all full
    at = {"alertname": alert, "eval_time": "50m"}
    run(rules, quiet, [], [at | {"exp_alerts": []}])
    run(rules, series, [], [at | {"exp_alerts": [expected]}])
