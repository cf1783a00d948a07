"""Places the engines of each role on hosts, and derives the values of each role on each host.

Engines are placed in the order ``prefill-0``, ``decode-0``, ``prefill-1`` and so on, so that the
two engines of a pair are likely to share a host.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from pdlaunch.config.hosts import PlacementStrategy
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.planning.models import Model
from pdlaunch.planning.plan import DeviceKind, ResolvedHost, is_same_machine
from pdlaunch.planning.role_engines import RoleEngines, device_kind, visible_on

# Kind and number of devices that ranks of a role see; without GPUs, each core counts as one
Devices = Mapping[Role, tuple[DeviceKind, int]]


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """Holds a host of an engine and the CUDA devices of its ranks there, as they number them."""

    host: str
    devices: tuple[int, ...] | None = None  # None: GPUs are assigned in turn


Key = tuple[Role, int]  # role and index of an engine
Places = Mapping[Key, tuple[EnginePlace, ...]]  # one place for each host, in the order of ranks


def place_engines(
    replicas: Mapping[Role, int],
    tp_sizes: Mapping[Role, int],
    rooms: Mapping[str, Devices],
    strategy: PlacementStrategy = "pack",
    nnodes: Mapping[Role, int] = MappingProxyType({}),
) -> Places:
    """Place all engines. Never raises: rules report engines that do not fit.

    ``rooms``: devices by host. ``tp_sizes``: ranks of an engine on each of its hosts. ``nnodes``:
    hosts of an engine, if more than one; limited to the hosts there are. If no host has free
    devices for an engine, it goes to the host with the fewest ranks per device. A host without any
    devices for the role comes last.
    """
    places: dict[Key, tuple[EnginePlace, ...]] = {}
    used: Counter[tuple[str, DeviceKind]] = Counter()

    def cost(host: str, role: Role, partner: str | None) -> tuple[object, ...]:
        size = tp_sizes[role]
        kind, num_devices = rooms[host].get(role, ("cpu", 0))
        taken = used[host, kind]
        fits = taken + size <= num_devices
        crowd = 0.0 if fits and strategy == "pack" else (taken + size) / max(1, num_devices)
        # Tuples compare from the left, so hosts with enough free devices come first.
        if strategy == "spread":
            return (not fits, size > num_devices, taken, crowd)
        return (not fits, size > num_devices, crowd, partner not in (None, host))

    for index in range(max(replicas.values(), default=0)):
        for role in (role for role in ROLES if index < replicas.get(role, 0)):
            # Prefer a host that has an engine of the other role of the pair.
            peers = [other for other in PAIR if role in PAIR and other != role]
            near = [nodes[0].host for (other, _), nodes in places.items() if other in peers]
            partner = near[index % len(near)] if near else None
            offers = [host for host, devices in rooms.items() if role in devices] or [*rooms]
            # Sorting is stable: hosts of equal cost keep the order of the settings.
            offers.sort(key=lambda host: cost(host, role, partner))
            chosen = offers[: nnodes.get(role, 1)]
            places[role, index] = tuple(map(EnginePlace, chosen))
            for host in chosen:
                kind, _ = rooms[host].get(role, ("cpu", 0))
                used[host, kind] += tp_sizes[role]
    return places


@dataclass(frozen=True, slots=True, eq=False)
class PlacedEngine:
    """Holds the host and devices of one engine; for several hosts, those of its first ranks."""

    index: int
    host: ResolvedHost
    engines: RoleEngines  # the role on this host
    device_indices: tuple[int, ...]  # the CUDA device of each rank on its host; empty on a CPU
    others: tuple["PlacedEngine", ...] = ()  # its ranks on other hosts

    @property
    def nodes(self) -> tuple["PlacedEngine", ...]:
        """Return the engine's part on each of its hosts, in the order of ranks."""
        return (replace(self, others=()), *self.others)

    @property
    def key(self) -> Key:
        return self.engines.role, self.index

    @property
    def name(self) -> str:
        # Unique in the launch, and kept over restarts.
        return f"{self.engines.role}-{self.index}"

    @property
    def places(self) -> tuple[EnginePlace, ...]:
        return tuple(EnginePlace(n.host.name, n.device_indices or None) for n in self.nodes)

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
    """Return the roles on each host, and all engines by role, then by index. Never raises."""
    replicas = {role: count for role in ROLES if (count := config.role(role).replicas)}
    settings = {role: config.engine_settings(role) for role in replicas}
    nnodes = {role: each.nnodes for role, each in settings.items()}
    # Ranks of an engine on each of its hosts
    tp_sizes = {role: each.ranks_per_node for role, each in settings.items()}
    if not places:
        takers = [host for host in hosts if host.roles] or [hosts[0]]
        # If no host takes a role, place the engines anyway, so that rules can report the mistake.
        rooms = {host.name: _devices(config, host, [*replicas]) for host in takers}
        places = place_engines(replicas, tp_sizes, rooms, config.placement_strategy, nnodes)
    counts = Counter((node.host, role) for (role, _), nodes in places.items() for node in nodes)
    # Then all ranks of pairs get network transports: UCX connects no rank with them to one without.
    has_far_pairs = any(
        counts[one.name, "prefill"] and counts[other.name, "decode"]
        for one in hosts
        for other in hosts
        # Two agents of Ray may be on the same machine.
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
            # Count ranks of earlier roles on the same GPUs, so this role begins with the next GPU.
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
        for place in places[role, index]:
            engines = by_host[place.host][role]
            num_ranks = engines.settings.ranks_per_node
            devices = engines.device_indices(dealt[place.host, role], num_ranks)
            dealt[place.host, role] += num_ranks
            # Keep the devices, unless the host has rejoined with fewer GPUs.
            if place.devices and max(place.devices) < len(engines.gpus):
                devices = place.devices
            nodes.append(PlacedEngine(index, hosts[place.host], engines, devices))
        yield replace(nodes[0], others=tuple(nodes[1:]))


def _devices(config: LaunchConfig, host: ResolvedHost, roles: Sequence[Role]) -> Devices:
    devices: dict[Role, tuple[DeviceKind, int]] = {}
    for role in (role for role in roles if role in host.roles):
        settings = config.engine_settings(role)
        visible = visible_on(host, settings)
        kind = device_kind(settings, host.machine, visible)
        devices[role] = (kind, len(visible.gpus) if kind == "cuda" else host.machine.num_cpus)
    return devices
