"""Renders a launch as objects of Kubernetes, from a template.

What is secret leaves the settings: keys, and variables that look like one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from pydantic import SecretStr

from pdlaunch import __version__
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES, Role
from pdlaunch.config.settings import is_secret, variable_paths
from pdlaunch.errors import ConfigError
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import RoleEngines

HTTP_PORT = 8000
CONTROL_PORT = 7070
# Every machine has its own file of this name; agents and supervisor share no folder.
JOIN_FILE = "/run/pdlaunch/join"
# Host memory that a rank takes beside weights and KV cache: libraries, tokenizer, buffers.
PROCESS_BYTES = 1 << 30
ANY_ADDRESS = "0.0.0.0"
Machines = Mapping[Role, tuple[str, ...]]  # names of pods, one for each engine
_CHOSEN = ("placement", "hosts", "placement_strategy", "control_address", "join_file")


@dataclass(frozen=True, slots=True)
class PlacedSettings:
    """Holds what the supervisor's file says, and what it must not say."""

    settings: Mapping[str, Any]  # the content of the file
    keys: Mapping[str, str]  # API keys by the variable that gives them to the supervisor
    # Secret-looking variables of engines, by role and name
    engine_secrets: Mapping[Role, Mapping[str, str]] = field(default_factory=dict)

    def config(self) -> LaunchConfig:
        """Return the configuration that the supervisor reads from the file and its variables."""
        paths = variable_paths()
        return LaunchConfig.model_validate(
            {**self.settings, **{paths[name]: value for name, value in self.keys.items()}}
        )


def machine_names(config: LaunchConfig, base: str) -> Machines:
    """Name the machines of each role with engines: ``base-prefill-0`` and so on."""
    return {
        role: tuple(
            f"{base}{role}-{index}"
            for index in range(replicas * config.engine_settings(role).nnodes)
        )
        for role in ROLES
        if (replicas := config.role(role).replicas)
    }


def place(config: LaunchConfig, machines: Machines) -> PlacedSettings:
    """Return the settings of a deployment whose engines run on these machines.

    Raises ConfigError where the deployment says itself where its engines run.
    """
    given = config.model_dump(exclude_unset=True)
    for name in _CHOSEN:
        if name in given:
            raise ConfigError(
                "what is rendered says where engines run",
                field=name,
                fix=f"leave {name} out, or render another file",
            )
    settings: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    variables = {path: name for name, path in variable_paths().items()}
    keys = {}
    for name, value in given.items():
        if isinstance(value, SecretStr):
            keys[variables[name]] = value.get_secret_value()
            del settings[name]
    secrets = _take_secrets(settings)
    settings |= {
        "host": ANY_ADDRESS,
        "port": config.port or HTTP_PORT,
        "placement": "hosts",
        # One engine a machine: each has the devices of one.
        "placement_strategy": "spread",
        "control_port": config.control_port or CONTROL_PORT,
        "join_file": JOIN_FILE,
        "hosts": [
            {"name": name, "roles": role} for role, names in machines.items() for name in names
        ],
    }
    return PlacedSettings(settings, keys, secrets)


def _take_secrets(settings: dict[str, Any]) -> dict[Role, dict[str, str]]:
    """Move secret-looking variables of engines out of the settings."""
    found: dict[Role, dict[str, str]] = {role: {} for role in ROLES}
    for path, roles in (("env", ROLES), *((f"{role}.env", (role,)) for role in ROLES)):
        section = settings
        for name in path.split(".")[:-1]:
            section = section.get(name, {})
        environment = section.get("env", {})
        for name in [name for name in environment if is_secret(f"{path}.{name}")]:
            value = environment.pop(name)
            for role in roles:
                found[role][name] = value
    return found


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """Describes the machines of one role, each with one engine or a part of one (``nnodes``)."""

    role: Role
    names: tuple[str, ...]
    num_gpus: int
    num_cpus: int
    memory_bytes: int | None  # host memory of a machine; None: the model's shape is not known


def engine_groups(launch: ResolvedLaunch, machines: Machines) -> tuple[EngineGroup, ...]:
    """Return what the machines of each role need."""
    return tuple(_group(launch.roles[role], names) for role, names in machines.items())


def _group(engines: RoleEngines, names: tuple[str, ...]) -> EngineGroup:
    num_ranks, on_gpu = engines.settings.ranks_per_node, engines.device == "cuda"
    footprint = engines.footprint
    held = 0 if on_gpu or footprint is None else footprint.total_bytes
    rank_bytes = PROCESS_BYTES + engines.host_tier_bytes + held
    return EngineGroup(
        role=engines.role,
        names=names,
        num_gpus=num_ranks if on_gpu else 0,
        # A core for each rank of a GPU, and one for the engine's server.
        num_cpus=1 + num_ranks * (1 if on_gpu else engines.num_threads),
        memory_bytes=None if footprint is None else PROCESS_BYTES + num_ranks * rank_bytes,
    )


Object = dict[str, Any]

JOIN_KEY = "join"  # key of the Secret that holds what agents join with
SUPERVISOR_KEY = "supervisor"  # key of the Secret that holds the supervisor's side of it
PROBE_S = 5
# Ports that processes choose from by themselves; pods are told them, so policies can name them.
OWN_PORTS = (32768, 60999)
# Time beside the drain: the router ends what is left, processes stop, stragglers are killed.
GRACE_S = 20
_LLM_D_ROLES = {"prefill": "prefill", "decode": "decode", "both": "prefill-decode"}


@dataclass(frozen=True, slots=True)
class PodOptions:
    """Holds what a cluster needs to know beside the deployment's settings."""

    name: str
    image: str
    gpu_resource: str = "nvidia.com/gpu"
    rdma_resource: str | None = None  # extended resource of which each engine pod gets one
    # PersistentVolumeClaims by the folder at which they are mounted.
    claims: Mapping[str, str] | None = None
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

    def endpoint(self, host: str) -> str:
        """Return where agents find the supervisor."""
        return f"tcp://{host}:{self.resolved.config.control_port}"


def kubernetes_objects(launch: PodLaunch, namespace: str | None) -> list[Object]:
    """Return all objects but the Secret, in the order in which they are applied."""
    options, config = launch.options, launch.resolved.config
    # The names by which clients in the cluster call the Service.
    domains = [f".$(POD_NAMESPACE){end}" for end in ("", ".svc", ".svc.cluster.local")]
    own_hosts = [options.name, *(f"{options.name}{domain}" for domain in domains)]
    start_s = config.join_timeout_s + config.startup_timeout_s
    first, _, last = config.kv_transfer.data_ports.partition("-")
    opens = config.kv_transfer.connector_section.opens_data_ports
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    # Keeps the order of keys. YAML does not join the surrogates of JSON.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    text = environment.get_template("kubernetes.yaml.j2").render(
        options=options,
        config=config,
        namespace=namespace,
        config_yaml=launch.config_yaml,
        groups=launch.groups,
        roles=[group.role for group in launch.groups],
        keys=launch.placed.keys,
        engine_secrets=launch.placed.engine_secrets,
        claims=options.claims or {},
        secret_name=f"{options.name}-keys",
        cache_claim=options.cache_claim or f"{options.name}-cache",
        # A machine gets longer between SIGTERM and SIGKILL than a drain takes.
        grace_s=math.ceil(config.drain_timeout_s) + GRACE_S,
        probe_s=PROBE_S,
        start_s=math.ceil(start_s),
        start_failures=math.ceil(start_s / PROBE_S),
        own_ports=OWN_PORTS,
        data_ports=(first, last) if opens else (),
        fixed_ports={g.role: p for g in launch.groups if (p := config.role(g.role).ports())},
        allowed_hosts=",".join([*config.allowed_hosts, *own_hosts]),
        checksum=hashlib.sha256(launch.config_yaml.encode()).hexdigest(),
        serve_command=["pdlaunch", "serve", "/etc/pdlaunch/deployment.yaml"],
        agent_command=lambda group, name: _agent_command(launch, group, name),
        labels=lambda *args, **kwargs: _labels(launch, *args, **kwargs),
        resources=lambda group: _resources(options, group),
        with_own_secret=_with_own_secret,
    )
    return list(yaml.safe_load_all(text))


def kubernetes_secret(
    launch: PodLaunch, namespace: str | None, *, join: str, supervisor: str
) -> Object:
    """Return the Secret that the other objects refer to.

    ``join``: what agents join with; ``supervisor``: the supervisor's side of it.
    """
    values = {JOIN_KEY: join, SUPERVISOR_KEY: supervisor, **launch.placed.keys}
    for role, variables in launch.placed.engine_secrets.items():
        values |= {f"{role}.{name}": value for name, value in variables.items()}
    labels = _labels(launch, version=True, tool=True)
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{launch.options.name}-keys", "labels": labels}
        | ({} if namespace is None else {"namespace": namespace}),
        "type": "Opaque",
        "stringData": values,
    }


def _labels(
    launch: PodLaunch,
    component: str = "",
    *,
    version: bool = False,
    tool: bool = False,
) -> dict[str, str]:
    """Return labels of objects; those without ``version`` select this launch, or a part of it."""
    labels = {
        "app.kubernetes.io/name": "pdlaunch",
        "app.kubernetes.io/instance": launch.options.name,
    }
    if component:
        labels["app.kubernetes.io/component"] = component
    if version:
        labels["app.kubernetes.io/version"] = __version__
    if tool:
        labels["app.kubernetes.io/managed-by"] = "pdlaunch-render"
    if not tool and version and component in _LLM_D_ROLES:
        labels["llm-d.ai/role"] = _LLM_D_ROLES[component]
    return labels


def _agent_command(launch: PodLaunch, group: EngineGroup, name: str) -> list[str]:
    settings = launch.resolved.roles[group.role].settings
    allowed = [] if settings.engine == "native" else ["--allow-executable", settings.engine_command]
    return ["pdlaunch", "agent", "--join", JOIN_FILE, "--name", name, *allowed]


def _with_own_secret(key: str, command: Sequence[str]) -> list[str]:
    """Return the command, behind a copy of the mounted secret to a file of the user's own.

    Processes accept no file that others can read, and a supervisor that ends deletes its own.
    """
    file = JOIN_FILE if key == JOIN_KEY else f"{JOIN_FILE}.supervisor"
    script = f'install -m 0600 /run/secrets/{key} {file} && exec "$@"'
    return ["sh", "-c", script, "sh", *command]


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
