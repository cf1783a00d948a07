"""Resolves settings, machines and shapes of models into a ``ResolvedLaunch``: rules check it,
``serve`` starts it, ``--dry-run`` prints it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.hosts import LOCAL
from pdlaunch.config.model_files.find import not_cached
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.config.sources import shown_config
from pdlaunch.machine.facts import Machine
from pdlaunch.planning.models import Model, choose_engine, read_models
from pdlaunch.planning.plan import ResolvedHost, mask_environment, one_host
from pdlaunch.planning.role_engines import RoleEngines
from pdlaunch.planning.roles import PlacedEngine, Places, place_roles


@dataclass(frozen=True, slots=True)
class ListenAddress:
    name: str
    host: str
    port: int
    where: str  # dotted path of the setting that gives the port
    on: str = LOCAL  # name of the machine that listens


@dataclass(frozen=True)
class ResolvedLaunch:
    config: LaunchConfig
    # The supervisor's host, which also runs the router, is the first
    hosts: tuple[ResolvedHost, ...]
    environ: Mapping[str, str]  # the supervisor's environment
    by_host: Mapping[str, Mapping[Role, RoleEngines]]  # the roles of each host that has engines
    engines: tuple[PlacedEngine, ...]  # ordered by role as in ``ROLES``, then by index
    # The whole launch, if this is the part of it on one host; otherwise None
    whole: "ResolvedLaunch | None" = None
    engine_reason: str = ""  # the kind of engine that ``auto`` chose, and why

    @cached_property
    def roles(self) -> Mapping[Role, RoleEngines]:
        """Return the engines of each role, with the values derived on its first engine's host."""
        counts = Counter(engine.engines.role for engine in self.engines)
        firsts = {engine.engines.role: engine.engines for engine in reversed(self.engines)}
        return {
            role: replace(firsts[role], replicas=counts[role]) for role in ROLES if counts[role]
        }

    @property
    def machine(self) -> Machine:
        return self.hosts[0].machine

    @property
    def engine_hosts(self) -> tuple[ResolvedHost, ...]:
        launch = self.whole or self
        return tuple(host for host in launch.hosts if host.name in launch.by_host)

    @property
    def spans_hosts(self) -> bool:
        return len((self.whole or self).hosts) > 1

    @property
    def peers(self) -> Mapping[Role, RoleEngines]:
        return (self.whole or self).roles

    @property
    def has_pair(self) -> bool:
        return self.peers.keys() >= set(PAIR)

    def on_host(self, host: ResolvedHost) -> "ResolvedLaunch":
        """Return the part of this launch that runs on a host, for the rules about machines."""
        here = {host.name: self.by_host.get(host.name, {})}
        engines = tuple(
            node for engine in self.engines for node in engine.nodes if node.host is host
        )
        return replace(self, hosts=(host,), by_host=here, engines=engines, whole=self)

    def host(self, name: str) -> ResolvedHost:
        return next(host for host in self.hosts if host.name == name)

    @property
    def conversions(self) -> tuple[str, ...]:
        models = [engines.model for engines in self.roles.values()]
        pending = [model.name for model in models if model.pending and not model.on_hub]
        return tuple(dict.fromkeys(pending))

    @property
    def listeners(self) -> tuple[ListenAddress, ...]:
        router = ListenAddress("router", self.config.host, self.config.port, "port")
        engines = (
            ListenAddress(
                f"server of {engine.name}",
                engine.host.bind_address,
                engine.engines.http_port(engine.index),
                f"{engine.engines.role}.port",
                engine.host.name,
            )
            for engine in self.engines
            if engine.engines.ports
        )
        return (router, *engines)

    @property
    def served_model_name(self) -> str:
        """Return the model's name in the API: the configured name, else its alias or hub name, else
        the name of its folder or .gguf file. Empty if the launch has no engines.
        """
        engines = next(iter(self.roles.values()), None)
        if engines is None:
            return ""
        own = engines.settings.model
        if not engines.model.on_hub:
            path = Path(own).expanduser()
            own = path.stem if path.suffix == ".gguf" else path.resolve().name
        return self.config.served_model_name or own

    def require_startable(self) -> None:
        """Raise ConfigError for a model that cannot be served; one to be converted passes."""
        for engines in self.roles.values():
            if engines.model.error is not None:
                raise engines.model.error
            if engines.model.pending and engines.model.on_hub:
                raise not_cached(engines.model.name, engines.settings.revision)

    def after_conversion(self) -> "ResolvedLaunch":
        """Return the launch with the shapes of converted models. Raises ConfigError."""
        launch = self
        if any(engines.model.pending for engines in self.roles.values()):
            launch = resolve_on(self.config, self.hosts, self.environ, places=self.places)
        launch.require_startable()
        return launch

    @property
    def places(self) -> Places:
        return {engine.key: engine.places for engine in self.engines}

    def with_engines(
        self, places: Places, models: Mapping[Role, Model] | None = None
    ) -> "ResolvedLaunch":
        config = with_replicas(self.config, Counter(role for role, _ in places))
        return resolve_on(config, self.hosts, self.environ, models, places)

    def with_host(self, known: ResolvedHost) -> "ResolvedLaunch":
        """Resolve again with new facts about a host. Engines keep their hosts and devices."""
        hosts = [known if host.name == known.name else host for host in self.hosts]
        return resolve_on(self.config, hosts, self.environ, places=self.places)

    def engine_spec(self, engine: PlacedEngine) -> EngineSpec:
        """Return the spec of a native engine. The launch is startable, its models are converted."""
        engines = engine.engines
        assert engines.model.path is not None
        assert engines.footprint is not None
        return EngineSpec.of(
            self.config,
            engines.role,
            **engines.derived(),
            name=engine.name,
            model_dir=engines.model.path,
            served_model_name=self.served_model_name,
            activation_bytes=engines.footprint.activation_bytes,
            device_indices=engine.device_indices,
            tensor_parallel_size=engines.tp_size,
            bind_address=engines.on.bind_address,
            advertise_address=engines.on.advertise_address,
            http_port=engines.http_port(engine.index),
        )


def with_replicas(config: LaunchConfig, counts: Mapping[Role, int]) -> LaunchConfig:
    """Return the settings with new numbers of engines by role; 0 for a role not in ``counts``."""
    sections: dict[str, object] = {
        role: config.role(role).model_copy(update={"replicas": counts.get(role, 0)})
        for role in ROLES
    }
    return config.model_copy(update=sections)


def resolve(
    config: LaunchConfig,
    machines: Mapping[str, Machine],
    environ: Mapping[str, str],
    models: Mapping[Role, Model] | None = None,
) -> ResolvedLaunch:
    """Resolve a configuration like ``resolve_on``, on machines by name, this one first."""
    return resolve_on(config, one_host(machines, environ), environ, models)


def resolve_on(
    config: LaunchConfig,
    hosts: Sequence[ResolvedHost],
    environ: Mapping[str, str],
    models: Mapping[Role, Model] | None = None,
    places: Places | None = None,
) -> ResolvedLaunch:
    """Resolve a configuration. Never raises: values that cannot be derived are None.

    ``hosts``: the supervisor's own first. ``environ``: the supervisor's. ``models``: read from
    disk when None. ``places``: hosts and devices of engines, if they are placed already.
    """
    config, reason = choose_engine(config, environ)
    found = read_models(config) if models is None else models
    by_host, engines = place_roles(config, hosts, found, places)
    return ResolvedLaunch(
        config, tuple(hosts), dict(environ), by_host, engines, engine_reason=reason
    )


# The effective values for output, with masked secrets


def effective_values(launch: ResolvedLaunch) -> dict[str, object]:
    """Return the configuration and the effective values of each role, as JSON values."""
    return {
        "config": shown_config(launch.config),
        "engine": launch.engine_reason,
        "engines": effective_engines(launch),
    }


def effective_engines(launch: ResolvedLaunch) -> dict[str, dict[str, object]]:
    """Return the effective values of each role's engines; None if known only after start."""
    return {
        role: {
            "replicas": engines.replicas,
            "tensor_parallel_size": engines.tp_size,
            "host": engines.host,
            # None until the agent of the host has joined.
            "bind_address": engines.on.bind_address or None,
            "advertise_address": engines.on.advertise_address or None,
            "served_model_name": launch.served_model_name,
            "model_dir": engines.model.path,
            "block_size": engines.block_size,
            "enable_sleep_mode": engines.settings.enable_sleep_mode,
            "kv_cache_allocator": engines.allocator,
            **engines.derived(),
            "kv_blocks_verified": f"no: {engines.unverified}" if engines.unverified else "yes",
            "environment": mask_environment(engines.environment),
            "memory_of_a_rank": _memory(engines),
        }
        for role, engines in launch.roles.items()
    }


def _memory(engines: RoleEngines) -> dict[str, object] | None:
    """Return the memory of one rank as JSON values; None while its model is not known."""
    needed = engines.footprint
    if needed is None:
        return None
    known: dict[str, object] = {
        "weight_bytes": needed.weight_bytes,
        "kv_cache_bytes": engines.kv_cache_bytes,
    }
    if needed.layout is None:
        # vLLM chooses the number of blocks, and its activations are not known.
        return known
    return known | {
        "activation_bytes": needed.activation_bytes,
        "num_blocks": engines.num_blocks,
        "host_tier_bytes": engines.host_tier_bytes,
        "block_bytes": needed.layout.block_bytes,
        "blocks_for_longest_request": needed.min_kv_bytes // needed.layout.block_bytes,
    }
