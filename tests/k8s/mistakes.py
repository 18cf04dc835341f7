"""Seeded mistakes: what people do to manifests that a schema lets through, and the one rule that must notice.

Each is a change of one rendered variant (rendered.py). `at` finds an object, then walks into it; lists by index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import yaml

Object = dict[str, Any]
Change = Callable[[list[Object]], None]


@dataclasses.dataclass(frozen=True)
class Mistake:
    name: str
    rule: str
    change: Change
    variant: str = "prod-h100"


def at(objects: list[Object], kind: str, name: str, *path: str | int) -> Any:
    found = next(
        item
        for item in objects
        if item["kind"] == kind and name in (item["metadata"]["name"], item["metadata"]["name"].rsplit("-", 1)[0])
    )
    for key in path:
        found = found[key]
    return found


def put(kind: str, name: str, *path: str | int, value: Any) -> Change:
    def change(objects: list[Object]) -> None:
        at(objects, kind, name, *path[:-1])[path[-1]] = value

    return change


def drop(kind: str, name: str, *path: str | int) -> Change:
    """A field, or with no path the whole object."""

    def change(objects: list[Object]) -> None:
        if path:
            del at(objects, kind, name, *path[:-1])[path[-1]]
        else:
            objects.remove(at(objects, kind, name))

    return change


def add(item: Object) -> Change:
    return lambda objects: objects.append(item)


def envoy(edit: Callable[[Object], None]) -> Change:
    def change(objects: list[Object]) -> None:
        data = at(objects, "ConfigMap", "gateway-envoy", "data")
        config = yaml.load(data["envoy.yaml"], yaml.CSafeLoader)
        edit(config)
        data["envoy.yaml"] = yaml.dump(config, Dumper=yaml.CSafeDumper)

    return change


def manager(config: Object) -> Object:
    return config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]


def route(config: Object) -> Object:
    return manager(config)["route_config"]["virtual_hosts"][0]["routes"][0]["route"]


def cluster(config: Object) -> Object:
    return config["static_resources"]["clusters"][0]


def hashed(config: Object) -> Object:
    return config["static_resources"]["clusters"][1]


def replace_expr(record: str, old: str, new: str) -> Change:
    def change(objects: list[Object]) -> None:
        for group in at(objects, "PrometheusRule", "fastar", "spec", "groups"):
            for rule in group["rules"]:
                if record in (rule.get("record"), rule.get("alert")):
                    assert old in rule["expr"]
                    rule["expr"] = rule["expr"].replace(old, new)

    return change


POD = ("spec", "template", "spec")
SERVER = (*POD, "containers", 0)
SCALER = ("spec", "advanced", "horizontalPodAutoscalerConfig", "behavior")
GPU = "nvidia.com/gpu"


def server(*path: str | int, value: Any) -> Change:
    return put("Deployment", "triton", *SERVER, *path, value=value)


def unset(*path: str | int) -> Change:
    return drop("Deployment", "triton", *SERVER, *path)


def both(*changes: Change) -> Change:
    def change(objects: list[Object]) -> None:
        for one in changes:
            one(objects)

    return change


def open_to_all(objects: list[Object]) -> None:
    at(objects, "NetworkPolicy", "triton", "spec", "ingress").append({"ports": [{"protocol": "TCP", "port": "http"}]})


def close_scraping(objects: list[Object]) -> None:
    entries = at(objects, "NetworkPolicy", "triton", "spec", "ingress")
    entries[:] = [entry for entry in entries if entry["ports"][0]["port"] != "metrics"]


def forget_admin_port(objects: list[Object]) -> None:
    env = at(objects, "Deployment", "triton", *SERVER, "env")
    env[:] = [variable for variable in env if variable["name"] != "FASTAR_ADMIN_PORT"]


def second_autoscaler(objects: list[Object]) -> None:
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "triton"},
        "minReplicas": 2,
        "maxReplicas": 9,
        "behavior": at(objects, "ScaledObject", "triton", *SCALER),
        "metrics": [],
    }
    metadata = {"name": "triton", "namespace": "fastar"}
    objects.append(
        {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": metadata, "spec": spec}
    )


CLUSTER_ROLE = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRole",
    "metadata": {"name": "all", "namespace": "fastar"},
    "rules": [],
}
SECRET = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": "hub", "namespace": "fastar"},
    "stringData": {"token": "x"},
}
LOAD_MODELS = {
    "match": {"path": "/inference.GRPCInferenceService/RepositoryModelLoad"},
    "route": {"cluster": "triton"},
}

MISTAKES = [
    # Pods
    Mistake("a tag instead of a digest", "images_are_pinned", server("image", value="fastar-serve:latest")),
    Mistake(
        "runs as root",
        "pods_run_unprivileged",
        put("Deployment", "triton", *POD, "securityContext", "runAsNonRoot", value=False),
    ),
    Mistake(
        "no seccomp profile",
        "pods_run_unprivileged",
        drop("Deployment", "gateway", *POD, "securityContext", "seccompProfile"),
    ),
    Mistake(
        "keeps capabilities",
        "pods_run_unprivileged",
        server("securityContext", "capabilities", value={"drop": ["NET_RAW"]}),
    ),
    Mistake("may gain privileges", "pods_run_unprivileged", unset("securityContext", "allowPrivilegeEscalation")),
    Mistake(
        "the host's network", "pods_run_unprivileged", put("Deployment", "gateway", *POD, "hostNetwork", value=True)
    ),
    Mistake(
        "a folder of the host",
        "pods_run_unprivileged",
        put("Deployment", "otel-collector", *POD, "volumes", value=[{"name": "config", "hostPath": {"path": "/etc"}}]),
    ),
    Mistake("a writable root", "root_is_read_only", server("securityContext", "readOnlyRootFilesystem", value=False)),
    Mistake(
        "64 MiB of shared memory",
        "server_has_scratch_space",
        lambda o: at(o, "Deployment", "triton", *SERVER, "volumeMounts").pop(),
    ),
    Mistake(
        "no limit of memory",
        "containers_have_limits",
        drop("Deployment", "otel-collector", *SERVER, "resources", "limits"),
    ),
    Mistake(
        "no request of CPU",
        "containers_have_limits",
        drop("Deployment", "gateway", *SERVER, "resources", "requests", "cpu"),
    ),
    Mistake(
        "half a GPU",
        "gpus_are_whole",
        both(server("resources", "requests", GPU, value="500m"), server("resources", "limits", GPU, value="500m")),
    ),
    Mistake(
        "a GPU asked for but not limited",
        "gpus_are_whole",
        drop("Deployment", "triton", *SERVER, "resources", "limits", GPU),
    ),
    Mistake(
        "no GPU at all",
        "gpus_are_whole",
        both(
            drop("Deployment", "triton", *SERVER, "resources", "limits", GPU),
            drop("Deployment", "triton", *SERVER, "resources", "requests", GPU),
        ),
    ),
    Mistake(
        "a claim without a template", "gpus_are_whole", drop("ResourceClaimTemplate", "triton-gpu"), "prod-h100+dra"
    ),
    Mistake(
        "liveness asks for readiness",
        "probes_are_right",
        server("livenessProbe", "httpGet", "path", value="/v2/health/ready"),
    ),
    Mistake(
        "a probe of a path that is not there",
        "probes_are_right",
        server("readinessProbe", "httpGet", "path", value="/healthz"),
    ),
    Mistake("killed while it loads", "probes_are_right", server("startupProbe", "failureThreshold", value=30)),
    Mistake(
        "the gateway is never asked whether it lives",
        "probes_are_right",
        drop("Deployment", "gateway", *SERVER, "livenessProbe"),
    ),
    Mistake(
        "a probe of a port that is not there", "ports_exist", server("readinessProbe", "httpGet", "port", value="web")
    ),
    Mistake(
        "a Service to a port that is not there",
        "ports_exist",
        put("Service", "gateway", "spec", "ports", 0, "targetPort", value="http2"),
    ),
    Mistake("no preStop", "drain_has_time", unset("lifecycle")),
    Mistake("a preStop of one second", "drain_has_time", server("lifecycle", "preStop", "sleep", "seconds", value=1)),
    Mistake(
        "the default grace of 30 s",
        "drain_has_time",
        drop("Deployment", "triton", *POD, "terminationGracePeriodSeconds"),
    ),
    Mistake("the drain takes the whole grace", "drain_has_time", server("args", 3, value="580")),
    Mistake(
        "an update ends a pod first",
        "rollout_keeps_capacity",
        put("Deployment", "triton", "spec", "strategy", "rollingUpdate", "maxUnavailable", value="25%"),
    ),
    Mistake(
        "all pods in one zone", "zones_are_spread", drop("Deployment", "triton", *POD, "topologySpreadConstraints")
    ),
    Mistake(
        "spread that counts the old revision",
        "zones_are_spread",
        drop("Deployment", "gateway", *POD, "topologySpreadConstraints", 0, "matchLabelKeys"),
    ),
    Mistake(
        "the cluster autoscaler may evict",
        "streams_are_not_evicted",
        put("Deployment", "triton", "spec", "template", "metadata", "annotations", value={}),
    ),
    Mistake(
        "batch jobs push streams out",
        "streams_are_not_evicted",
        drop("Deployment", "triton", *POD, "priorityClassName"),
    ),
    Mistake("a thread for every core of the node", "threads_fit_the_cores", unset("args", slice(4, None))),
    Mistake("writable weights", "weights_are_read_only", unset("volumeMounts", 1, "readOnly")),
    Mistake(
        "a flag that is none",
        "server_understands_its_settings",
        server("args", 0, value="--limits"),
    ),
    Mistake("a misspelt variable", "server_understands_its_settings", server("env", 1, "name", value="FASTAR_WORLDS")),
    Mistake(
        "a limit that is none",
        "server_understands_its_settings",
        put("ConfigMap", "fastar-limits", "data", "limits.json", value='{"max_streams": 2, "slots": 8}'),
    ),
    # Objects among each other
    Mistake(
        "an object in another namespace",
        "objects_share_the_namespace",
        put("PodDisruptionBudget", "triton", "metadata", "namespace", value="default"),
    ),
    Mistake(
        "rights for another namespace",
        "objects_share_the_namespace",
        put("RoleBinding", "stream-controller", "subjects", 0, "namespace", value="fastar"),
        "staging+redis",
    ),
    Mistake("no Pod Security", "namespace_is_restricted", drop("Namespace", "fastar", "metadata", "labels")),
    Mistake(
        "Pod Security that only warns",
        "namespace_is_restricted",
        drop("Namespace", "fastar", "metadata", "labels", "pod-security.kubernetes.io/enforce"),
    ),
    Mistake(
        "a selector that fits no pod",
        "selectors_select",
        put("Service", "gateway", "spec", "selector", value={"app": "gateway"}),
    ),
    Mistake(
        "a PodMonitor of nothing",
        "selectors_select",
        put("PodMonitor", "triton", "spec", "selector", "matchLabels", value={"app": "triton"}),
    ),
    Mistake(
        "a ConfigMap that is not there",
        "references_resolve",
        put("Deployment", "triton", *POD, "volumes", 0, "configMap", "name", value="limits"),
    ),
    Mistake("a claim that is not there", "references_resolve", drop("PersistentVolumeClaim", "fastar-weights")),
    Mistake(
        "a route to a port that is not there",
        "references_resolve",
        put("GRPCRoute", "fastar", "spec", "rules", 0, "backendRefs", 0, "port", value=8001),
    ),
    Mistake("one address for all pods", "service_is_headless", drop("Service", "triton", "spec", "clusterIP")),
    Mistake(
        "pods are called before they are ready",
        "service_is_headless",
        put("Service", "triton", "spec", "publishNotReadyAddresses", value=True),
    ),
    Mistake(
        "open to the internet", "service_is_headless", put("Service", "gateway", "spec", "type", value="LoadBalancer")
    ),
    Mistake(
        "a budget that blocks every drain",
        "budgets_let_drains_pass",
        put("PodDisruptionBudget", "triton", "spec", "maxUnavailable", value=0),
    ),
    Mistake(
        "a pod that never gets ready blocks a drain",
        "budgets_let_drains_pass",
        drop("PodDisruptionBudget", "triton", "spec", "unhealthyPodEvictionPolicy"),
    ),
    Mistake("no budget", "budgets_let_drains_pass", drop("PodDisruptionBudget", "triton")),
    # Rights and secrets
    Mistake(
        "a token nobody needs",
        "tokens_are_not_mounted",
        put("Deployment", "triton", *POD, "automountServiceAccountToken", value=True),
    ),
    Mistake("rights in the whole cluster", "rights_are_small", add(CLUSTER_ROLE)),
    Mistake(
        "may delete pods",
        "rights_are_small",
        put("Role", "stream-controller", "rules", 0, "verbs", value=["get", "list", "watch", "patch", "delete"]),
        "staging+redis",
    ),
    Mistake(
        "may read secrets",
        "rights_are_small",
        put("Role", "stream-controller", "rules", 0, "resources", value=["pods", "secrets"]),
        "staging+redis",
    ),
    Mistake("a secret in the repository", "no_secrets_inside", add(SECRET)),
    Mistake(
        "a token in the environment",
        "no_secrets_inside",
        lambda o: at(o, "Deployment", "triton", *SERVER, "env").append({"name": "HF_TOKEN", "value": "hf_x"}),
    ),
    # Network
    Mistake("no default", "network_is_closed", drop("NetworkPolicy", "default-deny")),
    Mistake(
        "a default for one direction",
        "network_is_closed",
        put("NetworkPolicy", "default-deny", "spec", "policyTypes", value=["Ingress"]),
    ),
    Mistake("open to every pod of the cluster", "network_is_closed", open_to_all),
    Mistake("a policy that cuts scraping", "scraping_is_allowed", close_scraping),
    Mistake(
        "the gateway cannot reach the servers",
        "calls_are_allowed",
        put("NetworkPolicy", "gateway", "spec", "egress", value=[]),
    ),
    Mistake(
        "spans cannot leave", "calls_are_allowed", put("NetworkPolicy", "otel-collector", "spec", "ingress", value=[])
    ),
    Mistake("no name can be resolved", "calls_are_allowed", drop("NetworkPolicy", "allow-dns")),
    # Autoscaling and metrics
    Mistake("two autoscalers", "one_autoscaler_with_sane_bounds", second_autoscaler),
    Mistake(
        "down to zero",
        "one_autoscaler_with_sane_bounds",
        put("ScaledObject", "triton", "spec", "minReplicaCount", value=0),
    ),
    Mistake(
        "scales what is not there",
        "one_autoscaler_with_sane_bounds",
        put("ScaledObject", "triton", "spec", "scaleTargetRef", "name", value="tritonserver"),
    ),
    Mistake(
        "without metrics, to a fixed number",
        "one_autoscaler_with_sane_bounds",
        put("ScaledObject", "triton", "spec", "fallback", "behavior", value="static"),
    ),
    Mistake(
        "a window the API server refuses",
        "scaling_is_not_rash",
        put("ScaledObject", "triton", *SCALER, "scaleDown", "stabilizationWindowSeconds", value=7200),
    ),
    Mistake(
        "a period the API server refuses",
        "scaling_is_not_rash",
        put(
            "HorizontalPodAutoscaler",
            "triton",
            "spec",
            "behavior",
            "scaleDown",
            "policies",
            0,
            "periodSeconds",
            value=3600,
        ),
        "staging+hpa-native",
    ),
    Mistake(
        "up only after a while",
        "scaling_is_not_rash",
        put("ScaledObject", "triton", *SCALER, "scaleUp", "stabilizationWindowSeconds", value=300),
    ),
    Mistake(
        "down by half",
        "scaling_is_not_rash",
        put(
            "ScaledObject",
            "triton",
            *SCALER,
            "scaleDown",
            "policies",
            value=[{"type": "Percent", "value": 50, "periodSeconds": 60}],
        ),
    ),
    Mistake(
        "a number of replicas", "autoscaled_have_no_replicas", put("Deployment", "triton", "spec", "replicas", value=3)
    ),
    Mistake(
        "more slots, the old threshold",
        "threshold_fits_slots",
        put("ConfigMap", "fastar-limits", "data", "limits.json", value='{"max_streams": 8}'),
    ),
    Mistake(
        "a Value instead of an average",
        "threshold_fits_slots",
        put("ScaledObject", "triton", "spec", "triggers", 0, "metricType", value="Value"),
    ),
    Mistake(
        "a trigger on what nobody exports",
        "metrics_are_exported",
        put(
            "ScaledObject",
            "triton",
            "spec",
            "triggers",
            0,
            "metadata",
            "query",
            value='sum(fastar_queue_depth{namespace="fastar"})',
        ),
    ),
    Mistake(
        "a rule on what nobody exports",
        "metrics_are_exported",
        replace_expr("fastar:streams_active", "fastar_streams_active", "fastar_active_streams"),
    ),
    Mistake(
        "a label that no series has", "metrics_are_exported", replace_expr("FastarSnapshotsFail", "result=", "outcome=")
    ),
    Mistake(
        "an external metric that nobody records",
        "metrics_are_exported",
        put(
            "HorizontalPodAutoscaler",
            "triton",
            "spec",
            "metrics",
            0,
            "external",
            "metric",
            "name",
            value="slots_wanted",
        ),
        "staging+hpa-native",
    ),
    Mistake(
        "another fleet's trigger",
        "numbers_are_of_this_namespace",
        put(
            "ScaledObject",
            "triton",
            "spec",
            "triggers",
            1,
            "metadata",
            "query",
            value='fastar:slots_wanted_fps{namespace="fastar"}',
        ),
        "staging",
    ),
    Mistake(
        "another fleet's settings",
        "numbers_are_of_this_namespace",
        put("PrometheusRule", "fastar", "spec", "groups", 0, "rules", 0, "labels", "namespace", value="fastar"),
        "dev-cpu",
    ),
    Mistake(
        "no metrics, no pods",
        "numbers_are_of_this_namespace",
        drop("ScaledObject", "triton", "spec", "triggers", 0, "metadata", "ignoreNullValues"),
    ),
    Mistake(
        "a controller with another target",
        "controller_knows_the_target",
        put("Deployment", "stream-controller", *SERVER, "args", 1, value="24"),
    ),
    Mistake(
        "a controller that cannot scrape",
        "calls_are_allowed",
        drop("NetworkPolicy", "triton-from-controller"),
    ),
    Mistake(
        "whoever scrapes may move streams",
        "few_reach_the_admin_port",
        lambda o: at(o, "NetworkPolicy", "triton", "spec", "ingress", 1, "ports").append(
            {"protocol": "TCP", "port": "admin"}
        ),
    ),
    Mistake(
        "a rate over two scrapes",
        "rates_see_enough_samples",
        replace_expr("fastar:streams_opened:rate5m", "[5m]", "[20s]"),
    ),
    Mistake(
        "an alert at the first blink",
        "alerts_say_what_is_wrong",
        drop("PrometheusRule", "fastar", "spec", "groups", 2, "rules", 0, "for"),
    ),
    # The gateway
    Mistake("the default time-out of 15 s", "gateway_never_times_out", envoy(lambda c: route(c).pop("timeout"))),
    Mistake(
        "paused streams are cut", "gateway_never_times_out", envoy(lambda c: manager(c).pop("stream_idle_timeout"))
    ),
    Mistake(
        "no keepalive",
        "gateway_notices_the_dead",
        envoy(lambda c: manager(c)["http2_protocol_options"].pop("connection_keepalive")),
    ),
    Mistake(
        "pings that Triton takes for an attack",
        "gateway_notices_the_dead",
        envoy(
            lambda c: next(iter(cluster(c)["typed_extension_protocol_options"].values()))["explicit_http_config"][
                "http2_protocol_options"
            ]["connection_keepalive"].update(interval="1s")
        ),
    ),
    Mistake(
        "a ring that moves streams",
        "gateway_goes_by_pin_then_hash",
        envoy(lambda c: hashed(c).update(lb_policy="RING_HASH")),
    ),
    Mistake("no pin", "gateway_goes_by_pin_then_hash", envoy(lambda c: manager(c)["http_filters"].pop(0))),
    Mistake(
        "a pin to a dead pod fails",
        "gateway_goes_by_pin_then_hash",
        envoy(lambda c: manager(c)["http_filters"][0]["typed_config"].update(strict=True)),
    ),
    Mistake(
        "new streams go to any pod",
        "gateway_looks_for_room",
        envoy(lambda c: cluster(c).update(lb_policy="RANDOM")),
    ),
    Mistake(
        "new streams go to full pods",
        "gateway_looks_for_room",
        envoy(lambda c: cluster(c)["health_checks"][0].update(http_health_check={"path": "/v2/health/ready"})),
    ),
    Mistake(
        "the last open pod gets a part of the new streams",
        "gateway_looks_for_room",
        envoy(lambda c: cluster(c)["load_assignment"].pop("policy")),
    ),
    Mistake(
        "nobody listens where the gateway asks for room",
        "gateway_looks_for_room",
        forget_admin_port,
    ),
    Mistake(
        "streams that went back to their pod do not count",
        "gateway_goes_by_pin_then_hash",
        envoy(lambda c: manager(c)["route_config"]["virtual_hosts"][0]["routes"][0]["match"]["headers"].pop()),
    ),
    Mistake(
        "the gateway may not ask for room",
        "calls_are_allowed",
        lambda o: at(o, "NetworkPolicy", "gateway", "spec", "egress", 0, "ports").pop(),
    ),
    Mistake(
        "a gateway that asks once a minute before its first call",
        "gateway_notices_the_dead",
        envoy(lambda c: cluster(c)["health_checks"][0].pop("no_traffic_interval")),
    ),
    Mistake(
        "the hash comes after what has none",
        "gateway_goes_by_pin_then_hash",
        envoy(lambda c: manager(c)["route_config"]["virtual_hosts"][0]["routes"].reverse()),
    ),
    Mistake("nothing is hashed", "gateway_goes_by_pin_then_hash", envoy(lambda c: route(c).pop("hash_policy"))),
    Mistake(
        "the admin port is open",
        "gateway_is_no_back_door",
        envoy(lambda c: c["admin"]["address"]["socket_address"].update(address="0.0.0.0")),
    ),
    Mistake(
        "viewers may load models",
        "gateway_is_no_back_door",
        envoy(lambda c: manager(c)["route_config"]["virtual_hosts"][0]["routes"].append(LOAD_MODELS)),
    ),
    Mistake(
        "the gateway calls a name that is not there",
        "gateway_finds_the_servers",
        put("Service", "triton", "metadata", "name", value="triton-headless"),
    ),
    Mistake(
        "one look at the name, for ever",
        "gateway_finds_the_servers",
        envoy(lambda c: cluster(c).update(type="LOGICAL_DNS")),
    ),
    Mistake(
        "spans to a closed port",
        "collector_is_found",
        put("Service", "otel-collector", "spec", "ports", 0, "port", value=4317),
    ),
]
