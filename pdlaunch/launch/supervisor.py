"""Runs one launch: waits for events, updates the state, and performs the actions of ``reconcile``.

``drive`` is the loop, which blocks only in the wait for events. Processes get the parts of the
registry that they need: addresses, and the pairs that are proven.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import msgspec

from pdlaunch.config.model_files.weights import only_text
from pdlaunch.launch import state
from pdlaunch.launch.bootstraps import Bootstraps
from pdlaunch.launch.engines import with_peers
from pdlaunch.launch.events import Event
from pdlaunch.launch.hosts.local import LocalHost, MessageReceived
from pdlaunch.launch.observe import observe
from pdlaunch.launch.places import EnginePlaces
from pdlaunch.launch.reconcile import reconcile
from pdlaunch.launch.status import LaunchPhase, Observer
from pdlaunch.planning.plan import Plan, ProcessSpec
from pdlaunch.protocol import control


def next_registry(
    current: control.Registry, wanted: state.Desired, seen: state.Observed
) -> control.Registry:
    """Return the next version of the registry, or the current one if nothing has changed."""
    listed = (_entry(process, wanted, seen) for process in seen.processes())
    entries = [entry for entry in listed if entry is not None]
    pairs = list(seen.pairs.proven.values())
    if (entries, pairs, wanted.withheld) == (current.entries, current.pairs, current.withheld):
        return current
    return control.Registry(
        version=current.version + 1,
        entries=entries,
        withheld=wanted.withheld,
        pairs=pairs,
        ends={name: dict(counts) for name, counts in seen.ends.items()},
        text_files=only_text(seen.model.get("server", {})),
    )


def _entry(
    process: state.Instance, wanted: state.Desired, seen: state.Observed
) -> control.Entry | None:
    """Return the entry of a process, or None; a server that cannot work has one with the reason."""
    spec, registration = process.spec, process.registration
    # The registry has no entry for a dead process: for peers, an absent entry is a death.
    listed = cast(control.ListedState, process.state.value) if process.alive else None
    withheld: control.Withheld = ""
    reason = ""
    if listed == "ready" and process.is_stalled:
        listed = "stalled"
    elif listed == "ready" and process.sleep_state != "awake":
        listed = process.sleep_state
    if spec.kind == "server" and (engine := seen.engines.get(spec.engine)) is not None:
        withheld = wanted.engines[engine.name].withheld
        reason = engine.failed_for or control.WHY_WITHHELD[withheld].format(spec.engine)
        if engine.is_given_up:
            listed, registration = "failed", None
            reason = f"{engine.failed_for}; tried again {engine.retry_s:g} s later"
        if registration is None and (engine.failed_for or withheld == "leaving"):
            # An entry without an address: routers would count an engine without an entry as lost.
            registration = control.Register(name=process.name, incarnation=process.incarnation)
            if listed != "starting":
                listed = "failed" if engine.failed_for else "draining"
    if registration is None or listed is None:
        return None
    return control.Entry(
        name=process.name,
        kind=spec.kind,
        host=spec.host,
        incarnation=process.incarnation,
        engine=spec.engine,
        role=spec.role,
        devices=spec.devices,
        tp_rank=spec.tp_rank,
        tp_size=spec.tp_size,
        engine_id=registration.engine_id,
        address=registration.address,
        capabilities=registration.capabilities,
        state=listed,
        reason=reason,
        peers=spec.peers if spec.kind == "server" else None,
        withheld=withheld,
    )


def view_of(spec: ProcessSpec, registry: control.Registry) -> control.Registry:
    """Return what a process gets: all for a router, else its engine's entries and its peers'."""
    if spec.peers is None:
        return registry
    circle = {spec.engine, *spec.peers}
    entries = [entry for entry in registry.entries if entry.engine in circle]
    # Only the pairs that the process itself has proven.
    pairs = [pair for pair in registry.pairs if pair.local == spec.name]
    return msgspec.structs.replace(registry, entries=entries, pairs=pairs, ends={}, text_files={})


logger = logging.getLogger(__name__)

LOOK_FOR_HOST_S = 1.0


@dataclass(eq=False)
class Supervisor:
    """Controls the processes of one launch. ``seen.failure``, ``seen.was_ready``: the outcome."""

    plan: Plan
    host: LocalHost
    bootstraps: Bootstraps
    places: EnginePlaces
    observer: Observer
    timing: state.Timing
    clock: Callable[[], float]
    has_changed: bool = True  # an event has changed the state, so ``tick`` is due
    _registry: control.Registry = field(
        default_factory=lambda: control.Registry(version=0, entries=[], withheld="starting")
    )
    # Entries and pairs that each process got last.
    _sent: dict[str, tuple[list[control.Entry], list[control.PairReady]]] = field(
        default_factory=dict
    )
    _answers: list[state.SendMessage] = field(default_factory=list)
    _next_at: float = -math.inf

    def __post_init__(self) -> None:
        pairs = state.Pairs(self.plan, self.places.kind)
        self.seen = state.Observed(pairs, self.clock())
        self.seen.add(self.plan.processes)
        self.wanted = state.Desired(self.timing, {name: state.Goal() for name in self.seen.engines})
        self._ticked_at = self.clock()

    @property
    def done(self) -> bool:
        return self.seen.phase is LaunchPhase.STOPPED

    def next_tick_at(self) -> float:
        return -math.inf if self.has_changed else self._next_at

    def handle(self, event: Event) -> None:
        """Update the state with one event; the next ``tick`` performs the actions."""
        found = self.seen.find(event.name) if isinstance(event, MessageReceived) else None
        if not isinstance(event, MessageReceived) or found is None:
            self._observe(event)
            return
        process, message = found[1], event.message
        if isinstance(message, control.Alive) and not process.is_stalled:
            # Heartbeats are frequent and change nothing else: no tick is due.
            process.seen_at = self.clock()
            return
        if isinstance(message, control.PairReady) and self.seen.find(message.peer) is not None:
            event = replace(event, message=self.places.judged(message))
        self._observe(event)
        if isinstance(message, control.Register) and process.registration is message:
            # A new process needs the registry now, not at its next change.
            self.host.send(process.name, view_of(process.spec, self._registry))

    def _observe(self, event: Event) -> None:
        plan = self.places.plan
        self._perform(observe(self.wanted, self.seen, event, self.clock(), plan))
        self.has_changed = True

    def tick(self) -> None:
        """Perform all due actions, then send changes to processes and the observer."""
        now = self.clock()
        if now - self._ticked_at > self.wanted.timing.hang_timeout_s / 2 > 0:
            # The supervisor itself was stopped (Ctrl-Z, a frozen container): restart the limits.
            for process in self.seen.processes():
                process.seen_at = now
        self._ticked_at, self.has_changed = now, False
        was_ready = self.seen.was_ready
        actions: list[state.Action] | None = None
        while actions != []:
            actions, self._next_at = reconcile(self.wanted, self.seen, now)
            self._perform(actions)
        status = self.seen.status()
        becomes_ready = self.seen.was_ready and not was_ready
        if becomes_ready:
            logger.info("serving at %s", status.url)
        self._publish()
        self.observer.changed(status)
        if becomes_ready:
            self.observer.ready(status)

    def _publish(self) -> None:
        """Send changes of the registry, then answers: who reads "done" must find the change."""
        registry = next_registry(self._registry, self.wanted, self.seen)
        if registry is not self._registry:
            self._registry = registry
            # Tell all processes at once: a process with an old registry could use a dead peer.
            for entry in registry.entries:
                found = self.seen.find(entry.name)
                if found is None or found[1].registration is None:
                    continue
                view = view_of(found[1].spec, registry)
                content = (view.entries, view.pairs)
                if view is registry or self._sent.get(entry.name) != content:
                    self._sent[entry.name] = content
                    self.host.send(entry.name, view)
        answers, self._answers = self._answers, []
        for answer in answers:
            self.host.send(answer.process, answer.message)

    def _choose_peers(self) -> None:
        members = [p for engine in self.seen.engines.values() for p in engine.processes]
        specs = with_peers([process.spec for process in members])
        for process, spec in zip(members, specs, strict=True):
            process.spec = spec
        self.seen.pairs.use(self.seen.plan())

    def _perform(self, actions: Sequence[state.Action]) -> None:
        for action in actions:
            match action:
                case state.Start(unit=name):
                    self._start(name)
                case state.SendSignal(process=name, number=number):
                    self.host.signal(name, number)
                case state.SendMessage(message=control.Answered()):
                    self._answers.append(action)
                case state.SendMessage(process=name, message=message):
                    self.host.send(name, message)
                case control.Happened(text=text):
                    logger.info("%s", text)
                    self.observer.note(text)
                    for router in self.seen.routers:
                        self.host.send(router.name, action)
                case state.ForgetEngine(engine=engine):
                    self.places.forget(engine)
                    self.bootstraps.forget(engine)
                    self.host.forget(engine)
                    self._choose_peers()
                case state.Chore.ADD_ENGINES:
                    assert self.wanted.change is not None
                    self.seen.add(self.places.begin(self.wanted.change))
                    self._choose_peers()
                case state.Chore.CLOSE_LISTENERS:
                    for listener in self.bootstraps.listeners:
                        listener.close()

    def _start(self, name: str) -> None:
        """Start a unit, or schedule another try if one of its hosts is not present."""
        now = self.clock()
        unit = next(unit for unit in self.seen.units if unit.name == name)
        if not self.places.is_there(unit):
            unit.start_at = now + LOOK_FOR_HOST_S
            return
        # This limits restarts. During the launch's start, ``startup_timeout_s`` expires earlier.
        unit.begin(kill_at=now + self.wanted.timing.startup_timeout_s)
        for process in unit.processes:
            bootstrap = self.bootstraps.make(process.spec, unit.incarnation, self.places.resolved)
            pinned = self.seen.model.get(process.spec.reads, {})
            bootstrap = msgspec.structs.replace(bootstrap, pinned=pinned)
            stillborn = self.host.spawn(process.spec, unit.incarnation, bootstrap)
            if stillborn is not None:
                self._observe(stillborn)


def drive(
    supervisor: Supervisor, wait: Callable[[float], Sequence[Event]], clock: Callable[[], float]
) -> None:
    """Run a launch to its end; ``wait`` takes a time-out and returns the events so far."""
    supervisor.tick()
    while not supervisor.done:
        # Wake at least once a minute, even if no tick is due.
        timeout_s = min(60.0, max(0.0, supervisor.next_tick_at() - clock()))
        for event in wait(timeout_s):
            supervisor.handle(event)
        if clock() >= supervisor.next_tick_at():
            supervisor.tick()
