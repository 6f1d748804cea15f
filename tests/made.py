"""Serve's own account of applications, made by hand for tests without a cluster."""

from __future__ import annotations

from typing import Any

from ray.serve.schema import (
    APIType,
    ApplicationDetails,
    ApplicationStatus,
    DeploymentDetails,
    ReplicaDetails,
)


def replica(name: str, state: str = "RUNNING", node: str | None = "n", **keys: Any) -> Any:
    fields = {"actor_id": f"actor-{name}", "start_time_s": 1.0, "pid": 7, **keys}
    actor = f"SERVE_REPLICA::a#D#{name}"
    return ReplicaDetails.model_validate(
        {"replica_id": name, "state": state, "node_id": node, "actor_name": actor, **fields}
    )


def deployment(name: str, *replicas: Any, status: str = "HEALTHY", **keys: Any) -> Any:
    return DeploymentDetails.model_construct(
        name=name,
        status=status,
        message=keys.pop("message", ""),
        target_num_replicas=keys.pop("target", len(replicas)),
        replicas=list(replicas),
        recent_dead_replicas=keys.pop("dead", []),
        required_resources={},
        **keys,
    )


def details(name: str, status: str = "RUNNING", *deployments: Any, **keys: Any) -> Any:
    return ApplicationDetails.model_construct(
        name=name,
        status=ApplicationStatus(status),
        message=keys.pop("message", ""),
        route_prefix=keys.pop("route", f"/{name}"),
        source=APIType(keys.pop("source", "imperative")),
        deployments={item.name: item for item in deployments},
        external_scaler_enabled=False,
        **keys,
    )
