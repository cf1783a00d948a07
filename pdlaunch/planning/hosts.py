"""Decides which host each engine runs on, and describes hosts as values.

Engines are placed in turn: ``prefill-0``, ``decode-0``, ``prefill-1`` and so on, so that the two
sides of a pair find room beside each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.config.hosts import PlacementStrategy
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.machine.engine_commands import EngineCommand
from pdlaunch.machine.facts import Machine

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedHost:
    """Describes a host of a launch. The first one of a launch is the supervisor's own."""

    name: str
    machine: Machine
    environ: Mapping[str, str]
    """The environment that processes inherit there."""
    bind_address: str = ENGINE_HOST
    """Its processes listen here."""
    advertise_address: str = ENGINE_HOST
    """Processes on other hosts are told to connect here."""
    roles: frozenset[Role] = frozenset(ROLES)
    """It takes engines of these roles; empty: only the router runs here."""
    domain: str = ""
    """Hosts of one name share NVLink or RDMA; empty: not known."""
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
    devices: tuple[int, ...] | None = None
    """None: they are dealt in turn."""


Places = Mapping[tuple[Role, int], EnginePlace]
"""The place of each engine, by role and index."""


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
