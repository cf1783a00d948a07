"""Places the engines of each role on hosts, where each role is derived for its ranks.

Engines are placed in turn: ``prefill-0``, ``decode-0``, ``prefill-1`` and so on, so that the two
sides of a pair find room beside each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from pdlaunch.config.hosts import PlacementStrategy
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.planning.hosts import DeviceKind, ResolvedHost, is_same_machine
from pdlaunch.planning.models import Model
from pdlaunch.planning.role_engines import RoleEngines, device_kind, visible_on


@dataclass(frozen=True, slots=True)
class Room:
    """Says what a host offers to engines of each role."""

    host: str
    # Kind and number of the devices that ranks of a role see; a core is one of a CPU host
    devices: Mapping[Role, tuple[DeviceKind, int]]


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """The host of an engine, and the CUDA devices of its ranks there as they number them."""

    host: str
    devices: tuple[int, ...] | None = None  # none: they are dealt in turn
    others: tuple[EnginePlace, ...] = ()  # those of its other ranks, where it has several hosts

    @property
    def nodes(self) -> tuple[EnginePlace, ...]:
        return (self, *self.others)


Places = Mapping[tuple[Role, int], EnginePlace]  # the place of each engine, by role and index


def place_engines(
    replicas: Mapping[Role, int],
    tp_sizes: Mapping[Role, int],
    rooms: Sequence[Room],
    strategy: PlacementStrategy = "pack",
    nnodes: Mapping[Role, int] = MappingProxyType({}),
) -> Places:
    """Place every engine; never raises. Where no host has room, the least crowded gets it.

    ``tp_sizes``: ranks of an engine on each of its hosts. ``nnodes``: hosts of an engine, if more
    than one; it gets fewer where there are not as many.

    A host without devices for a role is taken only when there is no other one; rules tell.
    """
    places: dict[tuple[Role, int], EnginePlace] = {}
    used: Counter[tuple[str, DeviceKind]] = Counter()

    def cost(room: Room, role: Role, partner: str | None) -> tuple[object, ...]:
        size = tp_sizes[role]
        kind, num_devices = room.devices.get(role, ("cpu", 0))
        taken = used[room.host, kind]
        fits = taken + size <= num_devices
        crowd = 0.0 if fits and strategy == "pack" else (taken + size) / max(1, num_devices)
        # Tuples compare from the left: fitting at all comes before any preference.
        if strategy == "spread":
            return (not fits, size > num_devices, taken, crowd)
        return (not fits, size > num_devices, crowd, partner not in (None, room.host))

    for index in range(max(replicas.values(), default=0)):
        for role in (role for role in ROLES if index < replicas.get(role, 0)):
            # An engine of a pair should be near one of the other role.
            peers = [other for other in PAIR if role in PAIR and other != role]
            near = [place.host for (other, _), place in places.items() if other in peers]
            partner = near[index % len(near)] if near else None
            offers = [room for room in rooms if role in room.devices] or rooms
            # Hosts of equal cost keep the order in which they are listed.
            offers = sorted(offers, key=lambda room: cost(room, role, partner))
            chosen = offers[: nnodes.get(role, 1)]
            first, *others = (EnginePlace(room.host) for room in chosen)
            places[role, index] = replace(first, others=tuple(others))
            for room in chosen:
                kind, _ = room.devices.get(role, ("cpu", 0))
                used[room.host, kind] += tp_sizes[role]
    return places


@dataclass(frozen=True, slots=True, eq=False)
class PlacedEngine:
    """Says where one engine runs: on one host, or with its first ranks there."""

    index: int
    host: ResolvedHost
    engines: RoleEngines  # the role on this host
    device_indices: tuple[int, ...]  # the CUDA device of each rank on its host; empty on a CPU
    others: tuple[PlacedEngine, ...] = ()  # its ranks on other hosts

    @property
    def nodes(self) -> tuple[PlacedEngine, ...]:
        """Return its part on each of its hosts, in the order of their ranks."""
        return (replace(self, others=()), *self.others)

    @property
    def name(self) -> str:
        return self.engines.engine_name(self.index)

    @property
    def place(self) -> EnginePlace:
        others = tuple(other.place for other in self.others)
        return EnginePlace(self.host.name, self.device_indices or None, others)

    @property
    def devices(self) -> tuple[str, ...]:
        if self.device_indices:
            return tuple(f"cuda:{index}" for index in self.device_indices)
        return ("cpu",) * self.engines.settings.ranks_per_node


def place_roles(
    config: LaunchConfig,
    hosts: Sequence[ResolvedHost],
    models: Mapping[Role, Model],
    places: Places | None = None,
) -> tuple[Mapping[str, Mapping[Role, RoleEngines]], tuple[PlacedEngine, ...]]:
    """Place the engines of each role that has any: return the roles of each host, and all engines
    in the order of ``ROLES``, then of the index. Never raises, see ``RoleEngines``.

    ``places``: those of engines that are placed already.
    """
    replicas = {role: count for role in ROLES if (count := config.role(role).replicas)}
    settings = {role: config.engine_settings(role) for role in replicas}
    nnodes = {role: each.nnodes for role, each in settings.items()}
    # Ranks of an engine on each of its hosts
    tp_sizes = {role: each.ranks_per_node for role, each in settings.items()}
    if not places:
        takers = [host for host in hosts if host.roles] or [hosts[0]]
        # A launch whose hosts take no role still gets places, so that rules can tell what is wrong.
        rooms = [_room(config, host, [*replicas]) for host in takers]
        places = place_engines(replicas, tp_sizes, rooms, config.placement_strategy, nnodes)
    counts = Counter(
        (node.host, role) for (role, _), place in places.items() for node in place.nodes
    )
    # Then all ranks of pairs get network sockets: UCX connects no rank with them to one without.
    has_far_pairs = any(
        counts[one.name, "prefill"] and counts[other.name, "decode"]
        for one in hosts
        for other in hosts
        # Agents of Ray may share a machine.
        if one is not other and not (config.placement == "ray" and is_same_machine(one, other))
    )
    by_host: dict[str, dict[Role, RoleEngines]] = {}
    for host in hosts:
        here: dict[Role, RoleEngines] = {}
        num_ranks = sum(counts[host.name, role] * tp_sizes[role] for role in replicas)
        for role in (role for role in replicas if counts[host.name, role]):
            engines = RoleEngines(
                config,
                role,
                host,
                models[role],
                replicas=counts[host.name, role],
                num_neighbours=num_ranks,
                first_gpu_rank=0,
                has_far_peers=role in PAIR and has_far_pairs,
            )
            # Ranks of earlier roles on the same GPUs: the next role goes on where these end.
            before = sum(
                other.num_ranks
                for other in here.values()
                if other.device == engines.device == "cuda" and other.gpus == engines.gpus
            )
            here[role] = replace(engines, first_gpu_rank=before)
        if here:
            by_host[host.name] = here
    return by_host, tuple(_placed(places, {host.name: host for host in hosts}, by_host))


def _placed(
    places: Places,
    hosts: Mapping[str, ResolvedHost],
    by_host: Mapping[str, Mapping[Role, RoleEngines]],
) -> Iterator[PlacedEngine]:
    dealt: Counter[tuple[str, Role]] = Counter()
    for role, index in sorted(places, key=lambda key: (ROLES.index(key[0]), key[1])):
        nodes = []
        for place in places[role, index].nodes:
            engines = by_host[place.host][role]
            num_ranks = engines.settings.ranks_per_node
            devices = engines.device_indices(dealt[place.host, role], num_ranks)
            dealt[place.host, role] += num_ranks
            # Those of a host that has come back with fewer GPUs are dealt anew.
            if place.devices and max(place.devices) < len(engines.gpus):
                devices = place.devices
            nodes.append(PlacedEngine(index, hosts[place.host], engines, devices))
        yield replace(nodes[0], others=tuple(nodes[1:]))


def _room(config: LaunchConfig, host: ResolvedHost, roles: Sequence[Role]) -> Room:
    devices: dict[Role, tuple[DeviceKind, int]] = {}
    for role in (role for role in roles if role in host.roles):
        settings = config.engine_settings(role)
        visible = visible_on(host, settings)
        kind = device_kind(settings, host.machine, visible)
        devices[role] = (kind, len(visible.gpus) if kind == "cuda" else host.machine.num_cpus)
    return Room(host.name, devices)
