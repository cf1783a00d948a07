"""Renders the objects of a launch on Kubernetes."""

from __future__ import annotations

from collections.abc import Sequence

from pdlaunch import __version__
from pdlaunch.config.roles import ROLES
from pdlaunch.launch.render.pods import (
    CONFIG_FILE,
    EPHEMERAL_PORTS,
    JOIN_KEY,
    SUPERVISOR_KEY,
    Object,
    PodLaunch,
    engine_pod,
    router_pod,
    secret_key,
)
from pdlaunch.launch.render.settings import EngineGroup


def kubernetes_objects(launch: PodLaunch, namespace: str | None) -> list[Object]:
    """Return all objects but the Secret, in the order in which they are applied."""
    objects = [
        _config_map(launch),
        *([] if launch.options.cache_claim else [_cache(launch)]),
        *_policies(launch),
        *_services(launch),
        *(_engines(launch, group) for group in launch.groups),
        _router(launch),
        *(_disruption_budget(launch, group) for group in launch.groups),
    ]
    return [_in_namespace(found, namespace) for found in objects]


def control_endpoint(launch: PodLaunch) -> str:
    """Return where agents find the supervisor."""
    return f"tcp://{launch.options.name}-control:{launch.resolved.config.control_port}"


def kubernetes_secret(
    launch: PodLaunch, namespace: str | None, *, join: str, supervisor: str
) -> Object:
    """Return the Secret that the other objects refer to.

    ``join``: what agents join with; ``supervisor``: the supervisor's side of it.
    """
    values = {JOIN_KEY: join, SUPERVISOR_KEY: supervisor}
    values |= {secret_key(name): key for name, key in launch.placed.keys.items()}
    for role, variables in launch.placed.engine_secrets.items():
        values |= {secret_key(name, role): value for name, value in variables.items()}
    found = _object(launch, "v1", "Secret", launch.secret) | {
        "type": "Opaque",
        "stringData": values,
    }
    return _in_namespace(found, namespace)


def _in_namespace(found: Object, namespace: str | None) -> Object:
    if namespace is not None:
        found["metadata"]["namespace"] = namespace
    return found


def _object(launch: PodLaunch, version: str, kind: str, name: str, component: str = "") -> Object:
    labels = launch.labels(component) | {
        "app.kubernetes.io/version": __version__,
        "app.kubernetes.io/managed-by": "pdlaunch-render",
    }
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "labels": labels},
    }


def _config_map(launch: PodLaunch) -> Object:
    name = f"{launch.options.name}-config"
    file = CONFIG_FILE.rpartition("/")[2]
    return _object(launch, "v1", "ConfigMap", name) | {"data": {file: launch.config_yaml}}


def _cache(launch: PodLaunch) -> Object:
    """Return the claim of a volume that all pods write to: engines read what was downloaded and
    converted for the supervisor.
    """
    return _object(launch, "v1", "PersistentVolumeClaim", launch.cache_claim) | {
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": launch.options.cache_size}},
        }
    }


def _router(launch: PodLaunch) -> Object:
    found = _object(launch, "apps/v1", "Deployment", launch.options.name, "router")
    return found | {
        "spec": {
            "replicas": 1,
            # Never two supervisors of one launch.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": launch.labels("router")},
            "template": router_pod(launch),
        }
    }


def _engines(launch: PodLaunch, group: EngineGroup) -> Object:
    name, pod = f"{launch.options.name}-{group.role}", engine_pod(launch, group)
    found = _object(launch, "apps/v1", "StatefulSet", name, group.role)
    return found | {
        "spec": {
            "replicas": group.num_engines,
            "serviceName": f"{launch.options.name}-engines",
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": launch.labels(group.role)},
            "template": pod,
        }
    }


def _services(launch: PodLaunch) -> list[Object]:
    name = launch.options.name
    http = {"name": "http", "port": launch.resolved.config.port, "targetPort": "http"}
    control = {
        "name": "control",
        "port": launch.resolved.config.control_port,
        "targetPort": "control",
    }
    headless = {
        "clusterIP": "None",
        # Agents join before the launch is ready.
        "publishNotReadyAddresses": True,
    }
    return [
        _object(launch, "v1", "Service", name, "router")
        | {"spec": {"selector": launch.labels("router"), "ports": [http]}},
        _object(launch, "v1", "Service", f"{name}-control", "router")
        | {"spec": {**headless, "selector": launch.labels("router"), "ports": [control]}},
        # Gives the pods of engines names; nobody connects through it.
        _object(launch, "v1", "Service", f"{name}-engines")
        | {"spec": {**headless, "selector": launch.labels()}},
    ]


def _policies(launch: PodLaunch) -> list[Object]:
    """Return who may connect where; everything else is closed to other pods."""
    config, roles = launch.resolved.config, [group.role for group in launch.groups]
    router, engines = _pods(launch, ["router"]), _pods(launch, roles)
    chosen: Object = {"port": EPHEMERAL_PORTS[0], "endPort": EPHEMERAL_PORTS[1]}
    first, _, last = config.kv_transfer.data_ports.partition("-")
    found = [
        _policy(launch, "http", router, None, [{"port": config.port}]),
        _policy(launch, "control", router, engines, [{"port": config.control_port}]),
        # HTTP of engines, which the launch's token opens.
        _policy(launch, "engines", engines, router, [chosen]),
        # Side channels and tensor parallelism, which the launch's keys open.
        _policy(launch, "ranks", engines, engines, [chosen]),
    ]
    if config.kv_transfer.carrier_settings.opens_data_ports:
        # NIXL and Mooncake ask nobody who he is: this rule is all that keeps strangers away.
        data = {"port": int(first), "endPort": int(last)}
        found.append(_policy(launch, "kv", engines, engines, [data]))
    for role in ROLES:
        ports = config.role(role).ports()
        if ports:
            # Another router may use them with engine_api_key.
            fixed = {"port": ports[0], "endPort": ports[-1]}
            found.append(_policy(launch, f"{role}-http", _pods(launch, [role]), None, [fixed]))
    return found


def _policy(
    launch: PodLaunch, name: str, to: Object, sender: Object | None, ports: Sequence[Object]
) -> Object:
    rule: Object = {"ports": [{"protocol": "TCP", **port} for port in ports]}
    if sender is not None:
        rule = {"from": [{"podSelector": sender}], **rule}
    found = _object(
        launch, "networking.k8s.io/v1", "NetworkPolicy", f"{launch.options.name}-{name}"
    )
    return found | {"spec": {"podSelector": to, "policyTypes": ["Ingress"], "ingress": [rule]}}


def _pods(launch: PodLaunch, components: Sequence[str]) -> Object:
    return {
        "matchLabels": launch.labels(),
        "matchExpressions": [
            {
                "key": "app.kubernetes.io/component",
                "operator": "In",
                "values": list(components),
            }
        ],
    }


def _disruption_budget(launch: PodLaunch, group: EngineGroup) -> Object:
    """Return the budget of a role: a drain of nodes takes one engine at a time."""
    found = _object(
        launch,
        "policy/v1",
        "PodDisruptionBudget",
        f"{launch.options.name}-{group.role}",
        group.role,
    )
    selector = {"matchLabels": launch.labels(group.role)}
    return found | {"spec": {"maxUnavailable": 1, "selector": selector}}
