"""Tracks where the engines of a launch run, and plans changes of the engines.

A change is resolved and checked like a launch at its start. Engines that stay are not touched.
An engine of a lost host starts again once the host is back.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from pdlaunch.checks.probed import PairTransport, Probes
from pdlaunch.checks.rule import Finding
from pdlaunch.checks.run import run_checks
from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.errors import ConfigError
from pdlaunch.launch.engines import EngineKind, kind_of
from pdlaunch.launch.state import EngineChange, Unit
from pdlaunch.planning.models import Model, read_models
from pdlaunch.planning.plan import ProcessSpec, ResolvedHost
from pdlaunch.planning.resolve import ResolvedLaunch, with_replicas
from pdlaunch.planning.role_engines import device_kind, visible_on
from pdlaunch.planning.roles import EnginePlace, Key, PlacedEngine, Places
from pdlaunch.protocol.control import ChangeEngines, PairReady, PlannedChange, PlannedEngine
from pdlaunch.protocol.engine_link import engine_of_rank

Models = Mapping[Role, Model]
GpuKey = tuple[str, int]  # a host and the number of a GPU on that machine


@dataclass(eq=False)
class EnginePlaces:
    """Tracks which hosts are present, and where each engine of the launch is placed."""

    resolved: ResolvedLaunch
    kind: EngineKind
    present: set[str]  # names of the present hosts, including the supervisor's own
    clock: Callable[[], float] = time.monotonic
    # By lost host: the instant by which its processes have ended.
    _ended_by: dict[str, float] = field(default_factory=dict)
    # By removed engine: the instant by which its processes on lost hosts have ended.
    _names_taken_until: dict[str, float] = field(default_factory=dict)
    # Hosts that are back at a new address; the plans of their processes have the old one.
    _readdressed: set[str] = field(default_factory=set)

    # Hosts that come and go

    def joined(self, host: ResolvedHost) -> None:
        """Record that a host is back, perhaps at another address."""
        self.present.add(host.name)
        if host.advertise_address == self.resolved.host(host.name).advertise_address:
            # The same machine: its agent ended all processes before it joined again.
            self._ended_by.pop(host.name, None)
        else:
            self._readdressed.add(host.name)
        self.resolved = self.resolved.with_host(host)

    def lost(self, name: str, ended_by: float | None) -> None:
        """Record that a host is lost. Its processes end by ``ended_by``; None: they have ended."""
        self.present.discard(name)
        if ended_by is not None:
            # An earlier machine of this name may be cut off and still run processes.
            self._ended_by[name] = max(ended_by, self._ended_by.get(name, 0.0))

    def is_there(self, unit: Unit) -> bool:
        """Return True if a unit without processes can be started on its hosts."""
        hosts = {process.spec.host for process in unit.processes}
        # A cut-off agent may still run the engine, and no engine may run twice.
        if not hosts <= self.present or self.clock() < self._ended_at(hosts):
            return False
        if unit.engine and hosts & self._readdressed:
            specs = {spec.name: spec for spec in self.kind.processes(self._placed(unit.engine))}
            for process in unit.processes:
                spec = specs[process.name]
                process.spec = msgspec.structs.replace(
                    process.spec, environment=spec.environment, command=spec.command
                )
        return True

    def _ended_at(self, hosts: Iterable[str]) -> float:
        return max((self._ended_by.get(host, 0.0) for host in hosts), default=0.0)

    def _placed(self, name: str) -> PlacedEngine:
        return next(engine for engine in self.resolved.engines if engine.name == name)

    # Pairs

    def judged(self, pair: PairReady) -> PairReady:
        prefill, decode = (self._placed(engine_of_rank(end)) for end in (pair.peer, pair.local))
        measured = transport_of(pair, prefill, decode)
        rules = [rule for rule in self.kind.rules() if "transport" in rule.needs]
        found = run_checks(self.resolved, {}, Probes(transport=(measured,)), rules=rules).findings
        slow = "; ".join(f"{each.rule} {each.message}" for each in found)
        return msgspec.structs.replace(pair, slow=slow)

    # Changes

    def begin(self, change: EngineChange) -> list[ProcessSpec]:
        """Add the new engines of a change; return their processes. ``forget`` drops old ones."""
        new = {engine.key for engine in change.starts}
        places = {key: place for key, place in change.resolved.places.items() if key in new}
        self.resolved = self.resolved.with_engines({**self.resolved.places, **places})
        return [spec for engine in change.starts for spec in self.kind.processes(engine)]

    def forget(self, engine: str) -> None:
        """Forget a removed engine. Its name stays reserved while a lost host may still run it."""
        gone = self._placed(engine)
        self._names_taken_until[engine] = self._ended_at(node.host.name for node in gone.nodes)
        left = {key: place for key, place in self.resolved.places.items() if key != gone.key}
        self.resolved = self.resolved.with_engines(left)

    def plan(
        self, wanted: ChangeEngines, serving: Collection[str], drained: Collection[str]
    ) -> EngineChange:
        """Plan a change; without starts and stops, there is nothing to do. Raises ConfigError."""
        starts: list[Key] = []
        stops: list[PlacedEngine] = []
        home: list[str] = []
        if wanted.engine:
            # Plan a new engine in the other role, on the hosts of the old one.
            engine = self._placed(wanted.engine)
            if wanted.role is not None and wanted.role != engine.engines.role:
                starts, stops = list(self._new_keys(wanted.role, 1)), [engine]
                home = [node.host.name for node in engine.nodes]
        for role, number in wanted.replicas.items():
            engines = [e for e in self.resolved.engines if e.engines.role == role]
            starts += self._new_keys(role, number - len(engines))
            # Stop engines that do not serve first, then drained ones, then the highest numbers.
            engines.sort(key=lambda e: (e.name in serving, e.name in drained, -e.index))
            stops += engines[: max(0, len(engines) - number)]
        return self._change(starts, stops, home)

    def _new_keys(self, role: Role, number: int) -> Iterator[Key]:
        now, index = self.clock(), 0
        while number > 0:
            is_taken = now < self._names_taken_until.get(f"{role}-{index}", 0.0)
            if (role, index) not in self.resolved.places and not is_taken:
                yield role, index
                number -= 1
            index += 1

    def _change(
        self, starts: Sequence[Key], stops: Sequence[PlacedEngine], home: Sequence[str]
    ) -> EngineChange:
        """Resolve a change. ``home``: hosts of an engine that changes its role; else empty."""
        gone = {engine.key for engine in stops}
        places = self.resolved.places
        kept = {key: place for key, place in places.items() if key not in gone}
        models = self._models({role for role, _ in starts})
        placed = None if home else self._place(starts, kept, self._busy(()))
        if placed and stops:
            # Start new engines before old ones stop if the machine's memory has room for both.
            together = self.resolved.with_engines({**places, **placed}, models)
            if any(each.severity == "error" for each in self._new_findings(together)):
                placed = None
        if stops_first := placed is None:
            # New engines use the GPUs of the engines that stop.
            busy = self._busy(gone)
            placed = self._place(starts, kept, busy, home)
            if placed is None:
                raise self._no_room(starts, busy)
        resolved = self.resolved.with_engines({**kept, **placed}, models)
        warnings = self._judge(resolved)
        self._require_as_they_run(resolved, kept)
        new = [engine for engine in resolved.engines if engine.key in placed]
        replicas = Counter(engine.engines.role for engine in resolved.engines)
        planned = PlannedChange(
            replicas={role: replicas[role] for role in ROLES},
            starts=[
                PlannedEngine(
                    name=engine.name,
                    role=engine.engines.role,
                    host=engine.host.name,
                    devices=[f"cuda:{each}" for each in engine.device_indices] or ["cpu"],
                    num_threads=engine.engines.num_threads,
                )
                for engine in new
            ],
            stops=dict.fromkeys((engine.name for engine in stops), 0),
            stops_first=stops_first,
            drain_s=0.0,  # set from the command
        )
        texts = [f"{each.rule} {_where(each, new)}: {each.message}" for each in warnings]
        return EngineChange(resolved, new, planned, texts)

    def _models(self, new: set[Role]) -> Models:
        known = {role: engines.model for role, engines in self.resolved.roles.items()}
        if missing := new - known.keys():
            known |= read_models(with_replicas(self.resolved.config, dict.fromkeys(missing, 1)))
        for role, model in known.items():
            if model.pending:
                raise ConfigError(
                    f"the model of {role} is not ready: {model.pending}",
                    field=f"{role}.model",
                    value=model.name,
                    fix="convert or download it with `pdlaunch serve` first",
                )
        return known

    def _busy(self, gone: Collection[Key]) -> dict[GpuKey, str]:
        return {
            gpu: engine.name
            for engine in self.resolved.engines
            if engine.key not in gone
            for gpu in _gpus_of(engine)
        }

    def _place(
        self,
        starts: Sequence[Key],
        kept: Places,
        busy: Collection[GpuKey],
        home: Sequence[str] = (),
    ) -> dict[Key, tuple[EnginePlace, ...]] | None:
        """Return places for new engines, on ``home`` or hosts of their roles; None without room."""
        placed: dict[Key, tuple[EnginePlace, ...]] = {}
        taken = set(busy)
        for key in starts:
            settings = self.resolved.config.engine_settings(key[0])
            hosts = [*map(self.resolved.host, home)] or self._hosts(key[0], {**kept, **placed})
            fits = (_fit(host, settings, taken) for host in hosts)
            placed[key] = tuple(islice(filter(None, fits), settings.nnodes))
            if len(placed[key]) < settings.nnodes:
                return None
        return placed

    def _hosts(self, role: Role, places: Places) -> list[ResolvedHost]:
        """Return the present hosts of a role: those with a free core first, then those of peers."""
        peers = {*PAIR} - {role} if role in PAIR else set()
        near = {nodes[0].host for (other, _), nodes in places.items() if other in peers}
        used = Counter(nodes[0].host for nodes in places.values())
        here = [h for h in self.resolved.hosts if role in h.roles and h.name in self.present]
        return sorted(here, key=lambda h: (used[h.name] >= h.machine.num_cpus, h.name not in near))

    def _no_room(self, starts: Sequence[Key], busy: Mapping[GpuKey, str]) -> ConfigError:
        role = starts[0][0]
        settings = self.resolved.config.engine_settings(role)
        size = settings.ranks_per_node
        where = "one host" if settings.nnodes == 1 else f"each of {settings.nnodes} hosts"
        found = []
        for host in self._hosts(role, self.resolved.places):
            gpus = [(gpu.index, busy.get((host.name, gpu.index))) for gpu in host.machine.gpus]
            owners = "".join(f", GPU {index} used by {owner}" for index, owner in gpus if owner)
            found.append(f"{host.name} has {len(gpus)}{owners}")
        names = ", ".join(f"{each}-{index}" for each, index in starts)
        return ConfigError(
            f"there is no room for {names}: an engine needs {size} free "
            f"{'GPU' if size == 1 else 'GPUs'} of {where}, but "
            f"{'; '.join(found) or f'no host takes {role} engines'}",
            field=f"{role}.replicas",
            fix="stop an engine of another role in the same command, or free GPUs",
        )

    def _judge(self, resolved: ResolvedLaunch) -> list[Finding]:
        """Return the new warnings; raise ConfigError if the launch would not start."""
        if not resolved.engines:
            raise ConfigError(
                "no engine would be left",
                field="prefill.replicas",
                value=0,
                fix="keep prefill and decode engines, or engines of both roles; Ctrl-C at "
                "`pdlaunch serve` ends the launch",
            )
        resolved.require_startable()
        if kind_of(resolved).name != self.kind.name:
            raise ConfigError(f"engines must be {self.kind.name}, as the others", field="engine")
        found = self._new_findings(resolved)
        refuse_errors(found)
        return [finding for finding in found if finding.severity == "warning"]

    def _new_findings(self, resolved: ResolvedLaunch) -> list[Finding]:
        """Return the findings of rules that have no finding in the present launch."""
        known = {finding.rule for finding in findings_of(self.resolved)}
        return [finding for finding in findings_of(resolved) if finding.rule not in known]

    def _require_as_they_run(self, resolved: ResolvedLaunch, kept: Places) -> None:
        """Raise ConfigError if an engine that stays would need a restart: its sockets and its
        connector were set up for the peers at its start.
        """
        before = {engine.key: engine.engines for engine in self.resolved.engines}
        for engine in (engine for engine in resolved.engines if engine.key in kept):
            old, new = before[engine.key], engine.engines
            if (old.has_far_peers, old.unverified) != (new.has_far_peers, new.unverified):
                why = new.unverified or "it would get peers on other hosts, or lose them all"
                raise ConfigError(
                    f"{engine.name} would have to be restarted: {why}",
                    field=f"{engine.engines.role}.replicas",
                    fix="restart the launch with these engines",
                )


def transport_of(pair: PairReady, prefill: PlacedEngine, decode: PlacedEngine) -> PairTransport:
    """Return the facts about a pair of ranks that the transport rules judge."""
    hosts = prefill.host.name, decode.host.name
    on_one_host = len({node.host.name for each in (prefill, decode) for node in each.nodes}) < 2
    return PairTransport(
        decode_rank=pair.local,
        prefill_rank=pair.peer,
        path=pair.path,
        # Decode reads the KV caches of prefill engines.
        allocator=prefill.engines.allocator,
        gigabytes_per_s=pair.gigabytes_per_s,
        hosts=None if on_one_host else hosts,
        shares_gpu=not _gpus_of(prefill).isdisjoint(_gpus_of(decode)),
        piece_bytes=pair.piece_bytes,
        other_paths=pair.other_paths,
    )


def findings_of(resolved: ResolvedLaunch) -> Sequence[Finding]:
    """Return the findings of the rules that need no probes (of files, ports, measured pairs)."""
    return run_checks(resolved, {}, Probes(), rules=kind_of(resolved).rules()).findings


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Raise ConfigError for the first error among the findings."""
    if errors := [finding for finding in findings if finding.severity == "error"]:
        first = errors[0]
        others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ConfigError(
            f"{first.rule} {first.where}: {first.message}{others}",
            fix=f"{first.fix} `pdlaunch explain {first.rule}` says more.",
        )


def _fit(host: ResolvedHost, settings: EngineSettings, taken: set[GpuKey]) -> EnginePlace | None:
    """Return a place on a host, whose GPUs are then ``taken``; None if too few are free."""
    visible = visible_on(host, settings)
    if device_kind(settings, host.machine, visible) == "cpu":
        return EnginePlace(host.name)
    numbers = [(host.name, gpu.index) for gpu in visible.gpus]
    free = [place for place, number in enumerate(numbers) if number not in taken]
    devices = tuple(free[: settings.ranks_per_node])
    if len(devices) < settings.ranks_per_node:
        return None
    taken |= {numbers[place] for place in devices}
    return EnginePlace(host.name, devices)


def _gpus_of(engine: PlacedEngine) -> set[GpuKey]:
    return {
        (node.host.name, node.engines.gpus[device].index)
        for node in engine.nodes
        for device in node.device_indices
        if device < len(node.engines.gpus)  # a host may have fewer after it joined again
    }


def _where(finding: Finding, new: Sequence[PlacedEngine]) -> str:
    """Return the setting of a finding; a role without new engines is replaced by one with them."""
    role, dot, field = finding.where.partition(".")
    roles = [engine.engines.role for engine in new]
    is_other = dot and role in ROLES and role not in roles
    return f"{roles[0]}.{field}" if is_other and roles else finding.where
