"""Decides which host each engine runs on, and describes hosts as values.

Engines are placed in turn: ``prefill-0``, ``decode-0``, ``prefill-1`` and so on, so that the two
sides of a pair find room beside each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.config.hosts import LOCAL, HostSettings, PlacementStrategy
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.errors import ConfigError
from pdlaunch.machine.engine_commands import EngineCommand
from pdlaunch.machine.facts import Fact, Machine
from pdlaunch.machine.machine_file import AssumedMachine, read_machine_file
from pdlaunch.machine.network import default_address
from pdlaunch.machine.profiles import PROFILES, find_profile

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedHost:
    """Describes a host of a launch. The first one of a launch is the supervisor's own."""

    name: str
    machine: Machine
    environ: Mapping[str, str]  # the environment that processes inherit there
    bind_address: str = ENGINE_HOST  # its processes listen here
    advertise_address: str = ENGINE_HOST  # processes on other hosts are told to connect here
    roles: frozenset[Role] = frozenset(ROLES)
    """It takes engines of these roles; empty: only the router runs here."""
    domain: str = ""  # hosts of one name share NVLink or RDMA; empty: not known
    executables: Mapping[str, EngineCommand] | None = None
    """Those that its agent allows, by name; None: no agent has told, as on the first host."""


def is_same_machine(one: ResolvedHost, other: ResolvedHost) -> bool:
    """Tell whether two hosts of a launch are one machine, as two agents on it are."""
    return bool(one.advertise_address) and one.advertise_address == other.advertise_address


@dataclass(frozen=True, slots=True)
class Room:
    """Says what a host offers to engines of each role."""

    host: str
    devices: Mapping[Role, tuple[DeviceKind, int]]
    """Kind and number of the devices that ranks of a role see; a core is one of a CPU host."""
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Demand:
    """Asks for room for one engine."""

    role: Role
    index: int
    tp_size: int


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """The host of an engine, and the CUDA devices of its ranks as they number them."""

    host: str
    devices: tuple[int, ...] | None = None  # none: they are dealt in turn


Places = Mapping[tuple[Role, int], EnginePlace]  # the place of each engine, by role and index


def demands_of(replicas: Mapping[Role, int], tp_sizes: Mapping[Role, int]) -> Iterator[Demand]:
    """Yield what engines ask for, in the order in which they are placed."""
    for index in range(max(replicas.values(), default=0)):
        for role in ROLES:
            if index < replicas.get(role, 0):
                yield Demand(role, index, tp_sizes[role])


def place_engines(
    demands: Iterator[Demand] | Sequence[Demand],
    rooms: Sequence[Room],
    strategy: PlacementStrategy = "pack",
) -> Places:
    """Place every engine; never raises. Where no host has room, the least crowded gets it.

    A host without devices for a role is taken only when there is no other one; rules tell.
    """
    places: dict[tuple[Role, int], EnginePlace] = {}
    used: dict[tuple[str, DeviceKind], int] = {}
    domains = {room.host: room.domain for room in rooms}
    for demand in demands:
        partner = _partner(demand, places)
        offers = [room for room in rooms if demand.role in room.devices] or list(rooms)

        def cost(
            room: Room, demand: Demand = demand, partner: str | None = partner
        ) -> tuple[object, ...]:
            kind, num_devices = room.devices.get(demand.role, ("cpu", 0))
            size = demand.tp_size
            taken = used.get((room.host, kind), 0)
            fits = taken + size <= num_devices
            crowd = 0.0 if fits and strategy == "pack" else (taken + size) / max(1, num_devices)
            if strategy == "spread":
                return (not fits, size > num_devices, taken, crowd)
            near = partner in (None, room.host)
            is_far = not near and domains.get(partner or "") != room.domain
            return (not fits, size > num_devices, crowd, not near, is_far)

        # Hosts of equal cost keep the order in which they are listed.
        chosen = min(offers, key=cost)
        places[demand.role, demand.index] = EnginePlace(chosen.host)
        key = (chosen.host, chosen.devices.get(demand.role, ("cpu", 0))[0])
        used[key] = used.get(key, 0) + demand.tp_size
    return places


def _partner(demand: Demand, places: Places) -> str | None:
    """Return the host of the engine that this one should be near: of the other role of a pair."""
    if demand.role not in PAIR:
        return None
    (other,) = (role for role in PAIR if role != demand.role)
    there = [index for role, index in places if role == other]
    return places[other, there[demand.index % len(there)]].host if there else None


def one_host(
    machines: Mapping[str, Machine], environ: Mapping[str, str]
) -> tuple[ResolvedHost, ...]:
    """Return machines as hosts that share the supervisor's environment and listen on loopback."""
    return tuple(ResolvedHost(name, machine, environ) for name, machine in machines.items())


def count_ranks(config: LaunchConfig) -> int:
    """Return the number of ranks of all engines."""
    return sum(
        config.role(role).replicas * config.engine_settings(role).tensor_parallel_size
        for role in ROLES
    )


def planned_hosts(
    config: LaunchConfig,
    machine: Machine,
    environ: Mapping[str, str],
    joined: Mapping[str, ResolvedHost] | None = None,
) -> tuple[ResolvedHost, ...]:
    """Return the hosts of a launch, the supervisor's own first. Raises ConfigError.

    ``machine``, ``environ``: of this host. ``joined``: what agents have told of their hosts; of
    others, the settings tell what is known.
    """
    if config.placement == "local":
        return one_host({LOCAL: machine}, environ)
    listed = {host.name: host for host in config.hosts}
    own = listed.get(LOCAL)
    address = config.control_address or default_address() or ""
    here = ResolvedHost(LOCAL, machine, environ, address, address, frozenset())
    hosts = [here if own is None else settled(own, here)]
    for name, settings in listed.items():
        if name != LOCAL:
            known = (joined or {}).get(name) or _not_joined(settings, config, environ)
            hosts.append(settled(settings, known))
    return tuple(hosts)


def settled(settings: HostSettings, known: ResolvedHost) -> ResolvedHost:
    """Return a host with what its settings say over what is known of it."""
    bind = settings.bind_address or known.bind_address
    return ResolvedHost(
        name=settings.name,
        machine=known.machine,
        environ=known.environ,
        bind_address=bind,
        advertise_address=settings.advertise_address
        or settings.bind_address
        or known.advertise_address,
        roles=frozenset(ROLES if settings.roles is None else settings.roles),
        domain=settings.domain,
        executables=known.executables,
    )


def _not_joined(
    settings: HostSettings, config: LaunchConfig, environ: Mapping[str, str]
) -> ResolvedHost:
    if settings.machine is None:
        reason = f"{settings.name} has not joined, and hosts has no machine for it"
        unknown: dict[Fact, str] = dict.fromkeys(get_args(Fact), reason)
        return ResolvedHost(settings.name, Machine(unknown=unknown), environ, "", "")
    found = _described(settings.machine, config)
    return ResolvedHost(settings.name, found.machine, {**environ, **found.environ}, "", "")


def _described(name: str, config: LaunchConfig) -> AssumedMachine:
    found = find_profile(name, count_ranks(config))
    if found is not None:
        return found
    path = Path(name).expanduser()
    if not path.exists():
        raise ConfigError(
            f"{name[:80]!a} is neither a file nor one of {', '.join(PROFILES)}",
            field="hosts.machine",
            value=name,
            fix="run `pdlaunch probe > machine.json` on the machine, and name that file",
        )
    return read_machine_file(path)
