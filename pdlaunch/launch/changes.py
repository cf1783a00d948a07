"""Plans a change of the engines of a running launch: which start, which stop, on which devices.

Nothing is begun here. The launch with other engines is resolved and judged as at its start, and
engines that stay are left as they run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec

from pdlaunch.checks.probed import Probes
from pdlaunch.checks.rule import Finding
from pdlaunch.checks.run import run_checks
from pdlaunch.config.models import MAX_PORT
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.errors import ConfigError
from pdlaunch.launch.engines.kind import EngineKind
from pdlaunch.launch.engines.plan import kind_of
from pdlaunch.planning.hosts import EnginePlace, Places, ResolvedHost
from pdlaunch.planning.models import Model, read_models
from pdlaunch.planning.resolve import ResolvedLaunch, with_replicas
from pdlaunch.planning.role_engines import RoleEngines
from pdlaunch.planning.roles import PlacedEngine
from pdlaunch.protocol.changes import ChangeEngines, PlannedChange, PlannedEngine

MAX_REPLICAS = 1024

Key = tuple[Role, int]
"""Role and index of an engine."""
BusyGpus = Mapping[tuple[str, int], str]
"""The engine that has a GPU, by host and the GPU's number on that machine."""
_THREADS = frozenset(("OMP_NUM_THREADS", "MKL_NUM_THREADS"))


@dataclass(frozen=True, slots=True)
class PresentEngine:
    """Tells of an engine what a plan needs to know."""

    key: Key
    host: str
    devices: tuple[str, ...]
    """``cuda:N``, as its ranks number them; ``cpu`` otherwise."""
    serves: bool
    is_drained: bool

    @property
    def name(self) -> str:
        return f"{self.key[0]}-{self.key[1]}"


@dataclass(frozen=True, slots=True)
class EngineChange:
    """Holds a change that has been judged and can be begun."""

    resolved: ResolvedLaunch
    """The launch once it is done."""
    starts: tuple[PlacedEngine, ...]
    stops: tuple[str, ...]
    stops_first: bool
    """The new engines need what the old ones have."""
    notes: tuple[str, ...] = ()
    """Warnings of ``check-config`` that the launch did not have before."""

    def planned(self, drain_s: float) -> PlannedChange:
        """Return what people are told of it."""
        replicas = Counter(engine.engines.role for engine in self.resolved.engines)
        return PlannedChange(
            replicas={role: replicas[role] for role in ROLES},
            starts=[
                PlannedEngine(
                    name=engine.name,
                    role=engine.engines.role,
                    host=engine.host.name,
                    devices=[f"cuda:{each}" for each in engine.device_indices] or ["cpu"],
                    num_threads=engine.engines.num_threads,
                )
                for engine in self.starts
            ],
            stops=list(self.stops),
            stops_first=self.stops_first,
            drain_s=drain_s,
        )


class ChangePlanner:
    """Plans changes of one launch, as it is ``resolved`` now.

    ``present``: the names of hosts that are there. ``taken``: names that no new engine may have.
    """

    def __init__(
        self,
        resolved: ResolvedLaunch,
        kind: EngineKind,
        present: Collection[str],
        running: Sequence[PresentEngine],
        taken: Collection[str] = (),
    ) -> None:
        self._resolved = resolved
        self._kind = kind
        self._present = present
        self._taken = taken
        self._running = {engine.key: engine for engine in running}

    def plan(self, wanted: ChangeEngines) -> EngineChange:
        """Plan what is wanted. Raises ConfigError with the reason why it cannot be.

        A change without engines to start or stop means that there is nothing to do.
        """
        if wanted.turn:
            return self._turn(wanted)
        counts = Counter(role for role, _ in self._running)
        stops: list[PresentEngine] = []
        starts: list[Key] = []
        for role, number in wanted.replicas.items():
            if not 0 <= number <= MAX_REPLICAS:
                raise ConfigError(
                    f"{role}={number} is no number of engines",
                    field=f"{role}.replicas",
                    value=number,
                    fix=f"write a number from 0 to {MAX_REPLICAS}",
                )
            stops += self._victims(role, counts[role] - number)
            starts += self._new_keys(role, number - counts[role])
        return self._change(starts, stops, stops_first=False)

    def _turn(self, wanted: ChangeEngines) -> EngineChange:
        """Plan an engine anew under another role, on the devices that it has."""
        engine = next(each for each in self._running.values() if each.name == wanted.turn)
        role = wanted.role
        if role is None or engine.key[0] == role:
            return EngineChange(self._resolved, (), (), stops_first=True)
        return self._change(list(self._new_keys(role, 1)), [engine], stops_first=True)

    def _victims(self, role: Role, number: int) -> list[PresentEngine]:
        """Return the engines of a role that are stopped: those that do not serve first, then
        those that are drained, then those with the highest numbers.
        """
        engines = [engine for engine in self._running.values() if engine.key[0] == role]
        engines.sort(key=lambda each: (each.serves, each.is_drained, -each.key[1]))
        return engines[: max(0, number)]

    def _new_keys(self, role: Role, number: int) -> Iterator[Key]:
        """Yield the lowest free numbers of the role."""
        index = 0
        while number > 0:
            if (role, index) not in self._running and f"{role}-{index}" not in self._taken:
                yield role, index
                number -= 1
            index += 1

    def _change(
        self, starts: Sequence[Key], stops: Sequence[PresentEngine], *, stops_first: bool
    ) -> EngineChange:
        if not starts and not stops:
            return EngineChange(self._resolved, (), (), stops_first=False)
        gone = {engine.key for engine in stops}
        places = dict(self._resolved.places)
        kept = {key: shares for key, shares in places.items() if key not in gone}
        models = self._models({role for role, _ in starts})
        busy = self._busy(self._running.values())
        free_then = self._busy(each for each in self._running.values() if each.key not in gone)
        own = {gpu: "" for gpu, name in busy.items() if gpu not in free_then}
        placed = None if stops_first else self._place(starts, kept, models, busy, {})
        if placed is not None and stops:
            # Old and new engines share the machine for a while.
            together = self._resolved.with_engines({**places, **placed}, models)
            stops_first = any(each.severity == "error" for each in self._new_findings(together))
        if placed is None or stops_first:
            stops_first = bool(stops)
            homes = {engine.host for engine in stops}
            placed = self._place(starts, kept, models, free_then, own, homes)
        if placed is None:
            raise self._no_room(starts, free_then)
        resolved = self._resolved.with_engines({**kept, **placed}, models)
        warnings = self._judge(resolved)
        self._require_as_they_run(resolved, kept)
        return EngineChange(
            resolved,
            tuple(each for each in resolved.engines if (each.engines.role, each.index) in placed),
            tuple(engine.name for engine in stops),
            stops_first=stops_first,
            notes=tuple(f"{each.rule} {each.where}: {each.message}" for each in warnings),
        )

    def _models(self, new: Collection[Role]) -> dict[Role, Model]:
        """Return the models of all roles; those of running engines are not read again."""
        known = {role: engines.model for role, engines in self._resolved.roles.items()}
        if known.keys() >= set(new):
            return known
        return read_models(with_replicas(self._resolved.config, dict.fromkeys(new, 1))) | known

    # Places

    def _busy(self, engines: Iterable[PresentEngine]) -> BusyGpus:
        busy: dict[tuple[str, int], str] = {}
        for engine in engines:
            gpus = self._resolved.placed.by_host[engine.host][engine.key[0]].gpus
            for device in engine.devices:
                kind, _, number = device.partition(":")
                if kind == "cuda" and int(number) < len(gpus):
                    busy[engine.host, gpus[int(number)].index] = engine.name
        return busy

    def _place(
        self,
        starts: Sequence[Key],
        kept: Places,
        models: Mapping[Role, Model],
        busy: BusyGpus,
        preferred: Collection[tuple[str, int]],
        homes: Collection[str] = (),
    ) -> dict[Key, EnginePlace] | None:
        """Return hosts and devices for new engines; None: there is no room for one of them.

        ``preferred``, ``homes``: GPUs and hosts that come first.
        """
        placed: dict[Key, EnginePlace] = {}
        taken = dict(busy)
        for key in starts:
            role = key[0]
            for host in self._hosts(role, {**kept, **placed}, homes):
                place = EnginePlace(host.name)
                tried = self._resolved.with_engines({**kept, **placed, key: place}, models)
                engines = tried.placed.by_host[host.name][role]
                devices = _devices(engines, host.name, taken, preferred)
                if devices is None:
                    continue
                placed[key] = EnginePlace(host.name, devices or None)
                for device in devices:
                    taken[host.name, engines.gpus[device].index] = f"{role}-{key[1]}"
                break
            else:
                return None
        return placed

    def _hosts(self, role: Role, places: Places, homes: Collection[str] = ()) -> list[ResolvedHost]:
        """Return the hosts that may take an engine, the best first: its ``homes``, then the least
        crowded of those near its peers.
        """
        by_name = {host.name: host for host in self._resolved.hosts}
        peers = [
            by_name[place.host]
            for (other, _), place in places.items()
            if role in PAIR and other in PAIR and other != role
        ]
        near, domains = {host.name for host in peers}, {host.domain for host in peers}
        num_engines = Counter(place.host for place in places.values())
        candidates = [
            host
            for host in self._resolved.hosts
            if role in host.roles and host.name in self._present
        ]
        return sorted(
            candidates,
            key=lambda host: (
                host.name not in homes,
                bool(host.machine.cpus) and num_engines[host.name] >= len(host.machine.cpus),
                host.domain not in domains,
                host.name not in near,
            ),
        )

    def _no_room(self, starts: Sequence[Key], busy: BusyGpus) -> ConfigError:
        role = starts[0][0]
        size = self._resolved.config.engine_settings(role).tensor_parallel_size
        hosts = self._hosts(role, self._resolved.places)
        there = "; ".join(
            f"{host.name} has {len(host.machine.gpus)}"
            + "".join(
                f", GPU {gpu.index} of {busy[host.name, gpu.index]}"
                for gpu in host.machine.gpus
                if (host.name, gpu.index) in busy
            )
            for host in hosts
        )
        names = ", ".join(f"{each}-{index}" for each, index in starts)
        return ConfigError(
            f"there is no room for {names}: an engine needs {size} free "
            f"{'GPU' if size == 1 else 'GPUs'} of one host, and "
            f"{there or f'no host takes {role} engines'}",
            field=f"{role}.replicas",
            fix="stop an engine of another role in the same command, or free GPUs",
        )

    # Judgement

    def _judge(self, resolved: ResolvedLaunch) -> list[Finding]:
        """Return the new warnings; raise ConfigError for what keeps the launch from being so."""
        if not resolved.engines:
            raise ConfigError(
                "no engine would be left",
                field="prefill.replicas",
                value=0,
                fix="keep prefill and decode engines, or engines of both roles; Ctrl-C at "
                "`pdlaunch serve` ends the launch",
            )
        resolved.require_startable()
        if kind_of(resolved).name != self._kind.name:
            raise ConfigError("the new engines are of another kind", field="engine")
        for engine in resolved.engines:
            port = engine.engines.http_port(engine.index)
            if port > MAX_PORT:
                raise ConfigError(
                    f"{engine.name} would need port {port}",
                    field=f"{engine.engines.role}.port",
                    value=port,
                    fix="start the launch with a lower port",
                )
            if engine.engines.model.pending:
                raise ConfigError(
                    f"the model of {engine.name} is not ready: {engine.engines.model.pending}",
                    field=f"{engine.engines.role}.model",
                    value=engine.engines.model.name,
                    fix="convert or download it with `pdlaunch serve` first",
                )
        found = self._new_findings(resolved)
        errors = [finding for finding in found if finding.severity == "error"]
        if errors:
            first = errors[0]
            others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            raise ConfigError(
                f"{first.rule} {first.where}: {first.message}{others}",
                fix=f"{first.fix} `pdlaunch explain {first.rule}` says more.",
            )
        return [finding for finding in found if finding.severity == "warning"]

    def _new_findings(self, resolved: ResolvedLaunch) -> list[Finding]:
        """Return what rules find in a launch that they do not find in this one."""
        return [each for each in self._found(resolved) if each.rule not in self._known]

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(finding.rule for finding in self._found(self._resolved))

    def _found(self, launch: ResolvedLaunch) -> tuple[Finding, ...]:
        return run_checks(launch, {}, Probes(), rules=self._kind.rules()).findings

    def _require_as_they_run(self, resolved: ResolvedLaunch, kept: Places) -> None:
        """Raise ConfigError where an engine that stays would have to be started anew."""
        before = {(each.engines.role, each.index): each for each in self._resolved.engines}
        for engine in resolved.engines:
            key = (engine.engines.role, engine.index)
            if key not in kept:
                continue
            old, new = (self._as_started(each) for each in (before[key], engine))
            if old != new:
                names = ", ".join(sorted(name for name in new if new[name] != old.get(name)))
                raise ConfigError(
                    f"{engine.name} would have to run with other values of {names}, and it is not "
                    "started anew",
                    field=f"{engine.engines.role}.replicas",
                    fix="start the launch with these engines",
                )

    def _as_started(self, engine: PlacedEngine) -> dict[str, object]:
        """Return what the processes of an engine are started with, threads apart: each keeps its
        own.
        """
        values: dict[str, object] = {}
        for process in self._kind.processes(engine):
            plain = msgspec.structs.asdict(
                msgspec.structs.replace(process, num_threads=1, environment={}, devices=())
            )
            variables = {
                name: value for name, value in process.environment.items() if name not in _THREADS
            }
            values |= {f"{process.name}: {name}": value for name, value in plain.items()}
            values |= {f"{process.name}: {name}": value for name, value in variables.items()}
        return values


def _devices(
    engines: RoleEngines, host: str, busy: BusyGpus, preferred: Collection[tuple[str, int]]
) -> tuple[int, ...] | None:
    """Return devices for the ranks of one engine; None: there is no room. Empty on a CPU."""
    if engines.device == "cpu":
        return ()
    free = [place for place, gpu in enumerate(engines.gpus) if (host, gpu.index) not in busy]
    free.sort(key=lambda place: (host, engines.gpus[place].index) not in preferred)
    return tuple(free[: engines.tp_size]) if len(free) >= engines.tp_size else None
