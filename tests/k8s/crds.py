"""JSON schemas of the custom resources in k8s/: the fields that are used there, and no others, after the definitions of
KEDA 2.17 (keda.sh/v1alpha1), the Prometheus Operator 0.80 (monitoring.coreos.com/v1) and the Gateway API 1.2."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
DURATION: Schema = {"type": "string", "pattern": r"^(\d+(ms|s|m|h|d))+$"}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def fields(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def many(item: Schema, at_least: int = 1, at_most: int = 64) -> Schema:
    return {"type": "array", "items": item, "minItems": at_least, "maxItems": at_most}


def resource(api_version: str, spec: Schema) -> Schema:
    metadata = fields({"name": NAME}, {"namespace": NAME, "labels": TEXTS, "annotations": TEXTS})
    return fields({"apiVersion": {"const": api_version}, "kind": TEXT, "metadata": metadata, "spec": spec})


SELECTOR = fields({"matchLabels": TEXTS})
SCALING = fields(
    {
        "policies": many(
            fields(
                {
                    "type": {"enum": ["Pods", "Percent"]},
                    "value": {"type": "integer", "minimum": 1},
                    "periodSeconds": {"type": "integer", "minimum": 1},
                }
            )
        )
    },
    {"stabilizationWindowSeconds": COUNT, "selectPolicy": {"enum": ["Max", "Min", "Disabled"]}},
)
SCALED_OBJECT = fields(
    {
        "scaleTargetRef": fields({"name": NAME}, {"apiVersion": TEXT, "kind": TEXT}),
        "triggers": many(
            fields(
                {"type": {"const": "prometheus"}, "metadata": TEXTS},
                {"name": NAME, "metricType": {"enum": ["AverageValue", "Value"]}},
            )
        ),
    },
    {
        "minReplicaCount": COUNT,
        "maxReplicaCount": COUNT,
        "pollingInterval": COUNT,
        "cooldownPeriod": COUNT,
        "fallback": fields(
            {"failureThreshold": COUNT, "replicas": COUNT},
            {"behavior": {"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]}},
        ),
        "advanced": fields(
            {},
            {
                "restoreToOriginalReplicaCount": {"type": "boolean"},
                "horizontalPodAutoscalerConfig": fields(
                    {"behavior": fields({}, {"scaleUp": SCALING, "scaleDown": SCALING})}
                ),
            },
        ),
    },
)
POD_MONITOR = fields(
    {
        "selector": SELECTOR,
        "podMetricsEndpoints": many(
            fields({"port": TEXT}, {"path": TEXT, "interval": DURATION, "scrapeTimeout": DURATION})
        ),
    }
)
RECORD = fields({"record": {"type": "string", "pattern": r"^[a-zA-Z_:][\w:]*$"}, "expr": TEXT}, {"labels": TEXTS})
ALERT = fields({"alert": TEXT, "expr": TEXT}, {"for": DURATION, "labels": TEXTS, "annotations": TEXTS})
PROMETHEUS_RULE = fields(
    {
        "groups": many(
            fields(
                {
                    "name": TEXT,
                    "rules": many({"if": {"required": ["record"]}, "then": RECORD, "else": ALERT}),
                },
                {"interval": DURATION},
            )
        )
    }
)
GRPC_ROUTE = fields(
    {
        "parentRefs": many(fields({"name": NAME}, {"namespace": NAME, "sectionName": NAME}), at_most=32),
        "rules": many(
            fields(
                {"backendRefs": many(fields({"name": NAME, "port": PORT}), at_most=16)},
                {"matches": many(fields({"method": fields({"service": TEXT}, {"method": TEXT})}), at_most=8)},
            ),
            at_most=16,
        ),
    },
    {"hostnames": many({"type": "string", "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}, at_most=16)},
)
SCHEMAS: dict[str, Schema] = {
    "ScaledObject": resource("keda.sh/v1alpha1", SCALED_OBJECT),
    "PodMonitor": resource("monitoring.coreos.com/v1", POD_MONITOR),
    "PrometheusRule": resource("monitoring.coreos.com/v1", PROMETHEUS_RULE),
    "GRPCRoute": resource("gateway.networking.k8s.io/v1", GRPC_ROUTE),
}
