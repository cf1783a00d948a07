"""Compares the desired with the observed state of a launch, and returns the next actions.

::

    deaths     dead ── back-off ──▶ started       too many, too quickly ──▶ given up ──▶ tried again
    restarts   draining ── idle, or out of time ──▶ stopping ── all ended ──▶ started, or removed
    changes    starting ── ready and proven ──▶ joined; old engines leave     late, dead ──▶ leaving
    the end    drain router, engines ──▶ stop router, engines ──▶ SIGTERM ──▶ SIGKILL

This module uses no clock, process or socket: the same state and time give the same actions. The
state records an action at once, so that a second call does not return it again.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Collection, Iterator, Sequence

from pdlaunch.config.roles import ROLES, Role
from pdlaunch.launch.actions import (
    Action,
    Chore,
    ForgetEngine,
    Note,
    SendAnswer,
    SendMessage,
    SendSignal,
    Start,
)
from pdlaunch.launch.observe import fail
from pdlaunch.launch.state import (
    Desired,
    Goal,
    Instance,
    LaunchedEngine,
    Observed,
    RunningChange,
    Unit,
)
from pdlaunch.launch.status import Failure, LaunchPhase, ProcessState, startup_timeout
from pdlaunch.protocol.control import Answered, Drain, EngineIdle, Stop

_WORKING = (ProcessState.READY, ProcessState.DRAINING)
_DRAINED_KIND = {LaunchPhase.DRAINING_ROUTER: "router", LaunchPhase.DRAINING_ENGINES: "server"}
_PHASES = tuple(LaunchPhase)


class Moment:
    """The instant of one comparison; collects the instant at which the next one is due."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.next_at = math.inf

    def due(self, at: float | None) -> bool:
        """Return True if an instant has come; remember it if it is in the future."""
        if at is not None and at > self.now:
            self.next_at = min(self.next_at, at)
        return at is not None and at <= self.now


def reconcile(wanted: Desired, seen: Observed, now: float) -> tuple[list[Action], float]:
    """Return what to do next, and the instant at which to ask again without an event."""
    moment = Moment(now)
    actions: list[Action] = []
    if not _must_end(wanted, seen) and seen.phase is not LaunchPhase.READY:
        actions += _start(wanted, seen, moment)
    if not _must_end(wanted, seen) and seen.phase is LaunchPhase.READY:
        actions += _serve(wanted, seen, moment)
    if _must_end(wanted, seen):
        actions += _end(wanted, seen, moment)
    return actions, moment.next_at


def _must_end(wanted: Desired, seen: Observed) -> bool:
    return seen.is_ending or seen.failure is not None or wanted.stop_signal is not None


# The start


def _start(wanted: Desired, seen: Observed, moment: Moment) -> Iterator[Action]:
    conversions = [process for unit in seen.conversions for process in unit.processes]
    is_converted = all(each.state is ProcessState.EXITED for each in conversions)
    if seen.phase is LaunchPhase.PREPARING and is_converted:
        seen.phase = LaunchPhase.STARTING
        yield Chore.PREPARE
        return
    units = seen.units if seen.phase is LaunchPhase.STARTING else seen.conversions
    for unit in units:
        if unit.processes[0].state is ProcessState.PLANNED:
            yield Start(unit.name)
    ready = all(unit.ready for unit in seen.units)
    if seen.phase is LaunchPhase.STARTING and ready and not seen.missing_pairs():
        seen.phase, seen.was_ready = LaunchPhase.READY, True
    elif moment.due(seen.started_at + wanted.timing.startup_timeout_s):
        timeout_s = wanted.timing.startup_timeout_s
        fail(wanted, seen, startup_timeout(seen.status(), timeout_s, seen.missing_pairs()))


# Service


def _serve(wanted: Desired, seen: Observed, moment: Moment) -> Iterator[Action]:
    yield from _watch(wanted, seen, moment)
    if wanted.change is not None:
        yield from _advance(wanted, seen, wanted.change, moment)
    for engine in list(seen.engines.values()):
        goal = wanted.engines[engine.name]
        if engine.retires or goal.restart or goal.withheld == "leaving":
            yield from _retire(wanted, seen, engine, goal, moment)
        elif engine.retry_at is not None:
            yield from _leave_alone(engine, engine.retry_at, wanted, moment)
    for unit in seen.units:
        of = seen.engines.get(unit.engine)
        if of is None or not (of.retires or of.retry_at is not None):
            yield from _keep(wanted, seen, unit, moment)


def _watch(wanted: Desired, seen: Observed, moment: Moment) -> Iterator[Action]:
    """Kill hung processes, the longest silent first: others may hang because of it."""
    if not wanted.timing.hang_timeout_s:
        return
    moment.due(moment.now + wanted.timing.heartbeat_s)
    ready = [(p, u) for u in seen.units for p in u.processes if p.state is ProcessState.READY]
    for process, unit in sorted(ready, key=lambda each: each[0].heard_at):
        silent_s, limit_s = moment.now - process.heard_at, wanted.timing.silence_s(process)
        process.is_stalled = silent_s >= limit_s / 2
        if silent_s >= limit_s and unit.cause is None and not unit.is_killed:
            unit.cause, unit.died_at = process, process.heard_at
            seen.ends[process.name]["hung"] += 1
            process.error = f"hung: its loop did not turn for {silent_s:.0f} s (hang_timeout_s)"
            yield Note(f"{process.label} {process.error}: killed")
            yield from _kill(unit)


def _keep(wanted: Desired, seen: Observed, unit: Unit, moment: Moment) -> Iterator[Action]:
    """Keep a unit running: after a death kill its other processes, then start it again."""
    if unit.alive:
        if unit.cause is not None:
            yield from _kill(unit)
        elif moment.due(unit.kill_at):
            yield from _kill_late(unit)
    elif any(process.state is ProcessState.FAILED for process in unit.processes):
        yield from _after_death(wanted, seen, unit, moment)
    elif unit.processes[0].state is ProcessState.PLANNED or moment.due(unit.start_at):
        unit.start_at = None
        yield Start(unit.name)


def _kill(unit: Unit) -> Iterator[Action]:
    """Kill the living processes of a unit; they leave the registry at once."""
    if unit.is_killed:
        return
    unit.is_killed = True
    for process in unit.processes:
        if process.alive:
            # Now, not when it has ended: peers ask it for as long as the registry lists it.
            process.registration = None
            yield SendSignal(process.name, signal.SIGKILL)


def _kill_late(unit: Unit) -> Iterator[Action]:
    unit.kill_at = None
    yield Note(f"{unit.name} neither became ready nor left in time: killed")
    yield from _kill(unit)


def _after_death(wanted: Desired, seen: Observed, unit: Unit, moment: Moment) -> Iterator[Action]:
    """Wait before a dead unit is started again, or give its engine up."""
    cause, timing = unit.cause, wanted.timing
    if cause is None:
        return  # It was about to join, and the change is taken back.
    unit.kill_at = None
    if unit.lost_with:
        # Its host was lost: this does not count as a quick death.
        for process in unit.processes:
            process.state = ProcessState.BACKING_OFF
        yield Start(unit.name)
        return
    ready_for_s = None if unit.ready_at is None else unit.died_at - unit.ready_at
    is_quick = ready_for_s is None or ready_for_s < timing.quick_s
    unit.num_quick_deaths = unit.num_quick_deaths + 1 if is_quick else 1
    if not is_quick and unit.engine in seen.engines:
        seen.engines[unit.engine].num_times = 0
    if unit.num_quick_deaths >= timing.max_quick_deaths:
        yield from _give_up(wanted, seen, unit, cause, moment)
        return
    delay_s = timing.delay_s(unit.num_quick_deaths)
    yield Note(f"{unit.name} starts again in {delay_s:g} s")
    for process in unit.processes:
        process.state = ProcessState.BACKING_OFF
    unit.start_at = moment.now + delay_s
    moment.due(unit.start_at)


# Engines that are given up


def _give_up(
    wanted: Desired, seen: Observed, unit: Unit, cause: Instance, moment: Moment
) -> Iterator[Action]:
    """Give up an engine that always dies; the launch ends if no other can do its work.

    Deaths by SIGKILL count as well: the kernel sends it to a process that takes too much memory.
    """
    timing, engine = wanted.timing, seen.engines.get(unit.engine)
    summary = (
        f"{unit.name} died {unit.num_quick_deaths} times in a row, each within "
        f"{timing.quick_s:g} s of its start"
    )
    others = [each for each in seen.engines.values() if each is not engine]
    left = [] if engine is None else _left_of(engine.role, others)
    if engine is None or not left:
        failed: list[LaunchedEngine] = []
        if engine is not None:
            # Engines of both roles can do all work.
            all_count = any(each.role == "both" for each in seen.engines.values())
            failed = [each for each in others if all_count or each.role == engine.role]
        details = [f"  before that, {each.failed_for}" for each in failed if each.failed_for]
        failure = Failure(summary, process=cause.name, said=cause.error, details=details)
        fail(wanted, seen, failure)
        return
    engine.failed_for = summary + (f": {cause.error}" if cause.error else "")
    engine.num_times += 1
    engine.retry_s = timing.retry_s(engine.num_times)
    engine.retry_at = moment.now + engine.retry_s
    for other in engine.units:
        # With a cause, its processes die without being reported one by one.
        other.cause = other.cause or cause
    yield Note(
        f"{summary}: {engine.name} is given up and tried again in {engine.retry_s:g} s, "
        f"{', '.join(each.name for each in left)} serves on"
    )
    yield from _leave_alone(engine, engine.retry_at, wanted, moment)


def _left_of(role: Role, engines: Collection[LaunchedEngine]) -> list[LaunchedEngine]:
    """Return the engines that can do the work of a role and were not given up.

    Engines of both roles can do all work, and so can a pair.
    """
    working = [engine for engine in engines if not engine.failed_for]
    of = {each: [engine for engine in working if engine.role == each] for each in ROLES}
    pair = of["prefill"] + of["decode"] if of["prefill"] and of["decode"] else []
    return of[role] or of["both"] or pair


def _leave_alone(
    engine: LaunchedEngine, retry_at: float, wanted: Desired, moment: Moment
) -> Iterator[Action]:
    """Kill the rest of an engine that was given up, and try it again when it is time.

    One quick death of a unit is enough to give the engine up again, for longer.
    """
    for unit in engine.units:
        if unit.alive:
            yield from _kill(unit)
            continue
        unit.kill_at = unit.start_at = None
        for process in unit.processes:
            process.registration, process.state = None, ProcessState.GIVEN_UP
    if engine.alive or not moment.due(retry_at):
        return
    engine.retry_at = None
    yield Note(f"{engine.name} is tried again")
    for unit in engine.units:
        unit.num_quick_deaths = wanted.timing.max_quick_deaths - 1
        yield Start(unit.name)


# Engines that stop because somebody asked


def _retire(
    wanted: Desired, seen: Observed, engine: LaunchedEngine, goal: Goal, moment: Moment
) -> Iterator[Action]:
    """Drain and stop an engine; once its processes have ended, restart or forget it.

    The registry lists its server as draining, so routers give it no new work. A prefill engine is
    idle once decode engines have read its leased blocks. Requests that still run when it is
    stopped continue at another engine.
    """
    if not engine.retires:
        engine.retires, engine.retry_at, engine.num_times = True, None, 0
        engine.awaits_readers = engine.is_idle = False
        for unit in engine.units:
            unit.num_quick_deaths, unit.kill_at, unit.start_at = 0, None, None
        # An engine that does not serve has nothing to finish.
        if engine.ready and goal.drain_s > 0:
            engine.stop_at = moment.now + goal.drain_s
            engine.server.state = ProcessState.DRAINING
            yield SendMessage(engine.server.name, Drain(timeout_s=goal.drain_s))
        else:
            yield from _stop(engine, wanted, moment)
    if engine.stop_at is not None:
        if engine.server.is_drained and engine.role != "prefill":
            engine.is_idle = True
        elif engine.server.is_drained and not engine.awaits_readers:
            engine.awaits_readers = True
            for router in seen.routers:
                yield SendMessage(router.name, EngineIdle(engine=engine.name))
        if engine.is_idle or moment.due(engine.stop_at):
            yield from _stop(engine, wanted, moment)
    if engine.stop_at is not None:
        return
    for unit in engine.units:
        if unit.alive and not unit.is_killed and moment.due(unit.kill_at):
            yield from _kill_late(unit)
    if engine.alive:
        return
    engine.retires = False
    if goal.withheld == "leaving":
        yield Note(f"{engine.name} is gone")
        for process in engine.processes:
            seen.pairs.forget(process.name)
        seen.remove(engine.name)
        del wanted.engines[engine.name]
        yield ForgetEngine(engine.name)
        return
    goal.restart = False
    for unit in engine.units:
        yield Start(unit.name)


def _stop(engine: LaunchedEngine, wanted: Desired, moment: Moment) -> Iterator[Action]:
    """Tell ready processes to stop, by message.

    Starting processes may be busy loading, so they get SIGTERM. Stragglers are killed.
    """
    engine.stop_at = None
    for unit in engine.units:
        if unit.alive:
            unit.kill_at = moment.now + wanted.timing.stop_s
        for process in unit.processes:
            if process.alive:
                process.registration = None
                yield _ask_to_end(process)


def _ask_to_end(process: Instance) -> Action:
    if process.state in _WORKING:
        return SendMessage(process.name, Stop())
    return SendSignal(process.name, signal.SIGTERM)


# Changes of the engines


def _advance(
    wanted: Desired, seen: Observed, change: RunningChange, moment: Moment
) -> Iterator[Action]:
    """Take the next step of a change; the present engines show how far it is.

    A new engine is listed from its start, so that its pairs can be proven. It is given work once
    they are proven.
    """
    withheld = {name: goal.withheld for name, goal in wanted.engines.items()}
    joining = sorted(name for name, why in withheld.items() if why == "joining")
    if "leaving" in withheld.values():
        return
    if joining:
        yield from _join(wanted, seen, change, joining, moment)
        if any(wanted.engines[name].withheld for name in joining):
            return
    starts = [each.name for each in change.plan.starts if each.name not in seen.engines]
    stops = [name for name in change.plan.stops if name in seen.engines]
    if change.error or not (starts or stops):
        wanted.change = None
        yield Note(change.error or f"engines have changed: {change.what}")
        yield SendAnswer(change.asker, Answered(question=change.question, error=change.error))
    elif stops and (change.plan.stops_first or not starts):
        # Tell all of them before the first can be gone.
        for name in stops:
            wanted.engines[name].withheld = "leaving"
            wanted.engines[name].drain_s = change.drain_s
    else:
        change.deadline_at = moment.now + wanted.timing.startup_timeout_s
        for name in starts:
            wanted.engines[name] = Goal(withheld="joining")
        yield Chore.ADD_ENGINES


def _join(
    wanted: Desired, seen: Observed, change: RunningChange, joining: Sequence[str], moment: Moment
) -> Iterator[Action]:
    """Give new engines work once they are ready and proven; take them back if they never are."""
    engines = [seen.engines[name] for name in joining]
    units = [unit for engine in engines for unit in engine.units if not unit.ready]
    unready = [f"{process.name} is {process.state}" for u in units for process in u.processes]
    # Sleeping and restarting engines prove their pairs when they are back.
    there = [each.name for each in seen.engines.values() if each.ready and each.is_awake]
    missing = unready or seen.pairs.missing(there, of=joining)
    if not change.failure and not missing:
        for name in joining:
            wanted.engines[name].withheld = ""
            yield Note(f"{name} has joined")
        return
    if moment.due(change.deadline_at) and not change.failure:
        late = f"not ready after {wanted.timing.startup_timeout_s:g} s"
        change.failure = f"{late}: {'; '.join(missing)}"
    if not change.failure:
        return
    # The old engines go on serving.
    gone = [name for name in change.plan.stops if name not in seen.engines]
    change.error = f"{', '.join(joining)} cannot be added: {change.failure}" + (
        f"; {', '.join(gone)} is gone already" if gone else ""
    )
    for name in joining:
        wanted.engines[name] = Goal(withheld="leaving")


# The end


def _end(wanted: Desired, seen: Observed, moment: Moment) -> Iterator[Action]:
    """Drain the router, then the engines; stop them in the same order; terminate, kill."""
    if not seen.is_ending:
        drain_s = wanted.timing.drain_s
        drains = seen.phase is LaunchPhase.READY and seen.failure is None and drain_s > 0
        seen.drain_ends_at = moment.now + drain_s
        for process in seen.processes():
            if process.state in (ProcessState.BACKING_OFF, ProcessState.PLANNED):
                process.state = ProcessState.EXITED
        # Without a drain the router ends first, too: it tells clients why while engines are there.
        first = LaunchPhase.DRAINING_ROUTER if drains else LaunchPhase.STOPPING_ROUTER
        yield from _enter(first, wanted, seen, moment)
    if wanted.is_hurried:
        wanted.is_hurried = False
        draining = seen.phase in _DRAINED_KIND
        hurried = LaunchPhase.STOPPING_ROUTER if draining else LaunchPhase.KILLING
        yield from _enter(hurried, wanted, seen, moment)
    while seen.phase is not LaunchPhase.STOPPED and _is_over(seen, moment):
        following = _PHASES[_PHASES.index(seen.phase) + 1]
        # Without processes there is nothing to terminate or kill.
        stopped = seen.phase not in _DRAINED_KIND and not _alive(seen)
        yield from _enter(LaunchPhase.STOPPED if stopped else following, wanted, seen, moment)
    waits = seen.phase in _DRAINED_KIND and any(p.spec.kind == "router" for p in _alive(seen))
    if seen.listens and not waits:
        # No other router follows: refuse new connections instead of leaving them waiting.
        seen.listens = False
        yield Chore.CLOSE_LISTENERS


def _is_over(seen: Observed, moment: Moment) -> bool:
    if moment.due(seen.phase_ends_at) or not _alive(seen):
        return True
    if seen.phase is LaunchPhase.STOPPING_ROUTER:
        return not _undrained(seen, "router")
    kind = _DRAINED_KIND.get(seen.phase)
    return kind is not None and not _undrained(seen, kind)


def _enter(phase: LaunchPhase, wanted: Desired, seen: Observed, moment: Moment) -> Iterator[Action]:
    seen.phase, timing = phase, wanted.timing
    alive = _alive(seen)
    time_s = 0.0
    match phase:
        case LaunchPhase.DRAINING_ROUTER | LaunchPhase.DRAINING_ENGINES:
            time_s = max(0.0, seen.drain_ends_at - moment.now)
            # A drained server has no requests at its ranks, so they need not be asked.
            for process in _undrained(seen, _DRAINED_KIND[phase]):
                process.state = ProcessState.DRAINING
                yield SendMessage(process.name, Drain(timeout_s=time_s))
        case LaunchPhase.STOPPING_ROUTER:
            time_s = timing.router_stop_s
            for process in (each for each in alive if each.spec.kind == "router"):
                yield _ask_to_end(process)
        case LaunchPhase.STOPPING:
            time_s = timing.stop_s
            for process in (each for each in alive if each.spec.kind != "router"):
                yield _ask_to_end(process)
        case LaunchPhase.TERMINATING:
            time_s = timing.terminate_s
            for process in alive:
                yield SendSignal(process.name, signal.SIGTERM)
        case LaunchPhase.KILLING:
            time_s = timing.kill_s
            for process in alive:
                yield SendSignal(process.name, signal.SIGKILL)
        case _:
            pass
    seen.phase_ends_at = moment.now + time_s


def _undrained(seen: Observed, kind: str) -> list[Instance]:
    """Return the processes that have yet to drain; starting ones have no work to finish."""
    return [
        process
        for process in seen.processes()
        if process.spec.kind == kind and process.state in _WORKING and not process.is_drained
    ]


def _alive(seen: Observed) -> list[Instance]:
    return [process for process in seen.processes() if process.alive]
