"""Describes the hosts of a launch, and its processes before they start."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import msgspec

from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.config.hosts import LOCAL, HostSettings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES, Role
from pdlaunch.config.settings import SECRET, is_secret
from pdlaunch.machine.facts import Fact, Machine
from pdlaunch.machine.host import EngineCommand
from pdlaunch.machine.network import default_address
from pdlaunch.machine.profiles import find_machine

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedHost:
    """Describes a host of a launch. The first one of a launch is the supervisor's own."""

    name: str
    machine: Machine
    environ: Mapping[str, str]  # the environment that processes on the host inherit
    bind_address: str = ENGINE_HOST  # processes on the host listen on this address
    advertise_address: str = ENGINE_HOST  # processes on other hosts connect to this address
    # Roles of engines that may run on the host; empty: only the router runs there
    roles: frozenset[Role] = frozenset(ROLES)
    # Engine executables that the host's agent allows, by name; None without an agent
    executables: Mapping[str, EngineCommand] | None = None


def is_same_machine(one: ResolvedHost, other: ResolvedHost) -> bool:
    """Return True if two hosts of a launch have the same address: two agents on one machine."""
    return bool(one.advertise_address) and one.advertise_address == other.advertise_address


def one_host(
    machines: Mapping[str, Machine], environ: Mapping[str, str]
) -> tuple[ResolvedHost, ...]:
    """Return machines as hosts that share the supervisor's environment and listen on loopback."""
    return tuple(ResolvedHost(name, machine, environ) for name, machine in machines.items())


def count_ranks(config: LaunchConfig) -> int:
    """Return the number of ranks of all engines."""
    return sum(
        config.role(role).replicas * config.engine_settings(role).ranks_of_copy for role in ROLES
    )


def planned_hosts(
    config: LaunchConfig,
    machine: Machine,
    environ: Mapping[str, str],
    joined: Mapping[str, ResolvedHost] | None = None,
) -> tuple[ResolvedHost, ...]:
    """Return the hosts of a launch, the supervisor's own first: ``machine``, ``environ``. A host
    that is not in ``joined`` is described by the profile in its settings. Raises ConfigError.
    """
    if config.placement == "local":
        return one_host({LOCAL: machine}, environ)
    listed = {host.name: host for host in config.hosts}
    own = listed.get(LOCAL)
    # Agents on other hosts connect to this address.
    address = config.control_address or default_address() or ""
    here = ResolvedHost(LOCAL, machine, environ, address, address, frozenset())
    hosts = [here if own is None else settled(own, here)]
    for name, settings in listed.items():
        if name != LOCAL:
            known = (joined or {}).get(name) or _not_joined(settings, config, environ)
            hosts.append(settled(settings, known))
    return tuple(hosts)


def settled(settings: HostSettings, known: ResolvedHost) -> ResolvedHost:
    """Return the host ``known``, changed where ``settings`` has values."""
    bind = settings.bind_address
    return replace(
        known,
        name=settings.name,
        bind_address=bind or known.bind_address,
        advertise_address=settings.advertise_address or bind or known.advertise_address,
        roles=frozenset(ROLES if settings.roles is None else settings.roles),
    )


def _not_joined(
    settings: HostSettings, config: LaunchConfig, environ: Mapping[str, str]
) -> ResolvedHost:
    if settings.machine is None:
        reason = f"{settings.name} has not joined, and its entry in hosts has no machine"
        unknown: dict[Fact, str] = dict.fromkeys(get_args(Fact), reason)
        return ResolvedHost(settings.name, Machine(unknown=unknown), environ, "", "")
    found = find_machine(settings.machine, count_ranks(config), "hosts.machine")
    return ResolvedHost(settings.name, found.machine, environ, "", "")


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Describes one planned process; a running process is a ``state.Instance`` of the spec."""

    # ``router``, ``prefill-0`` (the engine's server) or ``prefill-0/rank-0``; kept over restarts
    name: str
    kind: Literal["router", "server", "rank"]
    unit: str  # processes of a unit start, die and restart together and share an incarnation
    engine: str = ""
    role: Role | None = None
    tp_rank: int = 0
    tp_size: int = 1
    host: str = LOCAL
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # variables that override the supervisor's environment
    ports: dict[str, int] = {}  # 0: the process takes a free port and registers it
    devices: tuple[str, ...] = ()  # ``cpu`` or ``cuda:N``
    num_threads: int = 1
    # Names of engines with which this engine exchanges KV blocks; None: all of the other role
    peers: tuple[str, ...] | None = None

    @property
    def reads(self) -> str:
        """Return the kind of the processes that read the same model files as this process."""
        # All hosts of an engine of vLLM read the files that its server reads.
        return "server" if self.unit == self.engine else self.kind


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Lists all processes that a launch starts."""

    processes: tuple[ProcessSpec, ...]

    def shown(self) -> Self:
        """Return the plan for printing: values of variables named like a secret are masked."""
        masked = (mask_environment(process.environment) for process in self.processes)
        pairs = zip(self.processes, masked, strict=True)
        shown = [msgspec.structs.replace(process, environment=env) for process, env in pairs]
        return msgspec.structs.replace(self, processes=tuple(shown))

    def engines(self, role: Role) -> list[str]:
        return list(dict.fromkeys(p.engine for p in self.processes if p.role == role))


def mask_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Mask the values of variables named like a secret."""
    return {name: SECRET if is_secret(f"env.{name}") else it for name, it in environment.items()}
