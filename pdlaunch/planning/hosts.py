"""Describes the hosts of a launch: the local host, hosts with agents, and hosts by profile."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.config.hosts import LOCAL, HostSettings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES, Role
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
    """Return the hosts of a launch, the supervisor's own first. Raises ConfigError.

    ``machine``, ``environ``: of this host. ``joined``: hosts whose agents have joined, by name.
    Other hosts are described by the profile in their settings.
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
