"""Holds the processes of a launch by unit and by name, and starts them.

Engines may be added and removed while the launch serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from pdlaunch.launch.bootstraps import Bootstraps
from pdlaunch.launch.engines.plan import with_peers
from pdlaunch.launch.hosts.host import Host
from pdlaunch.launch.instance import Instance, Unit, make_units
from pdlaunch.launch.states import ProcessState
from pdlaunch.planning.plan import Plan, ProcessSpec


class LaunchProcesses:
    """Owns all instances of a plan: conversions, which run first and end, and what serves."""

    def __init__(
        self,
        plan: Plan,
        host: Host,
        bootstraps: Bootstraps,
        clock: Callable[[], float],
        *,
        startup_timeout_s: float,
    ) -> None:
        self._host = host
        self._bootstraps = bootstraps
        self._clock = clock
        self._startup_timeout_s = startup_timeout_s
        self._last_incarnations: dict[str, int] = {}
        """Those of removed units: a new one of the name must not be taken for the old."""
        self.conversions = make_units(plan.conversions)
        self.units = make_units(plan.processes)
        """Router, servers and ranks; conversions are not among them."""
        self._unit_of = {
            instance.name: unit
            for unit in (*self.conversions, *self.units)
            for instance in unit.members
        }
        self._instances = {
            instance.name: instance
            for unit in (*self.conversions, *self.units)
            for instance in unit.members
        }

    def __iter__(self) -> Iterator[Instance]:
        return iter(self._instances.values())

    def __getitem__(self, name: str) -> Instance:
        return self._instances[name]

    def get(self, name: str) -> Instance | None:
        return self._instances.get(name)

    def unit_of(self, instance: Instance) -> Unit:
        return self._unit_of[instance.name]

    def units_of(self, engine: str) -> list[Unit]:
        return [unit for unit in self.units if unit.engine == engine]

    def add(self, specs: Sequence[ProcessSpec]) -> list[Unit]:
        """Take in processes of new engines; they are yet to be spawned."""
        units = make_units(specs)
        for unit in units:
            unit.incarnation = self._last_incarnations.pop(unit.name, 0)
            for instance in unit.members:
                self._unit_of[instance.name] = unit
                self._instances[instance.name] = instance
        # In place: others hold the list.
        self.units.extend(units)
        return units

    def remove(self, engine: str) -> None:
        """Forget an engine whose processes have ended."""
        for unit in self.units_of(engine):
            assert not unit.alive
            self._last_incarnations[unit.name] = unit.incarnation
            self.units.remove(unit)
            for instance in unit.members:
                del self._unit_of[instance.name], self._instances[instance.name]

    def renew_peers(self) -> Plan:
        """Choose the peers of all engines anew; return the plan of what there is."""
        engines = [member for unit in self.units if unit.engine for member in unit.members]
        for member, spec in zip(
            engines, with_peers([member.spec for member in engines]), strict=True
        ):
            member.spec = spec
        return Plan(processes=tuple(member.spec for unit in self.units for member in unit.members))

    @property
    def converted(self) -> bool:
        """Return whether all conversions have ended."""
        return all(
            instance.state is ProcessState.EXITED
            for unit in self.conversions
            for instance in unit.members
        )

    @property
    def all_ready(self) -> bool:
        """Return whether router, servers and ranks are all ready."""
        return all(unit.ready for unit in self.units)

    def url(self) -> str:
        """Return the address of the router; empty until it has registered."""
        for instance in self:
            if instance.spec.kind == "router" and instance.registration is not None:
                return instance.registration.address.http
        return ""

    def spawn_all(self, units: Iterable[Unit]) -> None:
        for unit in units:
            self.spawn(unit)

    def spawn(self, unit: Unit) -> None:
        """Start all processes of a unit under its next incarnation."""
        unit.incarnation += 1
        unit.respawn_at = unit.ready_at = unit.cause = None
        unit.lost_with = ""
        # Before the launch is ready its own deadline comes first; later this one counts.
        unit.kill_at = self._clock() + self._startup_timeout_s
        for instance in unit.members:
            instance.begin(unit.incarnation)
            spec = instance.spec
            # A conversion knows nothing of the supervisor.
            is_conversion = spec.kind == "convert"
            bootstrap = None if is_conversion else self._bootstraps.make(spec, unit.incarnation)
            self._host.spawn(spec, unit.incarnation, bootstrap)
