"""Describes the pods of a launch: one with supervisor and router, and those of engines."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdlaunch import __version__
from pdlaunch.config.roles import Role
from pdlaunch.launch.render.settings import JOIN_FILE, EngineGroup, PlacedSettings, grace_s
from pdlaunch.planning.resolve import ResolvedLaunch

Object = dict[str, Any]

CONFIG_FILE = "/etc/pdlaunch/deployment.yaml"
JOIN_KEY = "join"  # key of the Secret that holds what agents join with
SUPERVISOR_KEY = "supervisor"  # key of the Secret that holds the supervisor's side of it
SECRETS = "/run/secrets"
SUPERVISOR_FILE = f"{JOIN_FILE}.supervisor"
HEALTH = "/health"  # route of the router: 200 once every process and every pair of engines is ready
EPHEMERAL_PORTS = (32768, 60999)
"""Ports that processes choose from by themselves; pods are told them, so policies can name them."""
USER = 1000  # user of the image
PROBE_S = 5
_ROLE_LABELS: Mapping[Role, str] = {
    "prefill": "prefill",
    "decode": "decode",
    "both": "prefill-decode",
}


@dataclass(frozen=True, slots=True)
class PodOptions:
    """Holds what a cluster needs to know beside the deployment's settings."""

    name: str
    image: str
    gpu_resource: str = "nvidia.com/gpu"
    rdma_resource: str | None = None  # extended resource of which each engine pod gets one
    claims: Mapping[str, str] | None = None
    """PersistentVolumeClaims by the folder at which all pods mount them."""
    cache_claim: str | None = None  # a claim for ``/cache`` that exists; None: one is rendered
    cache_size: str = "20Gi"


@dataclass(frozen=True, slots=True)
class PodLaunch:
    """Holds a launch that is to run on pods."""

    options: PodOptions
    placed: PlacedSettings
    resolved: ResolvedLaunch
    groups: Sequence[EngineGroup]
    config_yaml: str

    @property
    def cache_claim(self) -> str:
        """Return the claim of the folder in which the supervisor leaves models for all pods."""
        return self.options.cache_claim or f"{self.options.name}-cache"

    @property
    def secret(self) -> str:
        """Return the name of the Secret that pods refer to."""
        return f"{self.options.name}-keys"

    def labels(self, component: str = "") -> dict[str, str]:
        """Return the labels by which objects of this launch, or of a part of it, are selected."""
        labels = {
            "app.kubernetes.io/name": "pdlaunch",
            "app.kubernetes.io/instance": self.options.name,
        }
        return labels | ({"app.kubernetes.io/component": component} if component else {})


def router_pod(launch: PodLaunch) -> Object:
    """Return the template of the pod with supervisor and router."""
    config = launch.resolved.config
    service = launch.options.name
    names = [service, *(f"{service}.$(POD_NAMESPACE){end}" for end in ("", ".svc"))]
    names.append(f"{service}.$(POD_NAMESPACE).svc.cluster.local")
    environment = [
        _field("POD_IP", "status.podIP"),
        _field("POD_NAMESPACE", "metadata.namespace"),
        {"name": "PDLAUNCH_CONTROL_ADDRESS", "value": "$(POD_IP)"},
        # The names by which clients in the cluster call the Service.
        {"name": "PDLAUNCH_ALLOWED_HOSTS", "value": ",".join([*config.allowed_hosts, *names])},
        *(_secret_variable(launch.secret, name) for name in launch.placed.keys),
    ]
    startup_s = config.join_timeout_s + config.startup_timeout_s
    container = {
        "name": "pdlaunch",
        "image": launch.options.image,
        # --resume: the keys are those of the Secret, so that agents find a new supervisor, too.
        "command": with_own_secret(
            SUPERVISOR_KEY, SUPERVISOR_FILE, ["pdlaunch", "serve", CONFIG_FILE, "--resume"]
        ),
        "env": [*_cache_variables(), *environment],
        "ports": [
            {"name": "http", "containerPort": config.port},
            {"name": "control", "containerPort": config.control_port},
        ],
        # No liveness probe: the supervisor restarts what hangs, and ends when it cannot go on. A
        # probe would end the whole launch for one slow process.
        "startupProbe": _probe(failures=math.ceil(startup_s / PROBE_S)),
        "readinessProbe": _probe(failures=2),
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": _container_security(),
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_FILE.rpartition("/")[0], "readOnly": True},
            *_mounts(launch),
        ],
    }
    pod = _pod(launch, container, SUPERVISOR_KEY)
    pod["volumes"].insert(0, {"name": "config", "configMap": {"name": f"{service}-config"}})
    checksum = hashlib.sha256(launch.config_yaml.encode()).hexdigest()
    return {
        "metadata": {
            "labels": _pod_labels(launch, "router"),
            # A changed configuration starts the launch anew.
            "annotations": {"checksum/config": checksum},
        },
        "spec": pod,
    }


def engine_pod(launch: PodLaunch, group: EngineGroup) -> Object:
    """Return the template of the pods of one role, each of which runs an agent."""
    secrets = launch.placed.engine_secrets.get(group.role, {})
    container = {
        "name": "pdlaunch",
        "image": launch.options.image,
        "command": with_own_secret(
            JOIN_KEY, JOIN_FILE, agent_command(launch, group, "$(POD_NAME)")
        ),
        "env": [
            *_cache_variables(),
            _field("POD_NAME", "metadata.name"),
            *(_secret_variable(launch.secret, name, group.role) for name in secrets),
        ],
        "resources": _resources(launch.options, group),
        "securityContext": _container_security(locks_memory=bool(launch.options.rdma_resource)),
        "volumeMounts": [*_mounts(launch), {"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = _pod(launch, container, JOIN_KEY)
    pod["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    labels = _pod_labels(launch, group.role) | {"llm-d.ai/role": _ROLE_LABELS[group.role]}
    return {"metadata": {"labels": labels}, "spec": pod}


def agent_command(launch: PodLaunch, group: EngineGroup, name: str) -> list[str]:
    """Return the command of the agent of that name."""
    settings = launch.resolved.roles[group.role].settings
    executables = [] if settings.engine == "native" else [settings.engine_command]
    allowed = [word for each in executables for word in ("--allow-executable", each)]
    return ["pdlaunch", "agent", "--join", JOIN_FILE, "--name", name, *allowed]


def with_own_secret(key: str, file: str, command: Sequence[str], words: str = "$@") -> list[str]:
    """Return the command, behind a copy of the mounted secret to a file of the user's own.

    Processes accept no file that others can read, and a supervisor that ends deletes its own.
    """
    return ["sh", "-c", f'install -m 0600 {SECRETS}/{key} {file} && exec "{words}"', "sh", *command]


def secret_key(name: str, role: Role | None = None) -> str:
    """Return the key of the Secret that holds a variable."""
    return name if role is None else f"{role}.{name}"


def _pod_labels(launch: PodLaunch, component: str) -> dict[str, str]:
    return launch.labels(component) | {"app.kubernetes.io/version": __version__}


def _pod(launch: PodLaunch, container: Object, key: str) -> Object:
    """Return a pod that has a key of the Secret."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_s(launch.resolved),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
            "sysctls": [
                {
                    "name": "net.ipv4.ip_local_port_range",
                    "value": " ".join(map(str, EPHEMERAL_PORTS)),
                }
            ],
        },
        "containers": [container],
        "volumes": [
            {
                "name": "keys",
                "secret": {
                    "secretName": launch.secret,
                    # The kubelet gives the file to root and the pod's group.
                    "defaultMode": 0o440,
                    "items": [{"key": key, "path": key}],
                },
            },
            {"name": "join", "emptyDir": {"medium": "Memory"}},
            {"name": "cache", "persistentVolumeClaim": {"claimName": launch.cache_claim}},
            {"name": "tmp", "emptyDir": {}},
            *(
                {"name": _volume(claim), "persistentVolumeClaim": {"claimName": claim}}
                for claim in (launch.options.claims or {}).values()
            ),
        ],
    }


def _mounts(launch: PodLaunch) -> list[Object]:
    return [
        {"name": "keys", "mountPath": SECRETS, "readOnly": True},
        {"name": "join", "mountPath": JOIN_FILE.rpartition("/")[0]},
        {"name": "cache", "mountPath": "/cache"},
        {"name": "tmp", "mountPath": "/tmp"},
        *(
            {"name": _volume(claim), "mountPath": folder}
            for folder, claim in (launch.options.claims or {}).items()
        ),
    ]


def _volume(claim: str) -> str:
    return f"claim-{claim}"


def _cache_variables() -> list[Object]:
    """Return the variables of folders: the image itself is read-only."""
    return [
        {"name": "HOME", "value": "/tmp"},
        {"name": "PDLAUNCH_CACHE", "value": "/cache/pdlaunch"},
        {"name": "HF_HOME", "value": "/cache/huggingface"},
    ]


def _field(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _secret_variable(secret: str, name: str, role: Role | None = None) -> Object:
    reference = {"name": secret, "key": secret_key(name, role)}
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def _probe(*, failures: int) -> Object:
    return {
        "httpGet": {"path": HEALTH, "port": "http"},
        "periodSeconds": PROBE_S,
        "timeoutSeconds": PROBE_S,
        "failureThreshold": failures,
    }


def _container_security(*, locks_memory: bool = False) -> Object:
    capabilities: Object = {"drop": ["ALL"]}
    if locks_memory:
        # RDMA registers memory, which is then locked.
        capabilities["add"] = ["IPC_LOCK"]
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": capabilities,
    }


def _resources(options: PodOptions, group: EngineGroup) -> Object:
    requests: Object = {"cpu": str(group.num_cpus)}
    if group.memory_bytes is not None:
        requests["memory"] = f"{math.ceil(group.memory_bytes / (1 << 20))}Mi"
    extended = {}
    if group.num_gpus:
        extended[options.gpu_resource] = str(group.num_gpus)
    if options.rdma_resource is not None:
        extended[options.rdma_resource] = "1"
    # Of extended resources request and limit are equal.
    return {"requests": requests | extended} | ({"limits": extended} if extended else {})
