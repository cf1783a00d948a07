"""Derives what the settings of a role come to on a machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pdlaunch.config.connectors import KVNetwork
from pdlaunch.config.field_types import set_paths
from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.config.models import EngineSettings, LaunchConfig
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.config.sizes import parse_size
from pdlaunch.config.ucx import local_transports
from pdlaunch.platform.allocator_conf import read_allocator_conf
from pdlaunch.platform.facts import Gpu, Machine
from pdlaunch.platform.visible_gpus import VISIBLE_DEVICES, VisibleGpus, visible_gpus
from pdlaunch.resolve.footprint import Footprint, make_footprint
from pdlaunch.resolve.hosts import (
    DeviceKind,
    Places,
    ResolvedHost,
    Room,
    Share,
    demands_of,
    is_same_machine,
    place_engines,
)
from pdlaunch.resolve.models import Model
from pdlaunch.resolve.vllm_environment import vllm_environment, whole_gibibytes
from pdlaunch.resolve.vllm_verification import unverified_because

DTypeName = Literal["float32", "bfloat16", "float16"]
Allocator = Literal["host", "cuda", "cumem", "expandable_segments"]
"""Allocators of KV caches."""

CHOSEN_BY_ENGINE = frozenset(("max_num_batched_tokens", "async_scheduling"))
"""Derived settings that engines which are not native choose by themselves where they are unset."""
CPU_KV_CACHE_BYTES = parse_size("1GiB")
CPU_BATCHED_TOKENS = 512
CUDA_BATCHED_TOKENS = 8192


@dataclass(frozen=True, slots=True, eq=False)
class RoleEngines:
    """Describes the engines of one role, with every derived value: all of them, or those of a host.

    All of a role are alike, but for what follows from the host; of all of them, this is as it is on
    the first one's host.

    None stands for what is not known: of a model that cannot be read or is yet to be converted, of
    settings that contradict each other, or of a device's free memory, known only at start.
    """

    role: Role
    replicas: int
    tp_size: int
    num_ranks: int
    """Ranks of all these engines; on a host, those that run there."""
    settings: EngineSettings
    """The settings as written, the role's own section over the top level."""
    overrides: frozenset[str]
    """Settings that the role's own section gives."""
    given: frozenset[str]
    """Settings that its section or the top level gives."""
    ports: range
    """Fixed HTTP ports of the engines; empty when they take free ones."""

    host: str
    machine: Machine
    bind_address: str
    """Servers and side channels listen here."""
    advertise_address: str
    """Peers are told to connect here."""

    model: Model
    device: DeviceKind
    gpus: tuple[Gpu, ...]
    """GPUs that its ranks see, which number them from 0: all of the machine, or those that their
    own CUDA_VISIBLE_DEVICES names.
    """
    gpus_problem: str
    """The fault of that variable; empty when it has none."""
    first_gpu_rank: int
    """Number of ranks that are placed on the same GPUs of the host before those of this role."""
    dtype: DTypeName | None
    max_model_len: int | None
    max_num_batched_tokens: int
    kv_cache_bytes: int | None
    """KV cache of one rank; None: what the device has left, known only at start."""
    num_threads: int
    """CPU threads of one rank."""
    async_scheduling: bool
    cumem_allocator: bool | None
    allocator: Allocator
    """Allocator of the KV cache."""
    footprint: Footprint | None
    """Memory of one rank."""
    unverified: str
    """The reason why pulled KV blocks are used unproven; empty: they are proven before use. It is
    the same for both roles.
    """
    given_environ: Mapping[str, str]
    """The user's environment of a rank: the supervisor's, and ``env`` over it."""
    environment: Mapping[str, str]
    """Variables that are set for a rank over the supervisor's environment."""
    has_far_peers: bool = False
    """Its ranks exchange KV blocks with ranks on other hosts."""

    @property
    def shape(self) -> ModelShape | None:
        return self.model.shape

    @property
    def num_blocks(self) -> int | None:
        """KV blocks of one rank; None: known only at start."""
        return None if self.footprint is None else self.footprint.num_blocks

    @property
    def host_tier_bytes(self) -> int:
        """Host memory of one rank for KV blocks; 0: no host tier."""
        return self.settings.kv_offload.host_memory

    @property
    def is_native(self) -> bool:
        return self.settings.engine == "native"

    @property
    def block_size(self) -> int | None:
        """Tokens in a KV block; None: the engine is not native and chooses by itself."""
        is_known = self.is_native or "block_size" in self.given
        return self.settings.block_size if is_known else None

    def derived(self) -> dict[str, object]:
        """Return the settings that are derived where they are not set, by name.

        None for what engines that are not native choose by themselves.
        """
        own = self.is_native
        return {
            "device": self.device,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.max_num_batched_tokens
            if own
            else self.settings.max_num_batched_tokens,
            "kv_cache_memory": self.kv_cache_bytes,
            "num_threads": self.num_threads,
            "async_scheduling": self.async_scheduling
            if own or not self.settings.async_scheduling
            else None,
            "enable_cumem_allocator": self.cumem_allocator,
        }

    @property
    def ucx_transports(self) -> tuple[str, ...]:
        """Transports that UCX may use in a rank; empty without UCX."""
        return tuple(self.environment.get("UCX_TLS", "").split(","))

    def engine_name(self, index: int) -> str:
        """Return the name of one engine, unique in the launch and stable over restarts."""
        return f"{self.role}-{index}"

    def http_port(self, index: int) -> int:
        """Return the HTTP port of one engine; 0: a free one, registered with the supervisor."""
        return self.ports[index] if self.ports else 0

    def device_indices(self, first: int, num_ranks: int) -> tuple[int, ...]:
        """Return the CUDA devices of ranks of this role on the host, as they number them; empty on
        a CPU or without GPUs.

        ``first``: how many ranks of the role the host has before them. GPUs are dealt out in turn
        over the ranks of all engines on the host that see the same, in the order of ``ROLES``.
        """
        num_gpus = len(self.gpus)
        if self.device == "cpu" or not num_gpus:
            return ()
        begin = self.first_gpu_rank + first
        return tuple((begin + place) % num_gpus for place in range(num_ranks))

    def num_ranks_on(self, gpu: int) -> int:
        """Return how many ranks of all these engines ``device_indices`` puts on a GPU of the
        machine.
        """
        place = next((place for place, each in enumerate(self.gpus) if each.index == gpu), None)
        if self.device == "cpu" or place is None:
            return 0
        # Counted, not listed: settings may name a million ranks, and checks still answer at once.
        end = self.first_gpu_rank + self.num_ranks
        return self._num_dealt(end, place) - self._num_dealt(self.first_gpu_rank, place)

    def where(self, name: str) -> str:
        """Return the dotted path that decides a setting: the role's section or the top level."""
        return f"{self.role}.{name}" if name in self.overrides else name

    def _num_dealt(self, num_ranks: int, gpu: int) -> int:
        """Return how many of the ranks 0 to ``num_ranks`` - 1 are on one of the GPUs they see."""
        # Of 3 GPUs, GPU 1 has ranks 1, 4, 7, ..: of ranks 0 to 7 these are (8 - 1 + 2) // 3 = 3.
        num_gpus = len(self.gpus)
        return max(0, (num_ranks - gpu + num_gpus - 1) // num_gpus)


@dataclass(frozen=True, slots=True, eq=False)
class PlacedShare:
    """Holds ranks of one engine on one host."""

    host: ResolvedHost
    engines: RoleEngines
    """The role on this host."""
    num_ranks: int
    device_indices: tuple[int, ...]
    """The CUDA device of each, as the ranks number them; empty on a CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class PlacedEngine:
    """Is one engine: where its ranks run. Its server runs on the host of rank 0."""

    index: int
    shares: tuple[PlacedShare, ...]

    @property
    def engines(self) -> RoleEngines:
        """The role on the host of rank 0."""
        return self.shares[0].engines

    @property
    def host(self) -> ResolvedHost:
        return self.shares[0].host

    @property
    def name(self) -> str:
        return self.engines.engine_name(self.index)

    @property
    def device_indices(self) -> tuple[int, ...]:
        """The CUDA device of each rank on its host; empty on a CPU."""
        return tuple(device for share in self.shares for device in share.device_indices)

    def shares_by_rank(self) -> Iterator[tuple[PlacedShare, str]]:
        """Yield the share that each rank belongs to, and its device: ``cpu`` or ``cuda:N``."""
        for share in self.shares:
            devices = share.device_indices
            for place in range(share.num_ranks):
                yield share, f"cuda:{devices[place]}" if devices else "cpu"


@dataclass(frozen=True, slots=True)
class PlacedRoles:
    """Holds the engines of a launch by role, by host, and one by one."""

    roles: Mapping[Role, RoleEngines]
    by_host: Mapping[str, Mapping[Role, RoleEngines]]
    """The roles of each host that has ranks; ``replicas`` counts engines whose rank 0 is there."""
    engines: tuple[PlacedEngine, ...]
    """In the order of ``ROLES``, then of the index."""


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
            {role: settings[role].hosts_per_engine for role in used},
        ),
        [_room(host, settings) for host in hosts if host.roles] or [_room(hosts[0], settings)],
        config.placement_strategy,
    )
    unverified = _unverified(config, environ, models)
    num_ranks = {
        host.name: sum(_ranks_on(places, host.name, role) for role in used) for host in hosts
    }
    by_host: dict[str, dict[Role, RoleEngines]] = {}
    for host in hosts:
        here = by_host.setdefault(host.name, {})
        for role in used:
            if not _ranks_on(places, host.name, role):
                continue
            is_far = any(
                _ranks_on(places, other.name, peer)
                for other in hosts
                for peer in PAIR
                if other is not host
                # Agents of Ray may share a machine.
                and not (config.placement == "ray" and is_same_machine(host, other))
                and role in PAIR
                and peer != role
            )
            engines = _resolve(
                config,
                role,
                host,
                models[role],
                unverified,
                num_ranks[host.name],
                has_far_peers=is_far,
            )
            before = sum(
                other.num_ranks
                for other in here.values()
                if other.device == engines.device == "cuda" and other.gpus == engines.gpus
            )
            here[role] = replace(
                engines,
                replicas=_engines_on(places, host.name, role),
                num_ranks=_ranks_on(places, host.name, role),
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


def _placed(
    places: Places,
    hosts: Sequence[ResolvedHost],
    by_host: Mapping[str, Mapping[Role, RoleEngines]],
    roles: Sequence[Role],
) -> Iterator[PlacedEngine]:
    by_name = {host.name: host for host in hosts}
    for role in roles:
        dealt = dict.fromkeys(by_name, 0)
        for index in range(sum(1 for other, _ in places if other == role)):
            shares = []
            for share in places[role, index]:
                engines = by_host[share.host][role]
                devices = engines.device_indices(dealt[share.host], share.num_ranks)
                dealt[share.host] += share.num_ranks
                shares.append(PlacedShare(by_name[share.host], engines, share.num_ranks, devices))
            yield PlacedEngine(index, tuple(shares))


def _room(host: ResolvedHost, settings: Mapping[Role, EngineSettings]) -> Room:
    devices: dict[Role, tuple[DeviceKind, int]] = {}
    for role, own in settings.items():
        if role in host.roles:
            visible = _visible(host, own)
            kind = _device(own, host.machine, visible)
            num = len(visible.gpus) if kind == "cuda" else len(host.machine.cpus)
            devices[role] = (kind, num)
    return Room(host.name, devices, host.domain)


def _visible(host: ResolvedHost, settings: EngineSettings) -> VisibleGpus:
    own = {**host.environ, **settings.env}.get(VISIBLE_DEVICES)
    return visible_gpus(host.machine.gpus, host.environ.get(VISIBLE_DEVICES), own)


def _shares(places: Places, host: str, role: Role) -> list[tuple[int, Share]]:
    """Return the shares of a role on a host, each with its place among those of its engine."""
    return [
        (place, share)
        for (other, _), shares in places.items()
        if other == role
        for place, share in enumerate(shares)
        if share.host == host
    ]


def _ranks_on(places: Places, host: str, role: Role) -> int:
    return sum(share.num_ranks for _, share in _shares(places, host, role))


def _engines_on(places: Places, host: str, role: Role) -> int:
    return sum(place == 0 for place, _ in _shares(places, host, role))


def _resolve(
    config: LaunchConfig,
    role: Role,
    host: ResolvedHost,
    model: Model,
    unverified: str,
    num_ranks: int,
    *,
    has_far_peers: bool,
) -> RoleEngines:
    """Resolve a role on a host. ``num_ranks``: those of all roles there, which share its cores."""
    section, settings, machine = config.role(role), config.engine_settings(role), host.machine
    given_environ = {**host.environ, **settings.env}
    visible = _visible(host, settings)
    device = _device(settings, machine, visible)
    on_cpu = device == "cpu"
    dtype = _dtype(settings, model.shape, device, machine)
    max_model_len = _max_model_len(settings, model.shape)
    batched_tokens = settings.max_num_batched_tokens or (
        CPU_BATCHED_TOKENS if on_cpu else CUDA_BATCHED_TOKENS
    )
    kv_cache_bytes = settings.kv_cache_memory or (CPU_KV_CACHE_BYTES if on_cpu else None)
    if settings.engine == "vllm" and on_cpu and kv_cache_bytes is not None:
        kv_cache_bytes = whole_gibibytes(kv_cache_bytes)
    num_threads = settings.num_threads or max(1, len(machine.cpus) // num_ranks)
    cumem = _cumem_allocator(settings)
    return RoleEngines(
        role=role,
        replicas=section.replicas,
        tp_size=settings.tensor_parallel_size,
        num_ranks=section.replicas * settings.tensor_parallel_size,
        settings=settings,
        overrides=frozenset(set_paths(section)),
        given=frozenset(set_paths(section)) | config.model_fields_set,
        ports=section.ports(),
        host=host.name,
        machine=machine,
        bind_address=host.bind_address,
        advertise_address=host.advertise_address,
        model=model,
        device=device,
        gpus=visible.gpus,
        gpus_problem=visible.problem,
        first_gpu_rank=0,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_batched_tokens=batched_tokens,
        kv_cache_bytes=kv_cache_bytes,
        num_threads=num_threads,
        # A CPU computes the step itself: nobody is free to prepare the next one meanwhile.
        async_scheduling=settings.async_scheduling and not on_cpu,
        cumem_allocator=cumem,
        allocator=_allocator(device, cumem, given_environ),
        footprint=None
        if model.shape is None or dtype is None or max_model_len is None
        else make_footprint(
            model.shape,
            settings,
            tp_size=settings.tensor_parallel_size,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_batched_tokens=batched_tokens,
            kv_cache_bytes=kv_cache_bytes,
        ),
        unverified=unverified,
        given_environ=given_environ,
        environment=_environment(
            config,
            role,
            settings,
            device,
            machine,
            given_environ,
            num_threads,
            kv_cache_bytes,
            is_verified=not unverified,
            network=KVNetwork(
                host.bind_address, config.kv_transfer.data_ports, machine.rdma_devices
            )
            if has_far_peers and config.kv_transfer.trusted_network
            else None,
        ),
        has_far_peers=has_far_peers,
    )


def _unverified(
    config: LaunchConfig, environ: Mapping[str, str], models: Mapping[Role, Model]
) -> str:
    """Return why blocks are not proven; it takes the engines of both roles to prove them."""
    if not config.kv_transfer.verify:
        return "kv_transfer.verify is off"
    for role in PAIR:
        settings = config.engine_settings(role)
        if not config.role(role).replicas or settings.engine != "vllm":
            continue
        if reason := unverified_because(settings, environ, models[role]):
            return reason
    return ""


def _environment(
    config: LaunchConfig,
    role: Role,
    settings: EngineSettings,
    device: DeviceKind,
    machine: Machine,
    given_environ: Mapping[str, str],
    num_threads: int,
    kv_cache_bytes: int | None,
    *,
    is_verified: bool,
    network: KVNetwork | None,
) -> dict[str, str]:
    """Return the variables that the processes of an engine get over the supervisor's.

    ``network``: of a role with peers on other hosts; None where KV blocks may not use it.
    """
    common = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        # Models are folders by now; a rank that asks a hub would only wait for a time-out.
        "HF_HUB_OFFLINE": given_environ.get("HF_HUB_OFFLINE", "1"),
    }
    if settings.engine == "vllm":
        own = vllm_environment(kv_cache_bytes if device == "cpu" else None, settings)
        is_quiet = is_verified and role in PAIR
        quiet = ",".join(local_transports(given_environ, device)) if is_quiet else ""
        # pdlaunch's connector makes NIXL's agent such that UCX can do without a listener.
        return common | own | settings.env | ({"UCX_TLS": quiet} if quiet else {})
    if role not in PAIR:
        return common | settings.env
    # NIXL refuses a UCX_TLS without CUDA on a host with GPUs, even to a rank on the CPU that sees
    # none.
    of_host: DeviceKind = "cuda" if machine.gpus or machine.has_hidden_gpus else device
    # Last: what the connector needs narrows what the user has set.
    transfer = config.kv_transfer
    own = transfer.environment(given_environ, of_host)
    if network is not None:
        own |= transfer.network_environment(given_environ, of_host, network)
    return common | settings.env | own


def count_ranks(config: LaunchConfig) -> int:
    """Return the number of ranks of all engines."""
    return sum(
        config.role(role).replicas * config.engine_settings(role).tensor_parallel_size
        for role in ROLES
    )


def _device(settings: EngineSettings, machine: Machine, visible: VisibleGpus) -> DeviceKind:
    if settings.device != "auto":
        return settings.device
    # A variable that is wrong must not turn the role into one on the CPU.
    return "cuda" if visible.gpus or (visible.problem and machine.gpus) else "cpu"


def _dtype(
    settings: EngineSettings, shape: ModelShape | None, device: DeviceKind, machine: Machine
) -> DTypeName | None:
    """Return the dtype; ``auto`` is the checkpoint's.

    But float32 where the CPU would emulate a 16-bit type (measured: 6 times slower prefill).
    """
    if settings.dtype != "auto":
        return settings.dtype
    if device == "cpu" and not machine.has_native_bf16:
        return "float32"
    if shape is None:
        return None
    match shape.dtype:
        case "bfloat16" | "float16":
            return shape.dtype
        case _:
            return "float32"


def _max_model_len(settings: EngineSettings, shape: ModelShape | None) -> int | None:
    """Return the longest request; a length that the model was not made for is cut to its limit."""
    if shape is None:
        return settings.max_model_len
    limit = shape.max_position_embeddings
    return min(settings.max_model_len or limit, limit)


def _cumem_allocator(settings: EngineSettings) -> bool | None:
    """Return whether memory comes from CuMem pools, which sleep mode turns on.

    None: sleep mode is on, and the pools are switched off by name.
    """
    if settings.enable_sleep_mode:
        return None if settings.enable_cumem_allocator is False else True
    return settings.enable_cumem_allocator is True


def _allocator(device: DeviceKind, cumem: bool | None, environ: Mapping[str, str]) -> Allocator:
    if device == "cpu":
        return "host"
    if cumem:
        return "cumem"
    return "expandable_segments" if read_allocator_conf(environ).expandable_segments else "cuda"
