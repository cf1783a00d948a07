"""Renders a launch as Kubernetes objects, from a template.

Secrets are moved from the settings to a Secret: API keys, and variables that look like secrets.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import yaml
from pydantic import SecretStr

from pdlaunch import __version__
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES, Role
from pdlaunch.config.settings import is_secret, variable_paths
from pdlaunch.errors import ConfigError
from pdlaunch.launch.hosts.join import new_join_keys
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import RoleEngines

HTTP_PORT = 8000
CONTROL_PORT = 7070
# Path of the join file in every pod; agents and supervisor do not share the folder.
JOIN_FILE = "/run/pdlaunch/join"
# Host memory of a rank besides weights and KV cache: libraries, tokenizer, buffers.
PROCESS_BYTES = 1 << 30
ANY_ADDRESS = "0.0.0.0"
Machines = Mapping[Role, tuple[str, ...]]  # names of pods: one for each host of each engine
_CHOSEN = ("placement", "hosts", "placement_strategy", "control_address", "join_file")


@dataclass(frozen=True, slots=True)
class PlacedSettings:
    """Holds the settings for the supervisor's file, and the secrets that the file must not have."""

    settings: Mapping[str, Any]  # the content of the file
    keys: Mapping[str, str]  # API keys by the environment variable that sets them
    # Variables of engines that look like secrets, by role and name
    engine_secrets: Mapping[Role, Mapping[str, str]]

    def config(self) -> LaunchConfig:
        paths = variable_paths()
        return LaunchConfig.model_validate(
            {**self.settings, **{paths[name]: value for name, value in self.keys.items()}}
        )


@dataclass(frozen=True, slots=True)
class PodOptions:
    """Holds the options for the cluster that are not settings of the deployment."""

    name: str
    image: str
    gpu_resource: str
    rdma_resource: str | None  # extended resource; each engine pod requests one
    # PersistentVolumeClaims by mount folder.
    claims: Mapping[str, str]
    cache_claim: str | None  # an existing claim for ``/cache``; None: render a claim
    cache_size: str
    leader_worker_set: bool  # for engines over several hosts
    # Node label; each such engine alone gets the nodes with one value, such as one rack.
    exclusive_topology: str

    def group_size(self, nnodes: int) -> int:
        """Return the number of pods in a group of a LeaderWorkerSet; 1: in a StatefulSet."""
        return nnodes if self.leader_worker_set or self.exclusive_topology else 1


def machine_names(options: PodOptions, config: LaunchConfig) -> Machines:
    """Return the names of pods for each role with engines, the hosts of an engine side by side.

    ::

        StatefulSet        NAME-prefill-0  NAME-prefill-1    NAME-prefill-2  NAME-prefill-3
        LeaderWorkerSet    NAME-prefill-0  NAME-prefill-0-1  NAME-prefill-1  NAME-prefill-1-1
    """
    names: dict[Role, tuple[str, ...]] = {}
    for role in ROLES:
        if replicas := config.role(role).replicas:
            nnodes = config.engine_settings(role).nnodes
            size = options.group_size(nnodes)
            names[role] = tuple(
                f"{options.name}-{role}-{group}" + (f"-{worker}" if worker else "")
                for group in range(replicas * nnodes // size)
                for worker in range(size)
            )
    return names


def place(config: LaunchConfig, machines: Machines) -> PlacedSettings:
    """Return the settings of a deployment on these machines. Raises ConfigError."""
    given = config.model_dump(exclude_unset=True)
    for name in _CHOSEN:
        if name in given:
            raise ConfigError(
                "the rendered files decide where engines run",
                field=name,
                fix=f"remove {name} from the configuration",
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
        # One engine (or one part with ``nnodes``) per machine, which has just its GPUs.
        "placement_strategy": "spread",
        "control_port": config.control_port or CONTROL_PORT,
        "join_file": JOIN_FILE,
        "hosts": [
            {"name": name, "roles": role} for role, names in machines.items() for name in names
        ],
    }
    return PlacedSettings(settings, keys, secrets)


def _take_secrets(settings: dict[str, Any]) -> dict[Role, dict[str, str]]:
    """Remove variables of engines that look like secrets from the settings; return them."""
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


Object = dict[str, Any]

JOIN_KEY = "join"  # key in the Secret for the join file of agents
SUPERVISOR_KEY = "supervisor"  # key in the Secret for the supervisor's join keys
PROBE_S = 5
# Port range for free ports, set in pods by a sysctl, so that network policies can name it.
OWN_PORTS = (32768, 60999)
# Time besides the drain: the router ends requests, processes stop, late ones are killed.
GRACE_S = 20
_LLM_D_ROLES = {"prefill": "prefill", "decode": "decode", "both": "prefill-decode"}


@dataclass(frozen=True, slots=True)
class PodLaunch:
    options: PodOptions
    placed: PlacedSettings
    resolved: ResolvedLaunch
    machines: Machines
    config_yaml: str


def kubernetes_objects(launch: PodLaunch, namespace: str | None) -> list[Object]:
    """Return all objects but the Secret, in the order in which they are applied."""
    options, config = launch.options, launch.resolved.config
    # Names of the Service, which clients in the cluster send as Host.
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
    # Without ``sort_keys``. ASCII JSON has surrogate pairs, which YAML does not join.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    text = environment.get_template("kubernetes.yaml.j2").render(
        options=options,
        config=config,
        namespace=namespace,
        launch=launch,
        roles=list(launch.machines),
        secret_name=f"{options.name}-keys",
        cache_claim=options.cache_claim or f"{options.name}-cache",
        # Time between SIGTERM and SIGKILL, longer than a drain.
        grace_s=math.ceil(config.drain_timeout_s) + GRACE_S,
        probe_s=PROBE_S,
        start_s=math.ceil(start_s),
        start_failures=math.ceil(start_s / PROBE_S),
        own_ports=OWN_PORTS,
        data_ports=(first, last) if opens else (),
        fixed_ports={role: p for role in launch.machines if (p := config.role(role).ports())},
        allowed_hosts=",".join([*config.allowed_hosts, *own_hosts]),
        checksum=hashlib.sha256(launch.config_yaml.encode()).hexdigest(),
        serve_command=["pdlaunch", "serve", "/etc/pdlaunch/deployment.yaml"],
        agent_command=_agent_command,
        labels=partial(_labels, options.name),
        resources=partial(_resources, options),
        with_own_secret=_with_own_secret,
    )
    return list(yaml.safe_load_all(text))


def kubernetes_secret(launch: PodLaunch, namespace: str | None) -> Object:
    """Return the Secret that the other objects refer to, with both join files, of new keys."""
    name, port = launch.options.name, launch.resolved.config.control_port
    keys = new_join_keys(port)
    files = {JOIN_KEY: keys.ticket(f"tcp://{name}-control:{port}"), SUPERVISOR_KEY: keys}
    values = {key: msgspec.json.encode(file).decode() + "\n" for key, file in files.items()}
    values |= launch.placed.keys
    for role, variables in launch.placed.engine_secrets.items():
        values |= {f"{role}.{name}": value for name, value in variables.items()}
    labels = _labels(name, version=True, tool=True)
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{name}-keys", "labels": labels}
        | ({} if namespace is None else {"namespace": namespace}),
        "type": "Opaque",
        "stringData": values,
    }


def _labels(
    name: str, component: str = "", *, version: bool = False, tool: bool = False
) -> dict[str, str]:
    """Return labels of objects; without ``version``, labels that select a launch or component."""
    labels = {"app.kubernetes.io/name": "pdlaunch", "app.kubernetes.io/instance": name}
    if component:
        labels["app.kubernetes.io/component"] = component
    if version:
        labels["app.kubernetes.io/version"] = __version__
    if tool:
        labels["app.kubernetes.io/managed-by"] = "pdlaunch-render"
    if not tool and version and component in _LLM_D_ROLES:
        labels["llm-d.ai/role"] = _LLM_D_ROLES[component]
    return labels


def _agent_command(engines: RoleEngines) -> list[str]:
    command = engines.settings.engine_command
    allowed = [] if engines.is_native else ["--allow-executable", command]
    return ["pdlaunch", "agent", "--join", JOIN_FILE, "--name", "$(POD_NAME)", *allowed]


def _with_own_secret(key: str, command: Sequence[str]) -> list[str]:
    """Return a shell command that copies a mounted secret to a file with mode 0600, then runs
    ``command``. Processes refuse files that others can read, and a supervisor deletes its file.
    """
    file = JOIN_FILE if key == JOIN_KEY else f"{JOIN_FILE}.supervisor"
    script = f'install -m 0600 /run/secrets/{key} {file} && exec "$@"'
    return ["sh", "-c", script, "sh", *command]


def _resources(options: PodOptions, engines: RoleEngines) -> Object:
    """Return the resources of a pod with one engine, or with one of its ``nnodes`` parts."""
    num_ranks, on_gpu = engines.settings.ranks_per_node, engines.device == "cuda"
    # One core for each rank on a GPU (else its threads), and one for the engine's server.
    requests: Object = {"cpu": str(1 + num_ranks * (1 if on_gpu else engines.num_threads))}
    if (footprint := engines.footprint) is not None:
        held = 0 if on_gpu else footprint.total_bytes
        rank_bytes = PROCESS_BYTES + engines.host_tier_bytes + held
        num_bytes = PROCESS_BYTES + num_ranks * rank_bytes
        requests["memory"] = f"{math.ceil(num_bytes / (1 << 20))}Mi"
    extended = {options.gpu_resource: str(num_ranks)} if on_gpu else {}
    if options.rdma_resource is not None:
        extended[options.rdma_resource] = "1"
    # Kubernetes requires equal requests and limits for extended resources.
    return {"requests": requests | extended} | ({"limits": extended} if extended else {})
