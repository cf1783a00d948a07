"""Turns the settings of a deployment into those of the same one on pods or containers.

What is secret leaves the settings: keys, and variables that look like one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import SecretStr

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
    engine_secrets: Mapping[Role, Mapping[str, str]] = field(default_factory=dict)
    """Secret-looking variables of engines, by role and name."""

    def config(self) -> LaunchConfig:
        """Return the configuration that the supervisor reads from the file and its variables."""
        paths = variable_paths()
        return LaunchConfig.model_validate(
            {**self.settings, **{paths[name]: value for name, value in self.keys.items()}}
        )


def machine_names(config: LaunchConfig, base: str) -> Machines:
    """Name the machines of each role with engines: ``base-prefill-0`` and so on."""
    return {
        role: tuple(f"{base}{role}-{index}" for index in range(replicas))
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
    """Describes the machines of one role, each with one engine."""

    role: Role
    names: tuple[str, ...]
    num_gpus: int
    num_cpus: int
    memory_bytes: int | None  # host memory of a machine; None: the model's shape is not known


def engine_groups(launch: ResolvedLaunch, machines: Machines) -> tuple[EngineGroup, ...]:
    """Return what the machines of each role need."""
    return tuple(_group(launch.roles[role], names) for role, names in machines.items())


def _group(engines: RoleEngines, names: tuple[str, ...]) -> EngineGroup:
    num_ranks, on_gpu, footprint = engines.tp_size, engines.device == "cuda", engines.footprint
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
