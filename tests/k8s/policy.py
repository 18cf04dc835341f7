"""What the schemas cannot see: each rule is a function that yields what is wrong with a rendered overlay, as text.

`problems(objects)` runs them all. Every rule has a mistake in mistakes.py that it alone catches.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import typer
import yaml

from fastar_backend.cli import app
from fastar_backend.errors import FastarError
from fastar_backend.serve import ServeSettings
from fastar_backend.service.telemetry import TABLE

Object = dict[str, Any]
Rule = Callable[["Fleet"], Iterator[str]]
RULES: dict[str, Rule] = {}
# Checked against a live Envoy (test_k8s_gateway.py); the servers' own against a live server (test_k8s_metrics.py).
ENVOY = {"envoy_cluster_membership_healthy", "envoy_cluster_membership_degraded"}
CLUSTER_WIDE = {"Namespace", "PriorityClass"}
LABELS = {"namespace", "le", "envoy_cluster_name"} | {label for _, _, labels, _ in TABLE.values() for label in labels}
VIEWERS = {  # calls that may pass the gateway
    "/inference.GRPCInferenceService/ModelStreamInfer",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
    "/inference.GRPCInferenceService/ModelReady",
    "/grpc.health.v1.Health/Check",
}
CLUSTERS = ("triton", "triton-hashed")  # of Envoy, both of all servers
OPERATORS = {"or", "and", "unless", "bool", "offset"}


def rule(function: Rule) -> Rule:
    RULES[function.__name__] = function
    return function


def problems(objects: list[Object]) -> dict[str, list[str]]:
    """Name of the rule -> what it found; rules that found nothing are left out."""
    fleet = Fleet(objects)
    found = {name: list(check(fleet)) for name, check in RULES.items()}
    return {name: texts for name, texts in found.items() if texts}


def server_metrics() -> set[str]:
    """Names of the series that a server exports."""
    parts = {"histogram": ("_bucket", "_sum", "_count")}
    return {name + part for name, (kind, *_) in TABLE.items() for part in parts.get(kind, ("",))}


class Fleet:
    """The objects of one rendered overlay."""

    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects
        self.namespace = next(self.of("Namespace"))["metadata"]["name"]

    def of(self, *kinds: str) -> Iterator[Object]:
        return (item for item in self.objects if item["kind"] in kinds)

    def has(self, kind: str, name: str) -> bool:
        return any(item["metadata"]["name"] == name for item in self.of(kind))

    def pods(self, name: str | None = None) -> Iterator[tuple[str, Object, Object]]:
        """(name, labels, pod spec) of every workload."""
        for item in self.of("Deployment", "StatefulSet"):
            if name in (None, item["metadata"]["name"]):
                template = item["spec"]["template"]
                yield item["metadata"]["name"], template["metadata"].get("labels", {}), template["spec"]

    def containers(self) -> Iterator[tuple[str, Object]]:
        for name, _, spec in self.pods():
            for container in [*spec["containers"], *spec.get("initContainers", [])]:
                yield f"{name}/{container['name']}", container

    def server(self) -> Object:
        """The container that serves."""
        return next(self.pods("triton"))[2]["containers"][0]

    def selected(self, labels: Object) -> list[tuple[str, Object]]:
        return [(name, spec) for name, own, spec in self.pods() if labels.items() <= own.items()]

    def file(self, name: str, file: str) -> str:
        """Of a generated ConfigMap, whose name ends in a hash."""
        for item in self.of("ConfigMap"):
            if item["metadata"]["name"].rsplit("-", 1)[0] == name:
                return item["data"][file]
        raise KeyError(name)

    @functools.cached_property
    def envoy(self) -> Object:
        return yaml.load(self.file("gateway-envoy", "envoy.yaml"), yaml.CSafeLoader)

    def listener(self, name: str) -> Object:
        """Its HTTP connection manager."""
        (found,) = [item for item in self.envoy["static_resources"]["listeners"] if item["name"] == name]
        return found["filter_chains"][0]["filters"][0]["typed_config"]

    def cluster(self, name: str) -> Object:
        (found,) = [item for item in self.envoy["static_resources"]["clusters"] if item["name"] == name]
        return found

    def rules(self) -> Iterator[Object]:
        for item in self.of("PrometheusRule"):
            for group in item["spec"]["groups"]:
                yield from group["rules"]

    def recorded(self) -> set[str]:
        return {rule["record"] for rule in self.rules() if "record" in rule}

    def queries(self) -> Iterator[str]:
        """PromQL of all rules and triggers."""
        yield from (rule["expr"] for rule in self.rules())
        for item in self.of("ScaledObject"):
            yield from (trigger["metadata"]["query"] for trigger in item["spec"]["triggers"])

    def behaviours(self) -> Iterator[Object]:
        for item in self.of("ScaledObject"):
            yield item["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        for item in self.of("HorizontalPodAutoscaler"):
            yield item["spec"]["behavior"]


def ports_of(spec: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for c in spec["containers"] for port in c.get("ports", [])}


def seconds(text: str) -> float:
    """`5s`, `10m` or `1h`."""
    return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]


def option(container: Object, name: str) -> str | None:
    """Value of `--name VALUE` or `--name=VALUE` among the arguments."""
    arguments = container.get("args", [])
    for index, argument in enumerate(arguments):
        if argument == name:
            return arguments[index + 1]
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
    return None


def variables(container: Object) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in container.get("env", [])}


# Pods


@rule
def images_are_pinned(fleet: Fleet) -> Iterator[str]:
    for name, container in fleet.containers():
        if not re.search(r"@sha256:[0-9a-f]{64}$", container["image"]):
            yield f"{name}: {container['image']} has no digest"


@rule
def pods_run_unprivileged(fleet: Fleet) -> Iterator[str]:
    for name, _, spec in fleet.pods():
        context = spec.get("securityContext", {})
        if not context.get("runAsNonRoot") or context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: runAsNonRoot and seccompProfile RuntimeDefault are needed"
        if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{name}: uses the host's namespaces"
        yield from (f"{name}: volume {v['name']} is a hostPath" for v in spec.get("volumes", []) if "hostPath" in v)
    for name, container in fleet.containers():
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"{name}: allowPrivilegeEscalation must be false"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name}: must drop ALL capabilities, and add none"


@rule
def root_is_read_only(fleet: Fleet) -> Iterator[str]:
    for name, container in fleet.containers():
        if not container.get("securityContext", {}).get("readOnlyRootFilesystem"):
            yield f"{name}: its root file system is writable"


@rule
def server_has_scratch_space(fleet: Fleet) -> Iterator[str]:
    """A read-only root needs /tmp; frames go through /dev/shm, of which a container has 64 MiB by default."""
    _, _, spec = next(fleet.pods("triton"))
    mounts = {mount["mountPath"]: mount for mount in fleet.server()["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for path, medium in (("/tmp", ""), ("/dev/shm", "Memory")):
        empty = volumes[mounts[path]["name"]].get("emptyDir") if path in mounts else None
        if empty is None or empty.get("medium", "") != medium or "sizeLimit" not in empty:
            yield f"triton: {path} must be an emptyDir of medium {medium or 'default'} with a sizeLimit"


@rule
def containers_have_limits(fleet: Fleet) -> Iterator[str]:
    for name, container in fleet.containers():
        resources = container.get("resources", {})
        asked, most = resources.get("requests", {}), resources.get("limits", {})
        if "cpu" not in asked or "memory" not in asked or most.get("memory") != asked["memory"]:
            yield f"{name}: requests of cpu and memory, and the same limit of memory, are needed"


@rule
def gpus_are_whole(fleet: Fleet) -> Iterator[str]:
    resources, (_, _, spec) = fleet.server()["resources"], next(fleet.pods("triton"))
    asked, most = (str(resources.get(key, {}).get("nvidia.com/gpu", "")) for key in ("requests", "limits"))
    claims = [claim["name"] for claim in resources.get("claims", [])]
    known = {c["name"]: c["resourceClaimTemplateName"] for c in spec.get("resourceClaims", [])}
    if asked != most or not re.fullmatch(r"[1-9]\d*|", asked):
        yield f"triton: {asked or 'no'} GPUs asked for, limit {most or 'none'}; the same whole number is needed"
    for claim in claims:
        if claim not in known or not fleet.has("ResourceClaimTemplate", known[claim]):
            yield f"triton: claim {claim} has no template"
    wants = variables(fleet.server()).get("FASTAR_DEVICE") == "cuda"
    if wants != bool(asked or most or claims):
        yield "triton: FASTAR_DEVICE and the GPUs asked for do not go together"


@rule
def probes_are_right(fleet: Fleet) -> Iterator[str]:
    """Not live = killed, so only what a restart cures; ready = answers, not: has room."""
    server = fleet.server()
    paths = {
        "startupProbe": "/v2/health/ready",
        "readinessProbe": "/v2/health/ready",
        "livenessProbe": "/v2/health/live",
    }
    for kind, path in paths.items():
        found = server.get(kind, {}).get("httpGet", {})
        if found.get("path") != path:
            yield f"triton: {kind} looks at {found.get('path')}, not {path}"
    startup = server.get("startupProbe", {})
    if startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3) < 900:
        yield "triton: the startupProbe gives up before weights are loaded and warmed up (900 s)"
    for name, container in fleet.containers():
        if container.get("ports") and not {"readinessProbe", "livenessProbe"} <= container.keys():
            yield f"{name}: lacks a readinessProbe or livenessProbe"


@rule
def ports_exist(fleet: Fleet) -> Iterator[str]:
    """Probes, Services, PodMonitors and NetworkPolicies call ports by name."""
    for name, _, spec in fleet.pods():
        for container in spec["containers"]:
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                how = container.get(kind, {})
                port = (how.get("httpGet") or how.get("tcpSocket") or {}).get("port")
                if port is not None and port not in ports_of(spec):
                    yield f"{name}: {kind} asks port {port}, which is not there"
    for item in fleet.of("Service"):
        for _, spec in fleet.selected(item["spec"]["selector"]):
            for port in item["spec"]["ports"]:
                if port.get("targetPort") not in ports_of(spec):
                    yield f"Service {item['metadata']['name']}: targetPort {port.get('targetPort')} is not there"
    for item in fleet.of("PodMonitor"):
        for _, spec in fleet.selected(item["spec"]["selector"]["matchLabels"]):
            for endpoint in item["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] not in ports_of(spec):
                    yield f"PodMonitor {item['metadata']['name']}: port {endpoint['port']} is not there"


@rule
def drain_has_time(fleet: Fleet) -> Iterator[str]:
    """SIGTERM only after the gateway forgot the pod; SIGKILL only long after the last stream is stored."""
    _, _, spec = next(fleet.pods("triton"))
    pause = fleet.server().get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    cluster = fleet.cluster("triton")
    look = max(seconds(cluster["dns_refresh_rate"]), seconds(cluster["health_checks"][0]["interval"]))
    if pause < 2 * look:
        yield f"triton: preStop waits {pause} s; the gateway needs two looks of {look:g} s"
    ends = float(option(fleet.server(), "--exit-timeout") or ServeSettings().exit_timeout)
    if spec.get("terminationGracePeriodSeconds", 30) < pause + ends + 300:
        yield f"triton: {pause} s of preStop and {ends:g} s of drain leave no 300 s to store streams before the kill"


@rule
def rollout_keeps_capacity(fleet: Fleet) -> Iterator[str]:
    for item in fleet.of("Deployment"):
        rolling = item["spec"].get("strategy", {}).get("rollingUpdate", {})
        if rolling.get("maxUnavailable") != 0 or not rolling.get("maxSurge"):
            yield f"{item['metadata']['name']}: an update must start a pod before it ends one"


@rule
def zones_are_spread(fleet: Fleet) -> Iterator[str]:
    for name in ("triton", "gateway"):
        _, labels, spec = next(fleet.pods(name))
        spread = spec.get("topologySpreadConstraints", [])
        ours = [s for s in spread if s["labelSelector"].get("matchLabels", {}).items() <= labels.items()]
        if not any(
            s["topologyKey"] == "topology.kubernetes.io/zone" and s.get("matchLabelKeys") == ["pod-template-hash"]
            for s in ours
        ):
            yield f"{name}: is not spread over zones by revision"


@rule
def streams_are_not_evicted(fleet: Fleet) -> Iterator[str]:
    for item in fleet.of("Deployment"):
        if item["metadata"]["name"] == "triton":
            template = item["spec"]["template"]
            notes = template["metadata"].get("annotations", {})
            if notes.get("cluster-autoscaler.kubernetes.io/safe-to-evict") != "false":
                yield "triton: the cluster autoscaler may move it"
            if not template["spec"].get("priorityClassName"):
                yield "triton: has no priorityClassName"


@rule
def threads_fit_the_cores(fleet: Fleet) -> Iterator[str]:
    """By default there is a thread for every core of the node."""
    threads, cores = option(fleet.server(), "--threads"), fleet.server()["resources"]["requests"].get("cpu", "0")
    if threads is None or int(threads) > int(cores):
        yield f"triton: {threads or 'all'} threads on the {cores} cores that it asks for"


@rule
def weights_are_read_only(fleet: Fleet) -> Iterator[str]:
    for mount in fleet.server()["volumeMounts"]:
        if mount["name"] in ("weights", "limits") and not mount.get("readOnly"):
            yield f"triton: {mount['mountPath']} is writable"


@functools.cache
def serve_options() -> tuple[set[str], set[str]]:
    """Flags and environment variables of `fastar serve`."""
    parameters = typer.main.get_command(app).commands["serve"].params
    flags = {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}
    return flags, {parameter.envvar for parameter in parameters if parameter.envvar}


@rule
def server_understands_its_settings(fleet: Fleet) -> Iterator[str]:
    """Flags, variables and limits are those of `fastar serve`."""
    flags, known = serve_options()
    server = fleet.server()
    yield from (f"triton: {a} is no flag" for a in server["args"] if a.startswith("-") and a.split("=")[0] not in flags)
    given = variables(server)
    yield from (f"triton: {name} is no variable" for name in given if name.startswith("FASTAR_") and name not in known)
    values = {name.removeprefix("FASTAR_").lower(): value for name, value in given.items() if name in known}
    try:
        ServeSettings.model_validate(values | {"service": json.loads(fleet.file("fastar-limits", "limits.json"))})
    except (ValueError, FastarError) as error:
        yield f"triton: {error}"


# Objects among each other


@rule
def objects_share_the_namespace(fleet: Fleet) -> Iterator[str]:
    for item in fleet.objects:
        if item["kind"] not in CLUSTER_WIDE and item["metadata"].get("namespace") != fleet.namespace:
            yield f"{item['kind']} {item['metadata']['name']}: is not in {fleet.namespace}"
    for item in fleet.of("RoleBinding"):
        if any(subject.get("namespace") != fleet.namespace for subject in item["subjects"]):
            yield f"RoleBinding {item['metadata']['name']}: gives rights to another namespace"


@rule
def namespace_is_restricted(fleet: Fleet) -> Iterator[str]:
    labels = next(fleet.of("Namespace"))["metadata"].get("labels", {})
    if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "Namespace: Pod Security is not enforced as restricted"


@rule
def selectors_select(fleet: Fleet) -> Iterator[str]:
    for item in fleet.objects:
        kind, name, spec = item["kind"], item["metadata"]["name"], item.get("spec", {})
        if kind in ("Deployment", "StatefulSet"):
            own = spec["template"]["metadata"].get("labels", {})
            if not spec["selector"]["matchLabels"].items() <= own.items():
                yield f"{kind} {name}: does not select its own pods"
        elif kind == "Service" and not fleet.selected(spec["selector"]):
            yield f"Service {name}: selects nothing"
        elif kind in ("PodDisruptionBudget", "PodMonitor") and not fleet.selected(spec["selector"]["matchLabels"]):
            yield f"{kind} {name}: selects nothing"
        elif kind == "NetworkPolicy" and not fleet.selected(spec["podSelector"].get("matchLabels", {})):
            yield f"NetworkPolicy {name}: selects nothing"


@rule
def references_resolve(fleet: Fleet) -> Iterator[str]:
    for name, _, spec in fleet.pods():
        wanted = [("ServiceAccount", spec.get("serviceAccountName", "default"))]
        wanted += [("PriorityClass", spec["priorityClassName"])] if "priorityClassName" in spec else []
        for volume in spec.get("volumes", []):
            wanted += [("ConfigMap", volume["configMap"]["name"])] if "configMap" in volume else []
            claim = volume.get("persistentVolumeClaim")
            wanted += [("PersistentVolumeClaim", claim["claimName"])] if claim else []
        yield from (f"{name}: no {kind} {what}" for kind, what in wanted if not fleet.has(kind, what))
        volumes = {v["name"] for v in spec.get("volumes", [])} | {
            claim["metadata"]["name"]
            for item in fleet.of("StatefulSet")
            if item["metadata"]["name"] == name
            for claim in item["spec"].get("volumeClaimTemplates", [])
        }
        for container in spec["containers"]:
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            yield from (f"{name}: no volume {missing}" for missing in sorted(mounts - volumes))
    for item in fleet.of("RoleBinding"):
        names = [("Role", item["roleRef"]["name"]), *((s["kind"], s["name"]) for s in item["subjects"])]
        yield from (f"RoleBinding: no {kind} {name}" for kind, name in names if not fleet.has(kind, name))
    for item in fleet.of("GRPCRoute"):
        for backend in (b for r in item["spec"]["rules"] for b in r["backendRefs"]):
            service = [s for s in fleet.of("Service") if s["metadata"]["name"] == backend["name"]]
            if not any(port["port"] == backend["port"] for s in service for port in s["spec"]["ports"]):
                yield f"GRPCRoute: no Service {backend['name']}:{backend['port']}"


@rule
def service_is_headless(fleet: Fleet) -> Iterator[str]:
    for item in fleet.of("Service"):
        spec = item["spec"]
        if item["metadata"]["name"] == "triton" and spec.get("clusterIP") != "None":
            yield f"Service {item['metadata']['name']}: hides the pods behind one address"
        if spec.get("type", "ClusterIP") != "ClusterIP" or spec.get("publishNotReadyAddresses"):
            yield f"Service {item['metadata']['name']}: is open to the outside, or names pods that are not ready"


@rule
def budgets_let_drains_pass(fleet: Fleet) -> Iterator[str]:
    guarded = set()
    for item in fleet.of("PodDisruptionBudget"):
        spec = item["spec"]
        if "minAvailable" in spec or spec.get("maxUnavailable") in (0, "0", "0%", None):
            yield f"PodDisruptionBudget {item['metadata']['name']}: can block a node's drain for ever"
        if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"PodDisruptionBudget {item['metadata']['name']}: a pod that never gets ready blocks a node's drain"
        guarded |= {name for name, _ in fleet.selected(spec["selector"].get("matchLabels", {}))}
    yield from (f"{name}: has no PodDisruptionBudget" for name in ("triton", "gateway") if name not in guarded)


# Rights and secrets


@rule
def tokens_are_not_mounted(fleet: Fleet) -> Iterator[str]:
    bound = {subject["name"] for item in fleet.of("RoleBinding") for subject in item["subjects"]}
    for name, _, spec in fleet.pods():
        if spec.get("automountServiceAccountToken") is not (spec.get("serviceAccountName") in bound):
            yield f"{name}: a token is for pods that talk to the API server, and for no others"
    for item in fleet.of("ServiceAccount"):
        if item.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {item['metadata']['name']}: mounts its token everywhere"


@rule
def rights_are_small(fleet: Fleet) -> Iterator[str]:
    allowed = {"pods": {"get", "list", "watch", "patch"}, "leases": {"get", "create", "update"}}
    for item in fleet.of("ClusterRole", "ClusterRoleBinding"):
        yield f"{item['kind']} {item['metadata']['name']}: no rights in the whole cluster"
    for item in fleet.of("Role"):
        for entry in item["rules"]:
            for resource in entry["resources"]:
                if more := set(entry["verbs"]) - allowed.get(resource, set()):
                    yield f"Role {item['metadata']['name']}: may {', '.join(sorted(more))} {resource}"


@rule
def no_secrets_inside(fleet: Fleet) -> Iterator[str]:
    yield from (f"Secret {item['metadata']['name']}: belongs in no repository" for item in fleet.of("Secret"))
    for name, container in fleet.containers():
        for variable, value in variables(container).items():
            if value and re.search("PASSWORD|SECRET|TOKEN|_KEY$", variable):
                yield f"{name}: {variable} holds a secret"


# Network


def peers(fleet: Fleet, entry: Object, side: str) -> set[str]:
    """Names of the workloads, and `namespace:NAME`s, that an ingress or egress entry names."""
    found = set()
    for peer in entry.get(side, []):
        if "podSelector" in peer and "namespaceSelector" not in peer:
            found |= {name for name, _ in fleet.selected(peer["podSelector"].get("matchLabels", {}))}
        if "namespaceSelector" in peer:
            labels = peer["namespaceSelector"].get("matchLabels", {})
            found.add(f"namespace:{labels.get('kubernetes.io/metadata.name', '*')}")
    return found


def allowed(fleet: Fleet, pod: str, direction: str, peer: str, port: str) -> bool:
    """Whether a policy lets `pod` talk to, or hear from, `peer`. port: as the policy names it."""
    side = "from" if direction == "ingress" else "to"
    for item in fleet.of("NetworkPolicy"):
        selects = pod in [name for name, _ in fleet.selected(item["spec"]["podSelector"].get("matchLabels", {}))]
        for entry in item["spec"].get(direction, []) if selects else []:
            ports = {str(known["port"]) for known in entry.get("ports", [])}
            if port in ports and peer in peers(fleet, entry, side):
                return True
    return False


@rule
def few_reach_the_admin_port(fleet: Fleet) -> Iterator[str]:
    """The servers' has no passwords. Gateways only ask for room there: no route of theirs leads to it."""
    for item in fleet.of("NetworkPolicy"):
        for entry in item["spec"].get("ingress", []):
            others = peers(fleet, entry, "from") - {"stream-controller", "gateway"}
            if others and any(str(known["port"]) in ("admin", "8003") for known in entry.get("ports", [])):
                yield f"NetworkPolicy {item['metadata']['name']}: {', '.join(sorted(others))} may move streams"


@rule
def network_is_closed(fleet: Fleet) -> Iterator[str]:
    closed = [item["spec"] for item in fleet.of("NetworkPolicy") if item["spec"]["podSelector"] == {}]
    if {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} not in closed:
        yield "NetworkPolicy: none denies all by default"
    for item in fleet.of("NetworkPolicy"):
        for entry in item["spec"].get("ingress", []):
            if not entry.get("from") or not entry.get("ports") or {} in entry["from"]:
                yield f"NetworkPolicy {item['metadata']['name']}: opens a pod to everyone"
        if any(not entry.get("ports") for entry in item["spec"].get("egress", [])):
            yield f"NetworkPolicy {item['metadata']['name']}: lets a pod call any port"


@rule
def scraping_is_allowed(fleet: Fleet) -> Iterator[str]:
    for item in fleet.of("PodMonitor"):
        for name, _ in fleet.selected(item["spec"]["selector"]["matchLabels"]):
            for endpoint in item["spec"]["podMetricsEndpoints"]:
                if not allowed(fleet, name, "ingress", "namespace:monitoring", endpoint["port"]):
                    yield f"NetworkPolicy: Prometheus cannot scrape {name}:{endpoint['port']}"


@rule
def calls_are_allowed(fleet: Fleet) -> Iterator[str]:
    names = [name for name, _, _ in fleet.pods()]
    calls = [("gateway", "triton", "grpc"), ("triton", "otel-collector", "otlp-http"), ("triton", "redis", "redis")]
    calls += [(source, "triton", "admin") for source in ("gateway", "stream-controller")]
    calls += [("stream-controller", "triton", "metrics")]
    for source, target, port in calls:
        if not {source, target} <= set(names):
            continue
        if not allowed(fleet, source, "egress", target, port) or not allowed(fleet, target, "ingress", source, port):
            yield f"NetworkPolicy: {source} cannot call {target}:{port}"
    for name in names:
        if not allowed(fleet, name, "egress", "namespace:kube-system", "53"):
            yield f"NetworkPolicy: {name} cannot resolve names"
    if not allowed(fleet, "gateway", "ingress", "namespace:ingress", "grpc"):
        yield "NetworkPolicy: the platform's Gateway cannot call the gateway"


# Autoscaling and metrics


@rule
def one_autoscaler_with_sane_bounds(fleet: Fleet) -> Iterator[str]:
    scalers = list(fleet.of("ScaledObject", "HorizontalPodAutoscaler"))
    if len(scalers) != 1:
        yield f"{len(scalers)} autoscalers: they would fight, or nobody scales"
    for item in scalers:
        spec, target = item["spec"], item["spec"]["scaleTargetRef"]
        least, most = (
            spec.get("minReplicaCount", spec.get("minReplicas", 0)),
            spec.get("maxReplicaCount", spec.get("maxReplicas")),
        )
        if not 2 <= least < most:
            yield f"{item['kind']}: {least} to {most} pods; at least 2, and room to grow, are needed"
        if not fleet.has(target["kind"], target["name"]):
            yield f"{item['kind']}: there is no {target['kind']} {target['name']}"
        fallback = spec.get("fallback", {})
        if item["kind"] == "ScaledObject" and (
            fallback.get("behavior") != "currentReplicasIfHigher" or not least <= fallback.get("replicas", 0) <= most
        ):
            yield "ScaledObject: without metrics it must keep what runs"


@rule
def scaling_is_not_rash(fleet: Fleet) -> Iterator[str]:
    """Windows up to 3600 s, periods up to 1800 s (the API server's limits); up at once, down slowly."""
    for behaviour in fleet.behaviours():
        up, down = behaviour["scaleUp"], behaviour["scaleDown"]
        for fields in (up, down):
            if not 0 <= fields["stabilizationWindowSeconds"] <= 3600:
                yield "behavior: stabilizationWindowSeconds must be 0 to 3600"
            if any(not 0 < policy["periodSeconds"] <= 1800 for policy in fields["policies"]):
                yield "behavior: periodSeconds must be 1 to 1800"
        if up["stabilizationWindowSeconds"] > 0 or down["stabilizationWindowSeconds"] < 300:
            yield "behavior: viewers wait for a late pod, and are moved by a hasty removal"
        if any(p["type"] == "Percent" and 60 * p["value"] > 5 * p["periodSeconds"] for p in down["policies"]):
            yield "behavior: more than 5 % of the pods go in a minute"


@rule
def autoscaled_have_no_replicas(fleet: Fleet) -> Iterator[str]:
    targets = {item["spec"]["scaleTargetRef"]["name"] for item in fleet.of("ScaledObject", "HorizontalPodAutoscaler")}
    for item in fleet.of("Deployment"):
        if item["metadata"]["name"] in targets | {"triton"} and "replicas" in item["spec"]:
            yield f"{item['metadata']['name']}: applying it would undo the autoscaler"


@rule
def threshold_fits_slots(fleet: Fleet) -> Iterator[str]:
    slots = json.loads(fleet.file("fastar-limits", "limits.json")).get("max_streams", 8)
    for item in fleet.of("ScaledObject"):
        for trigger in item["spec"]["triggers"]:
            if trigger.get("metricType") != "AverageValue" or float(trigger["metadata"]["threshold"]) != 0.95 * slots:
                yield f"ScaledObject: {trigger['name']} must be an AverageValue of {0.95 * slots:g}, .95 of max_streams"
    for item in fleet.of("HorizontalPodAutoscaler"):
        for metric in item["spec"]["metrics"]:
            if metric["external"]["target"] != {"type": "AverageValue", "averageValue": f"{0.95 * slots:g}"}:
                yield f"HorizontalPodAutoscaler: the target must be an AverageValue of {0.95 * slots:g}"


def names_in(query: str) -> set[str]:
    """Series that a query names."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', " ", query)
    bare = re.sub(r"\b(by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", " ", bare)
    found = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\s*\(|[a-zA-Z0-9_:])", bare)
    return {name for name in found if name not in OPERATORS}


@rule
def metrics_are_exported(fleet: Fleet) -> Iterator[str]:
    known = server_metrics() | ENVOY | fleet.recorded()
    for query in fleet.queries():
        yield from (f"nobody exports {name}: {query}" for name in sorted(names_in(query) - known))
        for matchers in re.findall(r"\{([^}]*)\}", query):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            yield from (f"no series has the label {label}: {query}" for label in sorted(labels - LABELS))
    adapted = {name.replace(":", "_") for name in fleet.recorded()}
    for item in fleet.of("HorizontalPodAutoscaler"):
        for metric in item["spec"]["metrics"]:
            if metric["external"]["metric"]["name"] not in adapted:
                yield f"nobody records {metric['external']['metric']['name']}"


@rule
def numbers_are_of_this_namespace(fleet: Fleet) -> Iterator[str]:
    for found in fleet.rules():
        if found.get("labels", {}).get("namespace", fleet.namespace) != fleet.namespace:
            yield f"PrometheusRule: {found['record']} is another fleet's"
    for item in fleet.of("ScaledObject"):
        for trigger in item["spec"]["triggers"]:
            if f'namespace="{fleet.namespace}"' not in trigger["metadata"]["query"]:
                yield f"ScaledObject: {trigger['name']} does not look at {fleet.namespace}"
            if trigger["metadata"].get("ignoreNullValues") != "false":
                yield f"ScaledObject: {trigger['name']} takes missing metrics for none wanted"


@rule
def controller_knows_the_target(fleet: Fleet) -> Iterator[str]:
    """Streams of a pod are slow below the rate that the rules call F."""
    wanted = {found["expr"] for found in fleet.rules() if found.get("record") == "fastar:fps_target"}
    for _, _, spec in fleet.pods("stream-controller"):
        target = option(spec["containers"][0], "--target")
        if {f"vector({target})"} != wanted:
            yield f"stream-controller: --target {target} is not fastar:fps_target, {', '.join(wanted)}"


@rule
def rates_see_enough_samples(fleet: Fleet) -> Iterator[str]:
    interval = 0.0
    for item in fleet.of("PodMonitor"):
        for endpoint in item["spec"]["podMetricsEndpoints"]:
            interval = max(interval, seconds(endpoint["interval"]))
            if seconds(endpoint["scrapeTimeout"]) >= seconds(endpoint["interval"]):
                yield f"PodMonitor {item['metadata']['name']}: scrapes overlap"
    for query in fleet.queries():
        for window in re.findall(r"\[(\w+)\]", query):
            if seconds(window) < 4 * interval:
                yield f"a window of {window} holds fewer than four scrapes: {query}"


@rule
def alerts_say_what_is_wrong(fleet: Fleet) -> Iterator[str]:
    for found in fleet.rules():
        if "alert" in found:
            said = "summary" in found.get("annotations", {}) and "for" in found
            if not said or found.get("labels", {}).get("severity") not in ("warning", "critical"):
                yield f"{found['alert']}: lacks `for`, a severity or a summary"


# The gateway


@rule
def gateway_never_times_out(fleet: Fleet) -> Iterator[str]:
    manager = fleet.listener("streams")
    for name in ("stream_idle_timeout", "request_timeout"):
        if manager.get(name) != "0s":
            yield f"Envoy: {name} ends streams"
    if "max_stream_duration" in manager.get("common_http_protocol_options", {}):
        yield "Envoy: max_stream_duration ends streams"
    for route in stream_routes(manager):
        if route["route"].get("timeout") != "0s" or route["route"].get("idle_timeout") != "0s":
            yield "Envoy: a stream's route has a time-out (15 s, if none is given)"


@rule
def gateway_notices_the_dead(fleet: Fleet) -> Iterator[str]:
    sides = {"viewers": fleet.listener("streams").get("http2_protocol_options", {})}
    for name in CLUSTERS:
        options = fleet.cluster(name).get("typed_extension_protocol_options", {})
        sides[name] = next(iter(options.values()), {}).get("explicit_http_config", {}).get("http2_protocol_options", {})
        checks = fleet.cluster(name).get("health_checks")
        if not checks or checks[0].get("no_traffic_interval") != checks[0]["interval"]:
            yield f"Envoy: {name} is not checked, or once a minute before its first call"
    for side, found in sides.items():
        alive = found.get("connection_keepalive", {})
        if not 5 < seconds(alive.get("interval", "0s")) <= 60 or not seconds(alive.get("timeout", "0s")):
            yield f"Envoy: no keepalive towards {side}, or more often than Triton suffers (5 s)"


def routes(manager: Object) -> list[Object]:
    return [route for host in manager["route_config"]["virtual_hosts"] for route in host["routes"]]


def stream_routes(manager: Object) -> list[Object]:
    return [route for route in routes(manager) if route["match"].get("path", "").endswith("/ModelStreamInfer")]


@rule
def gateway_goes_by_pin_then_hash(fleet: Fleet) -> Iterator[str]:
    manager = fleet.listener("streams")
    filters = [item["name"].rsplit(".", 1)[1] for item in manager["http_filters"]]
    if filters[:1] != ["stateful_session"]:
        yield "Envoy: the pin is not looked at first"
    elif manager["http_filters"][0]["typed_config"].get("strict"):
        yield "Envoy: a pin to a pod that is gone fails instead of falling back"
    first, *_ = stream_routes(manager)
    if first["match"].get("headers") != [
        {"name": "x-fastar-stream", "present_match": True},
        {"name": "x-fastar-pod", "present_match": False},
    ]:
        yield "Envoy: calls with a stream's id and no pin do not come first"
    if first["route"].get("hash_policy") != [{"header": {"header_name": "x-fastar-stream"}}]:
        yield "Envoy: a stream's id is not hashed"
    if fleet.cluster(first["route"]["cluster"]).get("lb_policy") != "MAGLEV":
        yield "Envoy: not MAGLEV: streams would be moved when pods come and go"


@rule
def gateway_looks_for_room(fleet: Fleet) -> Iterator[str]:
    """Calls with a pin and calls that need a place are counted together, and pods say whether they have one."""
    others = [route for route in stream_routes(fleet.listener("streams")) if "headers" not in route["match"]]
    if [route["route"]["cluster"] for route in others] != ["triton"]:
        yield "Envoy: not all calls with a pin or without an id are of the one cluster that counts them"
    cluster = fleet.cluster("triton")
    if cluster.get("lb_policy") != "LEAST_REQUEST":
        yield "Envoy: new streams go to any pod"
    if cluster["health_checks"][0].get("http_health_check") != {"path": "/placement"}:
        yield "Envoy: pods are not asked whether they have room"
    assignment = cluster["load_assignment"]
    most = max((scaler["spec"]["maxReplicaCount"] for scaler in fleet.of("ScaledObject")), default=2)
    if assignment.get("policy", {}).get("overprovisioning_factor", 140) < 100 * most:
        yield f"Envoy: with one pod of {most} open, others get calls, too"
    asked = assignment["endpoints"][0]["lb_endpoints"][0]["endpoint"].get("health_check_config", {}).get("port_value")
    _, _, spec = next(fleet.pods("triton"))
    if not str(asked) == variables(fleet.server()).get("FASTAR_ADMIN_PORT") == str(ports_of(spec).get("admin")):
        yield f"Envoy: no server says at port {asked} whether it has room"


@rule
def gateway_is_no_back_door(fleet: Fleet) -> Iterator[str]:
    if fleet.envoy["admin"]["address"]["socket_address"]["address"] != "127.0.0.1":
        yield "Envoy: its admin port can stop it, and is open"
    for name, paths in (("streams", VIEWERS), ("status", {"/ready", "/stats/prometheus"})):
        for route in routes(fleet.listener(name)):
            if route["match"].get("path") not in paths:
                yield f"Envoy: {name} lets {route['match']} through"


@rule
def gateway_finds_the_servers(fleet: Fleet) -> Iterator[str]:
    ports = {s["metadata"]["name"]: [p["port"] for p in s["spec"]["ports"]] for s in fleet.of("Service")}
    for name in CLUSTERS:
        cluster = fleet.cluster(name)
        endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
        address = endpoint["address"]["socket_address"]
        if cluster["type"] != "STRICT_DNS" or address["port_value"] not in ports.get(address["address"], []):
            yield f"Envoy: {cluster['type']} {address['address']}:{address['port_value']} does not name every pod"


@rule
def collector_is_found(fleet: Fleet) -> Iterator[str]:
    url = variables(fleet.server()).get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    ports = {s["metadata"]["name"]: [str(p["port"]) for p in s["spec"]["ports"]] for s in fleet.of("Service")}
    host, _, port = url.removeprefix("http://").partition(":")
    receivers = yaml.safe_load(fleet.file("otel-collector", "otel.yaml"))["receivers"]["otlp"]["protocols"]
    if port not in ports.get(host, []) or not receivers.get("http", {}).get("endpoint", "").endswith(f":{port}"):
        yield f"triton: no collector listens at {url}"
