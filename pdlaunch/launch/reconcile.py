"""Compares the desired with the observed state of a launch, and returns the next actions.

::

    deaths     dead ── back-off ──▶ started       too many, too quickly ──▶ given up ──▶ tried again
    restarts   draining ── idle, or time-out ──▶ stopping ── all ended ──▶ started, or removed
    changes    starting ── ready and proven ──▶ joined; old engines leave     late, dead ──▶ leaving
    the end    drain router ──▶ stop router ──▶ stop engines ──▶ SIGKILL

This module uses no clock, process or socket: the same state and time give the same actions. The
state records each returned action, so a second call does not return it again.
"""

import signal
from collections.abc import Iterable, Sequence

from pdlaunch.config.roles import ROLES
from pdlaunch.launch.state import (
    Action,
    Chore,
    Desired,
    EngineChange,
    ForgetEngine,
    Goal,
    Instance,
    LaunchedEngine,
    Observed,
    SendMessage,
    SendSignal,
    Start,
    Turn,
    Unit,
)
from pdlaunch.launch.status import Failure, LaunchPhase, ProcessState, startup_timeout
from pdlaunch.protocol.control import Answered, Drain, Stop

_WORKING = (ProcessState.READY, ProcessState.DRAINING)
_PHASES = tuple(LaunchPhase)


def reconcile(wanted: Desired, seen: Observed, now: float) -> tuple[list[Action], float]:
    """Return the next actions, and the instant of the next call if no event comes before."""
    turn = Turn(wanted, seen, now)
    if not turn.must_end and seen.phase is not LaunchPhase.READY:
        _start(turn)
    if not turn.must_end and seen.phase is LaunchPhase.READY:
        _serve(turn)
    if turn.must_end:
        _end(turn)
    return turn.actions, turn.next_at


# The start


def _start(turn: Turn) -> None:
    seen, timeout_s = turn.seen, turn.wanted.timing.startup_timeout_s
    for unit in seen.units:
        if unit.processes[0].state is ProcessState.PLANNED:
            turn.do(Start(unit.name))
    if all(unit.ready for unit in seen.units) and not seen.missing_pairs():
        seen.phase, seen.was_ready, turn.wanted.withheld = LaunchPhase.READY, True, ""
    elif turn.due(seen.started_at + timeout_s):
        turn.fail(startup_timeout(seen.status(), timeout_s, seen.missing_pairs()))


# Service


def _serve(turn: Turn) -> None:
    wanted, seen = turn.wanted, turn.seen
    _watch(turn)
    if wanted.change is not None:
        _advance(turn, wanted.change)
    for engine in list(seen.engines.values()):
        goal = wanted.engines[engine.name]
        if engine.retires or goal.restart or goal.withheld == "leaving":
            _retire(turn, engine, goal)
    for unit in seen.units:
        of = seen.engines.get(unit.engine)
        if of is None or not of.retires:
            _keep(turn, unit)


def _watch(turn: Turn) -> None:
    """Kill hung processes, beginning with the one silent longest: others may only wait for it."""
    timing = turn.wanted.timing
    if not timing.hang_timeout_s:
        return
    turn.due(turn.now + timing.heartbeat_s)
    ready = [(p, u) for u in turn.seen.units for p in u.processes if p.state is ProcessState.READY]
    for process, unit in sorted(ready, key=lambda each: each[0].seen_at):
        silent_s, limit_s = turn.now - process.seen_at, timing.silence_s(process)
        process.is_stalled = silent_s >= limit_s / 2
        if silent_s >= limit_s and unit.cause is None and not unit.is_killed:
            unit.cause, unit.died_at = process, process.seen_at
            turn.seen.ends[process.name]["hung"] += 1
            process.error = f"hung: its main loop stood still for {silent_s:.0f} s (hang_timeout_s)"
            turn.announce(f"{process.label} {process.error}: killed")
            _kill(turn, unit)


def _keep(turn: Turn, unit: Unit) -> None:
    """Keep a unit running: after a death, kill its other processes, then start it again."""
    if unit.alive:
        if unit.cause is not None:
            _kill(turn, unit)
        elif turn.due(unit.kill_at):
            _kill_late(turn, unit)
    elif any(process.state is ProcessState.FAILED for process in unit.processes):
        # A unit without a cause failed before it joined: ``_join`` removes its engine.
        if unit.cause is not None:
            _after_death(turn, unit, unit.cause)
    elif turn.due(unit.start_at) or (
        # With a ``start_at``, it waits for its host, which was lost after the planning.
        unit.start_at is None and unit.processes[0].state is ProcessState.PLANNED
    ):
        unit.start_at = None
        turn.do(Start(unit.name))


def _kill(turn: Turn, unit: Unit) -> None:
    """Kill the living processes of a unit; they leave the registry at once."""
    if unit.is_killed:
        return
    unit.is_killed = True
    for process in unit.processes:
        if process.alive:
            # At once, not after its exit: peers use a process as long as the registry lists it.
            process.registration = None
            turn.do(SendSignal(process.name, signal.SIGKILL))


def _kill_late(turn: Turn, unit: Unit) -> None:
    unit.kill_at = None
    turn.announce(f"{unit.name} neither became ready nor ended in time: killed")
    _kill(turn, unit)


def _after_death(turn: Turn, unit: Unit, cause: Instance) -> None:
    """Schedule the next start of a dead unit; each quick death doubles the wait."""
    timing = turn.wanted.timing
    unit.kill_at = None
    if unit.is_lost:
        # A lost host is no quick death, even if processes on other hosts died or hung first.
        _set_state(unit, ProcessState.BACKING_OFF)
        turn.do(Start(unit.name))
        return
    is_quick = unit.ready_at is None or unit.died_at - unit.ready_at < timing.quick_s
    unit.num_quick_deaths = num_deaths = unit.num_quick_deaths + 1 if is_quick else 1
    wait_s = timing.wait_s(num_deaths)
    if num_deaths < timing.max_quick_deaths:
        _set_state(unit, ProcessState.BACKING_OFF)
        turn.announce(f"{unit.name} starts again in {wait_s:g} s")
    else:
        # SIGKILL counts, too: the kernel sends it to a process that takes too much memory.
        summary = (
            f"{unit.name} died {num_deaths} times in a row, each within "
            f"{timing.quick_s:g} s of its start"
        )
        engine = turn.seen.engines.get(unit.engine)
        left = [] if engine is None else _left_without(engine, turn.seen.engines.values())
        if engine is None or not left:
            turn.fail(Failure(summary, process=cause.name, said=cause.error))
            return
        engine.failed_for = summary + (f": {cause.error}" if cause.error else "")
        engine.retry_s = wait_s
        _set_state(unit, ProcessState.GIVEN_UP)
        turn.announce(
            f"{summary}: {engine.name} is given up and tried again in {wait_s:g} s; "
            f"still serving: {', '.join(each.name for each in left)}"
        )
    unit.start_at = turn.now + wait_s
    turn.due(unit.start_at)


def _set_state(unit: Unit, state: ProcessState) -> None:
    for process in unit.processes:
        process.state = state


def _left_without(lost: LaunchedEngine, engines: Iterable[LaunchedEngine]) -> list[LaunchedEngine]:
    """Return the engines that can replace a lost one: of its role, of ``both``, or a pair."""
    working = [each for each in engines if each is not lost and not each.failed_for]
    of = {role: [each for each in working if each.role == role] for role in ROLES}
    pair = of["prefill"] + of["decode"] if of["prefill"] and of["decode"] else []
    return of[lost.role] or of["both"] or pair


# Engines that stop because of a command


def _retire(turn: Turn, engine: LaunchedEngine, goal: Goal) -> None:
    """Drain and stop an engine; once its processes have ended, restart or forget it.

    The registry lists its server as draining, so routers give it no new work. The drain ends once
    no request runs and no block is leased. Requests that still run when the engine is stopped
    continue at another engine.
    """
    if not engine.retires:
        engine.retires = True
        for unit in engine.units:
            unit.num_quick_deaths, unit.kill_at, unit.start_at = 0, None, None
        # An engine that does not serve has nothing to finish.
        if engine.ready and goal.drain_s > 0:
            engine.stop_at = turn.now + goal.drain_s
            engine.server.state = ProcessState.DRAINING
            turn.do(SendMessage(engine.server.name, Drain(timeout_s=goal.drain_s)))
        else:
            _stop(turn, engine)
    if engine.stop_at is not None:
        if not engine.server.is_drained and not turn.due(engine.stop_at):
            return
        _stop(turn, engine)
    for unit in engine.units:
        if unit.alive and not unit.is_killed and turn.due(unit.kill_at):
            _kill_late(turn, unit)
    if engine.alive:
        return
    engine.retires = False
    if goal.withheld == "leaving":
        turn.announce(f"{engine.name} is gone")
        turn.seen.remove(engine.name)
        del turn.wanted.engines[engine.name]
        turn.do(ForgetEngine(engine.name))
        return
    goal.restart = False
    for unit in engine.units:
        turn.do(Start(unit.name))


def _stop(turn: Turn, engine: LaunchedEngine) -> None:
    """Ask the processes of an engine to end; those that are late are killed."""
    engine.stop_at = None
    for unit in engine.units:
        if unit.alive:
            unit.kill_at = turn.now + turn.wanted.timing.stop_s
        for process in unit.processes:
            if process.alive:
                process.registration = None
                _ask_to_end(turn, process)


def _ask_to_end(turn: Turn, process: Instance) -> None:
    # A starting process may be busy with loading and would not read a message.
    if process.state in _WORKING:
        turn.do(SendMessage(process.name, Stop()))
    else:
        turn.do(SendSignal(process.name, signal.SIGTERM))


# Changes of the engines


def _advance(turn: Turn, change: EngineChange) -> None:
    """Take the next step of a change; the present engines show how far it is.

    The registry lists a new engine from its start, so that its pairs can be proven. The engine gets
    work once they are proven.
    """
    goals, engines, planned = turn.wanted.engines, turn.seen.engines, change.planned
    if any(goal.withheld == "leaving" for goal in goals.values()):
        return
    if joining := sorted(name for name in goals if turn.wanted.joins(name)):
        _join(turn, change, joining)
        if any(goals[name].withheld for name in joining):
            return
    starts = [each.name for each in change.starts if each.name not in engines]
    stops = [name for name in planned.stops if name in engines]
    if change.failure or not (starts or stops):
        error = ""
        if change.failure:
            gone = [name for name in planned.stops if name not in engines]
            error = f"{', '.join(starts)} cannot be added: {change.failure}"
            error += f"; {', '.join(gone)} is gone already" if gone else ""
        turn.wanted.change = None
        turn.announce(error or f"engines have changed: {change.what}")
        turn.do(SendMessage(change.asker, Answered(question=change.question, error=error)))
    elif stops and (planned.stops_first or not starts):
        # Mark all of them in this turn, before the first one can be gone.
        for name in stops:
            goals[name].withheld, goals[name].drain_s = "leaving", planned.drain_s
    else:
        change.deadline_at = turn.now + turn.wanted.timing.startup_timeout_s
        for name in starts:
            goals[name] = Goal(withheld="joining")
        turn.do(Chore.ADD_ENGINES)


def _join(turn: Turn, change: EngineChange, joining: Sequence[str]) -> None:
    """Give new engines work once they are ready and proven; remove them if they fail."""
    wanted, seen = turn.wanted, turn.seen
    unready = [
        f"{process.name} is {process.state}"
        for name in joining
        for unit in seen.engines[name].units
        if not unit.ready
        for process in unit.processes
    ]
    # Sleeping and restarting engines prove their pairs once they are awake and ready.
    there = [each.name for each in seen.engines.values() if each.ready and each.is_awake]
    missing = unready or seen.pairs.missing(there, of=joining)
    if not change.failure and not missing:
        for name in joining:
            wanted.engines[name].withheld = ""
            turn.announce(f"{name} has joined")
        return
    if turn.due(change.deadline_at) and not change.failure:
        late = f"not ready after {wanted.timing.startup_timeout_s:g} s"
        change.failure = f"{late}: {'; '.join(missing)}"
    if change.failure:
        # The old engines go on serving.
        for name in joining:
            wanted.engines[name] = Goal(withheld="leaving")


# The end


def _end(turn: Turn) -> None:
    """Drain the router, stop it, then stop the engines; kill the processes that are left."""
    wanted, seen = turn.wanted, turn.seen
    if not seen.is_ending:
        # A failure without a process (such as a lost folder) leaves all engines working.
        works = seen.failure is None or seen.failure.process is None
        serves = seen.phase is LaunchPhase.READY and works
        drains = serves and wanted.timing.drain_s > 0
        for process in seen.processes():
            if process.state in (ProcessState.BACKING_OFF, ProcessState.PLANNED):
                process.state = ProcessState.EXITED
        # Stop the router first even without a drain: it sends errors while engines still run.
        _enter(turn, LaunchPhase.DRAINING if drains else LaunchPhase.STOPPING_ROUTER)
    if wanted.is_hurried:
        wanted.is_hurried = False
        drains = seen.phase is LaunchPhase.DRAINING
        _enter(turn, LaunchPhase.STOPPING_ROUTER if drains else LaunchPhase.KILLING)
    while seen.phase is not LaunchPhase.STOPPED and _is_over(turn):
        # Without processes there is nothing to stop or kill.
        stopped = seen.phase is not LaunchPhase.DRAINING and not _alive(seen)
        following = _PHASES[_PHASES.index(seen.phase) + 1]
        _enter(turn, LaunchPhase.STOPPED if stopped else following)
    if seen.listens and (seen.phase is not LaunchPhase.DRAINING or not _routers(seen)):
        # No other router will start: refuse new connections instead of letting them wait.
        seen.listens = False
        turn.do(Chore.CLOSE_LISTENERS)


def _is_over(turn: Turn) -> bool:
    seen = turn.seen
    if turn.due(seen.phase_ends_at) or not _alive(seen):
        return True
    waits_for_router = seen.phase in (LaunchPhase.DRAINING, LaunchPhase.STOPPING_ROUTER)
    # Starting routers have no work to finish.
    working = [each for each in _routers(seen) if each.state in _WORKING]
    return waits_for_router and all(each.is_drained for each in working)


def _enter(turn: Turn, phase: LaunchPhase) -> None:
    seen, timing = turn.seen, turn.wanted.timing
    seen.phase, time_s = phase, 0.0
    match phase:
        case LaunchPhase.DRAINING:
            # Drain only the router, which waits for the answers of engines.
            time_s = timing.drain_s
            for process in _routers(seen):
                if process.state in _WORKING:
                    process.state = ProcessState.DRAINING
                    turn.do(SendMessage(process.name, Drain(timeout_s=time_s)))
        case LaunchPhase.STOPPING_ROUTER | LaunchPhase.STOPPING:
            is_router = phase is LaunchPhase.STOPPING_ROUTER
            time_s = timing.router_stop_s if is_router else timing.stop_s
            for process in _alive(seen):
                if (process.spec.kind == "router") == is_router:
                    _ask_to_end(turn, process)
        case LaunchPhase.KILLING:
            time_s = timing.kill_s
            for process in _alive(seen):
                turn.do(SendSignal(process.name, signal.SIGKILL))
        case _:
            pass
    seen.phase_ends_at = turn.now + time_s


def _alive(seen: Observed) -> list[Instance]:
    return [process for process in seen.processes() if process.alive]


def _routers(seen: Observed) -> list[Instance]:
    return [process for process in seen.routers if process.alive]
