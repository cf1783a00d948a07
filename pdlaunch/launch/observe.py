"""Updates the state of a launch with events; returns the actions that cannot wait. No I/O."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

from pdlaunch.config.model_files.identity import changes
from pdlaunch.launch.actions import Action, Greet, Note, SendMessage, Show, TellSuspects
from pdlaunch.launch.events import Event, StopRequested
from pdlaunch.launch.hosts.host import MessageReceived, ProcessExited
from pdlaunch.launch.pairs import engine_of
from pdlaunch.launch.state import Desired, Instance, Observed, Unit
from pdlaunch.launch.status import Failure, LaunchPhase, ProcessState
from pdlaunch.protocol.control import (
    Alive,
    ChangeEngines,
    Drained,
    EngineIdle,
    Failed,
    PairFailed,
    PairReady,
    PairSuspect,
    Progress,
    Ready,
    Register,
    Restart,
    ServedRequest,
    SetDrained,
    SleepState,
    Stop,
    ToSupervisor,
)

logger = logging.getLogger(__name__)

FAILED_GRACE_S = 5.0  # time for a process to exit by itself after it has sent Failed


def observe(wanted: Desired, seen: Observed, event: Event, now: float) -> list[Action]:
    """Update the state with one event, and return the actions that follow at once."""
    match event:
        case ProcessExited():
            return list(_exited(wanted, seen, event, now))
        case StopRequested():
            return list(_stop(wanted, seen, event))
        case MessageReceived(name=name, message=message):
            found = seen.find(name)
            if found is None:
                logger.warning("message from unknown process %s", name)
                return []
            return list(_received(wanted, seen, *found, message, now))


def fail(wanted: Desired, seen: Observed, failure: Failure) -> None:
    """Keep the earliest failure, which ends the launch unless it ends already."""
    if seen.failure is None and wanted.stop_signal is None:
        seen.failure = failure


def _ends(wanted: Desired, seen: Observed) -> bool:
    return seen.is_ending or seen.failure is not None or wanted.stop_signal is not None


def _stop(wanted: Desired, seen: Observed, event: StopRequested) -> Iterator[Action]:
    reason = event.reason or signal.Signals(event.signal_number).name
    if _ends(wanted, seen):
        # Slurm sends SIGTERM twice at a time limit; only Ctrl-C asks to hurry.
        if reason != "SIGTERM":
            wanted.is_hurried = True
            yield Note(f"{reason}, while stopping: not waiting any longer")
        return
    wanted.stop_signal = event.signal_number
    drain_s = wanted.timing.drain_s
    drains = seen.phase is LaunchPhase.READY and drain_s > 0
    wait = f"running requests get up to {drain_s:g} s, a second Ctrl-C skips that"
    yield Note(f"{reason}: {wait if drains else 'stopping'}")


# Messages


def _received(
    wanted: Desired,
    seen: Observed,
    unit: Unit,
    process: Instance,
    message: ToSupervisor,
    now: float,
) -> Iterator[Action]:
    name = process.name
    if not isinstance(message, PairReady | PairFailed):
        # Another thread than the main loop sends these two.
        process.heard_at, process.is_stalled = now, False
    match message:
        case Register():
            # A predecessor's message may arrive after its successor was started.
            sender = (message.name, message.incarnation)
            if not process.alive or sender != (name, process.incarnation):
                logger.warning("%s registered as %s, incarnation %d", name, *sender)
                return
            process.registration = message
            yield Greet(name)
        case Failed(error=error):
            process.error = error
            # This message may arrive after the process's exit, which was reported first.
            if seen.failure is not None and seen.failure.process == name:
                seen.failure.said = error
            if not process.alive:
                return
            if seen.phase is LaunchPhase.READY:
                # It is about to exit by itself, and its exit restarts the unit.
                unit.kill_at = now + FAILED_GRACE_S
            else:
                summary = f"{process.label} failed to start"
                fail(wanted, seen, Failure(summary, process=name, said=error))
        case Progress():
            process.progress = message
        case Alive():
            pass
        # Messages of a dead incarnation may still be in the queue.
        case _ if process.registration is None or not process.alive:
            logger.warning("%s from %s before it registered", type(message).__name__, name)
        case Ready():
            yield from _ready(seen, unit, process, message, now)
        case PairReady():
            # Ignore a proof of a peer's earlier incarnation.
            peer = seen.find(message.peer)
            is_current = peer is not None and peer[1].incarnation == message.peer_incarnation
            if is_current and message.local == name:
                seen.pairs.add(message)
        case PairFailed():
            yield from _pair_failed(wanted, seen, process, message)
        case PairSuspect(local=local, peer=far, error=error):
            if seen.pairs.suspect(message):
                yield Note(f"{local} has to prove its path to {far} again: {error}")
        case ServedRequest(line=line):
            yield Show(line)
        case SleepState(state=state):
            process.sleep_state = state
            yield Note(f"{name} is {state}")
        case Drained():
            process.is_drained = True
        case EngineIdle(engine=engine):
            if engine in seen.engines and seen.engines[engine].awaits_readers:
                seen.engines[engine].is_idle = True
        case Restart() | SetDrained() | ChangeEngines():
            pass  # ``commands.obey`` answers them.


def _ready(
    seen: Observed, unit: Unit, process: Instance, message: Ready, now: float
) -> Iterator[Action]:
    process.info = message.info
    if process.state is not ProcessState.STARTING:
        return
    if changed := changes(seen.model.setdefault(process.spec.kind, message.model), message.model):
        # It would give other tokens than its peers, so its exit counts as a failed start.
        process.error = (
            f"the model has changed since this launch began: {changed}. Put the files back, or "
            "start a new launch"
        )
        process.registration, unit.kill_at = None, now + FAILED_GRACE_S
        yield SendMessage(process.name, Stop())
        return
    process.state = ProcessState.READY
    if not unit.ready:
        return
    unit.ready_at, unit.kill_at = now, None
    if unit.incarnation > 1:
        yield Note(f"{unit.name} is ready again (incarnation {unit.incarnation})")
    engine = seen.engines.get(unit.engine)
    if engine is not None and engine.ready:
        engine.failed_for = ""


def _pair_failed(
    wanted: Desired, seen: Observed, process: Instance, pair: PairFailed
) -> Iterator[Action]:
    seen.pairs.fail(process.name, pair.peer, pair.error)
    words = f"{process.label} cannot use {pair.peer}"
    if pair.fatal and seen.phase is LaunchPhase.STARTING:
        fail(wanted, seen, Failure(words, process=process.name, said=pair.error))
        return
    ends = (process.spec.engine, engine_of(pair.peer))
    yield Note(
        f"{process.label} cannot reach {pair.peer}: {pair.error}", prefill=ends[1], decode=ends[0]
    )
    if pair.fatal and any(_joins(wanted, engine) for engine in ends):
        _fail_change(wanted, f"{words}: {pair.error}")


def _joins(wanted: Desired, engine: str) -> bool:
    return engine in wanted.engines and wanted.engines[engine].withheld == "joining"


def _fail_change(wanted: Desired, reason: str) -> None:
    if wanted.change is not None:
        wanted.change.failure = wanted.change.failure or reason


# Deaths


def _exited(wanted: Desired, seen: Observed, event: ProcessExited, now: float) -> Iterator[Action]:
    found = seen.find(event.name)
    # An exit counts once, and only for the running incarnation.
    if found is None or event.incarnation != found[1].incarnation or not found[1].alive:
        return
    unit, process = found
    engine = seen.engines.get(unit.engine)
    said = f": {process.error}" if process.error else ""
    if _ends(wanted, seen):
        process.state = ProcessState.EXITED
        return
    seen.pairs.forget(process.name)
    if engine is not None and engine.retires:
        process.state, process.registration = ProcessState.EXITED, None
        if engine.stop_at is not None and not engine.is_idle:
            # It was still computing: nobody had told it to end.
            engine.is_idle = True
            yield from _tell(unit, process, event)
    elif process.spec.kind == "convert" and event.returncode == 0:
        process.state = ProcessState.EXITED
    elif _joins(wanted, unit.engine):
        process.state = ProcessState.FAILED
        _fail_change(wanted, f"{process.label} {event.how()}{said}")
    elif seen.phase is LaunchPhase.READY:
        process.state = ProcessState.FAILED
        # The first to die is the cause; the others die or are killed because of it.
        if unit.cause is None:
            unit.cause, unit.died_at, unit.lost_with = process, now, event.lost_with
            seen.ends[process.name]["died"] += 1
            yield from _tell(unit, process, event)
        process.error = process.error or event.how()
    else:
        process.state = ProcessState.FAILED
        summary = f"{process.label} {event.how()} before it was ready"
        fail(wanted, seen, Failure(summary, process=process.name, said=process.error))
        process.error = process.error or event.how()


def _tell(unit: Unit, process: Instance, event: ProcessExited) -> Iterator[Action]:
    """Report the first death in a unit, and tell the router which requests may be to blame."""
    said = f": {process.error}" if process.error else ""
    yield Note(f"{process.label} {event.how()}{said}")
    # No request is to blame if the rank never served, or somebody killed it.
    if process.spec.kind == "rank" and unit.ready_at is not None and event.by_itself:
        yield TellSuspects(unit.engine)
