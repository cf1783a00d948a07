"""Keeps where the engines of a launch run, and finds room for those whose host is lost: on that
host once it is back, else on another one.

Nothing is moved while its host is there, and engines whose ranks are on several hosts wait for
theirs.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec

from pdlaunch.checks.probed import Probes
from pdlaunch.checks.run import run_checks
from pdlaunch.launch.bootstraps import Bootstraps
from pdlaunch.launch.changes import ChangePlanner, EngineChange, PresentEngine
from pdlaunch.launch.engines.kind import EngineKind
from pdlaunch.launch.state import Instance, Unit
from pdlaunch.planning.hosts import EnginePlace, ResolvedHost
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import RoleEngines
from pdlaunch.planning.roles import PlacedEngine
from pdlaunch.protocol.changes import ChangeEngines

_OF_MEMORY = frozenset(("PD207", "PD210", "PD212"))
"""Rules on memory, of all engines that might be moved together; each is judged by its devices."""


class Places:
    """Knows the hosts that are there, and where each engine is placed.

    ``present``: names of hosts that are there, the supervisor's own among them.
    """

    def __init__(
        self,
        resolved: ResolvedLaunch,
        kind: EngineKind,
        bootstraps: Bootstraps,
        present: Collection[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resolved = resolved
        self._kind = kind
        self._bootstraps = bootstraps
        self._present = set(present)
        self._clock = clock
        self._ended_by: dict[str, float] = {}
        """Instants by which lost hosts have ended their processes."""
        self._names_taken_until: dict[str, float] = {}
        """Instants by which the processes of engines have ended that are gone with a lost host."""
        self._readdressed: set[str] = set()
        """Hosts that are back at another address than their processes were planned for."""

    def joined(self, host: ResolvedHost) -> None:
        """Note that a host is back, perhaps at another address."""
        self._present.add(host.name)
        if host.advertise_address == self._resolved.host(host.name).advertise_address:
            # The same machine: an agent ends what it ran before it joins again.
            self._ended_by.pop(host.name, None)
        else:
            self._readdressed.add(host.name)
        self._resolved = self._resolved.with_host(host)
        self._bootstraps.adopt(self._resolved)

    def lost(self, name: str, ended_by: float | None) -> None:
        """Note that a host is lost; until ``ended_by`` its processes may run, None: they do not."""
        self._present.discard(name)
        if ended_by is not None:
            # Another machine of the name may be cut off, too.
            self._ended_by[name] = max(ended_by, self._ended_by.get(name, 0.0))

    def plan(self, wanted: ChangeEngines, engines: Sequence[PresentEngine]) -> EngineChange:
        """Plan a change of the engines. Raises ConfigError with the reason why it cannot be."""
        now = self._clock()
        taken = {name for name, until in self._names_taken_until.items() if now < until}
        planner = ChangePlanner(self._resolved, self._kind, self._present, engines, taken)
        return planner.plan(wanted)

    def begin(self, change: EngineChange) -> list[ProcessSpec]:
        """Add the new engines of a change; return their processes. Those that stop are there until
        ``forget``.
        """
        new = {(one.engines.role, one.index) for one in change.starts}
        places = {key: shares for key, shares in change.resolved.places.items() if key in new}
        self._resolved = self._resolved.with_engines({**self._resolved.places, **places})
        for engine in change.starts:
            self._bootstraps.adopt(self._resolved, engine)
        return [spec for engine in change.starts for spec in self._kind.processes(engine)]

    def forget(self, engine: str) -> None:
        """Forget an engine that is gone; its name stays taken while its processes may run on a host
        that is cut off.
        """
        gone = self._placed(engine)
        self._names_taken_until[engine] = self._ended_by.get(gone.host.name, 0.0)
        left = dict(self._resolved.places)
        del left[gone.engines.role, gone.index]
        self._resolved = self._resolved.with_engines(left)
        self._bootstraps.forget(engine)
        self._bootstraps.adopt(self._resolved)

    def find(self, unit: Unit, units: Sequence[Unit]) -> bool:
        """Return whether a unit, whose processes have ended, can be started; perhaps elsewhere."""
        hosts = {process.spec.host for process in unit.processes}
        # An agent may be alive, and cut off: no engine runs twice.
        if any(self._clock() < self._ended_by.get(name, 0.0) for name in hosts):
            return False
        if hosts <= self._present:
            if unit.engine and hosts & self._readdressed:
                self._readdress(unit)
            return True
        own = [p for other in units if other.engine == unit.engine for p in other.processes]
        # The server and the ranks of an engine are units of their own.
        is_whole = unit.engine and {process.spec.host for process in own} == hosts
        if not is_whole or len(hosts) > 1 or any(process.alive for process in own):
            return False
        others = [p for other in units if other.engine != unit.engine for p in other.processes]
        moved = self._move(unit.engine, hosts.pop(), _taken(others))
        if moved is None:
            return False
        specs = {spec.name: spec for spec in self._kind.processes(moved)}
        for process in own:
            process.spec = specs[process.name]
        return True

    def _placed(self, name: str) -> PlacedEngine:
        return next(engine for engine in self._resolved.engines if engine.name == name)

    def _readdress(self, unit: Unit) -> None:
        """Have the processes of an engine started with the addresses of today."""
        specs = {spec.name: spec for spec in self._kind.processes(self._placed(unit.engine))}
        for process in unit.processes:
            environment = specs[process.name].environment
            process.spec = msgspec.structs.replace(process.spec, environment=environment)

    def _move(self, name: str, lost: str, taken: Mapping[str, Counter[str]]) -> PlacedEngine | None:
        """Place an engine on a host with room; hosts of the same domain come first."""
        engine, domain = self._placed(name), self._resolved.host(lost).domain
        key = (engine.engines.role, engine.index)
        candidates = [
            host
            for host in self._resolved.hosts
            if key[0] in host.roles and host.name in self._present
        ]
        for host in sorted(candidates, key=lambda host: host.domain != domain):
            places = {**self._resolved.places, key: EnginePlace(host.name)}
            moved = self._resolved.with_places(places)
            placed = next(one for one in moved.engines if one.name == name)
            devices = _free_devices(placed.engines, taken[host.name])
            if devices is None or not self._may_move(lost, host):
                continue
            place = EnginePlace(host.name, devices or None)
            self._resolved = moved.with_places({**moved.places, key: place})
            self._bootstraps.adopt(self._resolved, self._placed(name))
            return self._placed(name)
        return None

    def _may_move(self, lost: str, host: ResolvedHost) -> bool:
        """Return whether rules find nothing new where all engines of a lost host are on this one.

        Those that find no room there are judged when they are moved themselves.
        """
        places = {
            (engine.engines.role, engine.index): EnginePlace(host.name)
            for engine in self._resolved.engines
            if engine.host.name == lost
        }
        moved = self._resolved.with_places({**self._resolved.places, **places})
        return self._errors(moved) <= self._errors(self._resolved)

    def _errors(self, launch: ResolvedLaunch) -> set[str]:
        rules = [rule for rule in self._kind.rules() if rule.code not in _OF_MEMORY]
        return {error.rule for error in run_checks(launch, {}, Probes(), rules=rules).errors}


def _taken(processes: Iterable[Instance]) -> Mapping[str, Counter[str]]:
    """Count the ranks on each device of each host."""
    taken: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for process in processes:
        spec = process.spec
        # The server of an engine of another kind has the devices of all its ranks.
        num_ranks = spec.tp_size if spec.devices == ("cpu",) and spec.kind == "server" else 1
        taken[spec.host].update(spec.devices * num_ranks)
    return taken


def _free_devices(engines: RoleEngines, taken: Counter[str]) -> tuple[int, ...] | None:
    """Return devices for the ranks of one engine; None: there is no room. Empty on a CPU."""
    if engines.device == "cpu":
        there = len(engines.machine.cpus)
        return () if taken["cpu"] + engines.tp_size <= there else None
    free = [index for index in range(len(engines.gpus)) if not taken[f"cuda:{index}"]]
    return tuple(free[: engines.tp_size]) if len(free) >= engines.tp_size else None
