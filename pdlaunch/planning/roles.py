"""Places the engines of each role on hosts, and has each role derived where its ranks run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.planning.derive import derive_engines, device_kind, unverified_because, visible_on
from pdlaunch.planning.hosts import (
    DeviceKind,
    Places,
    ResolvedHost,
    Room,
    demands_of,
    is_same_machine,
    place_engines,
)
from pdlaunch.planning.models import Model
from pdlaunch.planning.role_engines import RoleEngines


@dataclass(frozen=True, slots=True, eq=False)
class PlacedEngine:
    """Says where one engine runs."""

    index: int
    host: ResolvedHost
    engines: RoleEngines  # the role on this host
    device_indices: tuple[int, ...]  # the CUDA device of each rank on its host; empty on a CPU

    @property
    def name(self) -> str:
        return self.engines.engine_name(self.index)

    @property
    def devices(self) -> tuple[str, ...]:
        """Return the device of each rank: ``cpu`` or ``cuda:N``."""
        if self.device_indices:
            return tuple(f"cuda:{index}" for index in self.device_indices)
        return ("cpu",) * self.engines.tp_size


@dataclass(frozen=True, slots=True)
class PlacedRoles:
    """Holds the engines of a launch by role, by host, and one by one."""

    roles: Mapping[Role, RoleEngines]
    by_host: Mapping[str, Mapping[Role, RoleEngines]]  # the roles of each host that has engines
    engines: tuple[PlacedEngine, ...]  # they are in the order of ``ROLES``, then of the index


def resolve_roles(
    config: LaunchConfig,
    hosts: Sequence[ResolvedHost],
    environ: Mapping[str, str],
    models: Mapping[Role, Model],
    places: Places | None = None,
) -> PlacedRoles:
    """Place and resolve the engines of each role that has any; never raises, see ``RoleEngines``.

    ``environ``: the supervisor's. ``places``: those of engines that are placed already.
    """
    used = [role for role in ROLES if config.role(role).replicas]
    settings = {role: config.engine_settings(role) for role in used}
    places = places or place_engines(
        demands_of(
            {role: config.role(role).replicas for role in used},
            {role: settings[role].tensor_parallel_size for role in used},
        ),
        [_room(host, settings) for host in hosts if host.roles] or [_room(hosts[0], settings)],
        config.placement_strategy,
    )
    unverified = _unverified(config, hosts, environ, models, places)
    num_engines = Counter((place.host, role) for (role, _), place in places.items())
    num_ranks = {
        host.name: sum(
            num_engines[host.name, role] * settings[role].tensor_parallel_size for role in used
        )
        for host in hosts
    }
    by_host: dict[str, dict[Role, RoleEngines]] = {}
    for host in hosts:
        here = by_host.setdefault(host.name, {})
        for role in used:
            if not num_engines[host.name, role]:
                continue
            engines = derive_engines(
                config,
                role,
                host,
                models[role],
                unverified,
                num_ranks[host.name],
                has_far_peers=_has_far_peers(config, role, host, hosts, num_engines),
            )
            before = sum(
                other.num_ranks
                for other in here.values()
                if other.device == engines.device == "cuda" and other.gpus == engines.gpus
            )
            here[role] = replace(
                engines,
                replicas=num_engines[host.name, role],
                num_ranks=num_engines[host.name, role] * engines.tp_size,
                first_gpu_rank=before,
            )
    placed = tuple(_placed(places, hosts, by_host, used))
    roles: dict[Role, RoleEngines] = {}
    for role in used:
        first = next(engine for engine in placed if engine.engines.role == role)
        replicas = config.role(role).replicas
        roles[role] = replace(
            first.engines, replicas=replicas, num_ranks=replicas * first.engines.tp_size
        )
    return PlacedRoles(roles, {name: here for name, here in by_host.items() if here}, placed)


def _has_far_peers(
    config: LaunchConfig,
    role: Role,
    host: ResolvedHost,
    hosts: Sequence[ResolvedHost],
    num_engines: Counter[tuple[str, Role]],
) -> bool:
    """Return whether a role's engines exchange KV blocks with some on another machine."""
    return role in PAIR and any(
        num_engines[other.name, peer]
        for other in hosts
        for peer in PAIR
        if peer != role
        and other is not host
        # Agents of Ray may share a machine.
        and not (config.placement == "ray" and is_same_machine(host, other))
    )


def _placed(
    places: Places,
    hosts: Sequence[ResolvedHost],
    by_host: Mapping[str, Mapping[Role, RoleEngines]],
    roles: Sequence[Role],
) -> Iterator[PlacedEngine]:
    by_name = {host.name: host for host in hosts}
    for role in roles:
        dealt = dict.fromkeys(by_name, 0)
        for index in sorted(index for other, index in places if other == role):
            place = places[role, index]
            engines = by_host[place.host][role]
            devices = engines.device_indices(dealt[place.host], engines.tp_size)
            dealt[place.host] += engines.tp_size
            # Those of a host that has come back with fewer GPUs are dealt anew.
            if place.devices and max(place.devices) < len(engines.gpus):
                devices = place.devices
            yield PlacedEngine(index, by_name[place.host], engines, devices)


def _room(host: ResolvedHost, settings: Mapping[Role, EngineSettings]) -> Room:
    devices: dict[Role, tuple[DeviceKind, int]] = {}
    for role, own in settings.items():
        if role in host.roles:
            visible = visible_on(host, own)
            kind = device_kind(own, host.machine, visible)
            num = len(visible.gpus) if kind == "cuda" else host.machine.num_cpus
            devices[role] = (kind, num)
    return Room(host.name, devices, host.domain)


def _unverified(
    config: LaunchConfig,
    hosts: Sequence[ResolvedHost],
    environ: Mapping[str, str],
    models: Mapping[Role, Model],
    places: Places,
) -> str:
    """Return why blocks are not proven; it takes the engines of both roles to prove them."""
    if not config.kv_transfer.verify:
        return "kv_transfer.verify is off"
    for role in PAIR:
        settings = config.engine_settings(role)
        # Native engines always prove their blocks. One of another kind than these two must not pass
        # here: it would be taken for one that does.
        if not config.role(role).replicas or settings.engine != "vllm":
            continue
        names = {place.host for (other, _), place in places.items() if other == role}
        theirs = [host for host in hosts if host.name in names]
        if reason := unverified_because(settings, environ, models[role], theirs, hosts[0]):
            return reason
    return ""
