"""Updates the state of a launch with events and commands; returns immediate actions. Does no I/O;
``reconcile`` finds the actions that follow from the new state.
"""

import logging
import signal
from collections.abc import Callable, Collection

import msgspec

from pdlaunch.config.model_files.weights import refuse_changes
from pdlaunch.errors import ConfigError, PdlaunchError
from pdlaunch.launch.events import Event, FolderLost, StopRequested
from pdlaunch.launch.hosts.local import MessageReceived, ProcessExited
from pdlaunch.launch.state import (
    Action,
    Desired,
    EngineChange,
    Instance,
    LaunchedEngine,
    Observed,
    SendMessage,
    Turn,
    Unit,
)
from pdlaunch.launch.status import Failure, LaunchPhase, ProcessState
from pdlaunch.protocol import control
from pdlaunch.protocol.engine_link import engine_of_rank

logger = logging.getLogger(__name__)

FAILED_GRACE_S = 5.0  # time for a process to exit by itself after it has sent Failed


# The type of ``EnginePlaces.plan``
PlanChange = Callable[[control.ChangeEngines, Collection[str], Collection[str]], EngineChange]


def observe(
    wanted: Desired, seen: Observed, event: Event, now: float, plan: PlanChange
) -> list[Action]:
    """Update the state with one event, and return the immediate actions."""
    turn = Turn(wanted, seen, now)
    match event:
        case FolderLost(path=path, is_logs=True):
            turn.announce(
                f"{path}, the log folder, was removed and has been created again: a process "
                "writes there once it is restarted"
            )
        case FolderLost(path=path):
            summary = (
                f"{path}, the folder of this launch, or its socket was removed: no process could "
                "be restarted. Keep cleaners of temporary files away from it, or set TMPDIR"
            )
            turn.announce(summary)
            turn.fail(Failure(summary))
        case StopRequested():
            _stop(turn, event)
        case MessageReceived(name=name, message=message):
            if (found := seen.find(name)) is not None:
                _received(turn, *found, message, plan)
            else:
                logger.warning("message from unknown process %s", name)
        case ProcessExited(name=name):
            found = seen.find(name)
            # An exit counts once, and only for the running incarnation.
            if found is not None and found[1].alive and event.incarnation == found[1].incarnation:
                _exited(turn, *found, event)
    return turn.actions


def _stop(turn: Turn, event: StopRequested) -> None:
    wanted = turn.wanted
    reason = event.reason or signal.Signals(event.signal_number).name
    if not turn.must_end:
        wanted.stop_signal = event.signal_number
        drain_s = wanted.timing.drain_s
        drains = turn.seen.phase is LaunchPhase.READY and drain_s > 0
        wait = f"running requests get up to {drain_s:g} s; a second Ctrl-C skips that"
        turn.announce(f"{reason}: {wait if drains else 'stopping'}")
    elif reason != "SIGTERM":
        # Slurm sends SIGTERM twice at a time limit, so a second SIGTERM does not hurry the stop.
        wanted.is_hurried = True
        turn.announce(f"{reason}, while stopping: not waiting any longer")


# Messages


def _received(
    turn: Turn, unit: Unit, process: Instance, message: control.ToSupervisor, plan: PlanChange
) -> None:
    seen, name = turn.seen, process.name
    if not isinstance(message, control.PairReady | control.PairFailed):
        # Another thread than the main loop sends these two.
        process.seen_at, process.is_stalled = turn.now, False
    match message:
        case control.Register():
            # A predecessor's message may arrive after its successor was started.
            sender = (message.name, message.incarnation)
            if process.alive and sender == (name, process.incarnation):
                process.registration = message
            else:
                logger.warning("%s registered as %s, incarnation %d", name, *sender)
        case control.Failed(error=error):
            _failed(turn, unit, process, error)
        case control.Progress():
            process.progress = message
        case control.Alive():
            pass  # Only ``seen_at`` matters.
        # Messages of a dead incarnation may still be in the queue.
        case _ if process.registration is None or not process.alive:
            logger.warning("%s from %s before it registered", type(message).__name__, name)
        case control.Ready():
            _ready(turn, unit, process, message)
        case control.PairReady():
            # Ignore a proof of a peer's earlier incarnation.
            peer = seen.find(message.peer)
            is_current = peer is not None and peer[1].incarnation == message.peer_incarnation
            if is_current and message.local == name:
                _pair_ready(turn, process, message)
        case control.PairFailed():
            _pair_failed(turn, process, message)
        case control.PairSuspect(local=local, peer=peer_name, error=error):
            if seen.pairs.suspect(message):
                turn.announce(f"{local} has to prove its path to {peer_name} again: {error}")
        case control.SleepState(state=state):
            # The sidecar and all ranks of an engine report it: announce it once.
            if state != process.sleep_state:
                process.sleep_state = state
                turn.announce(f"{name} is {state}")
        case control.Drained():
            process.is_drained = True
        case control.Asked():
            _obey(turn, message, name, plan)


def _failed(turn: Turn, unit: Unit, process: Instance, error: str) -> None:
    """Keep the last error of a process, which may arrive after its exit."""
    process.error = error
    engine = turn.seen.engines.get(unit.engine)
    if engine is not None and error.startswith(control.MODEL_CHANGED):
        engine.failed_for = error
    failure = turn.seen.failure
    if failure is not None and failure.process == process.name:
        failure.said = error
    if not process.alive:
        return
    if turn.seen.phase is LaunchPhase.READY:
        # The process is about to exit, and its exit restarts the unit.
        unit.kill_at = turn.now + FAILED_GRACE_S
    else:
        turn.fail(Failure(f"{process.label} failed to start", process=process.name, said=error))


def _ready(turn: Turn, unit: Unit, process: Instance, message: control.Ready) -> None:
    if process.state is not ProcessState.STARTING:
        return
    reads, model = process.spec.reads, turn.seen.model
    try:
        refuse_changes(model.get(reads, message.model), message.model)
    except ConfigError as error:
        # The process would produce other tokens than its peers, so it must not start.
        process.registration = None
        turn.do(SendMessage(process.name, control.Stop()))
        _failed(turn, unit, process, str(error))
        return
    model[reads] = message.model | model.get(reads, {})
    process.state = ProcessState.READY
    if not unit.ready:
        return
    unit.ready_at, unit.kill_at = turn.now, None
    if unit.incarnation > 1:
        turn.announce(f"{unit.name} is ready again (incarnation {unit.incarnation})")
    engine = turn.seen.engines.get(unit.engine)
    if engine is not None and engine.ready:
        engine.failed_for = ""


def _pair_ready(turn: Turn, process: Instance, pair: control.PairReady) -> None:
    if pair.slow and turn.wanted.is_strict:
        error = f"{pair.slow} (refused by --strict)"
        failed = control.PairFailed(local=pair.local, peer=pair.peer, error=error, fatal=True)
        _pair_failed(turn, process, failed)
        return
    if pair.slow:
        turn.announce(f"warning: {pair.peer} -> {process.label} is slow: {pair.slow}")
    turn.seen.pairs.add(pair)


def _pair_failed(turn: Turn, process: Instance, pair: control.PairFailed) -> None:
    turn.seen.pairs.fail(process.name, pair.peer, pair.error)
    what = f"{process.label} cannot use {pair.peer}"
    if pair.fatal and turn.seen.phase is LaunchPhase.STARTING:
        turn.fail(Failure(what, process=process.name, said=pair.error))
        return
    prefill, decode = engine_of_rank(pair.peer), process.spec.engine
    text = f"{process.label} cannot reach {pair.peer}: {pair.error}"
    turn.do(control.Happened(text=text, prefill=prefill, decode=decode))
    if pair.fatal and (turn.wanted.joins(prefill) or turn.wanted.joins(decode)):
        _fail_change(turn, f"{what}: {pair.error}")


def _fail_change(turn: Turn, reason: str) -> None:
    if (change := turn.wanted.change) is not None:
        change.failure = change.failure or reason


# Deaths


def _exited(turn: Turn, unit: Unit, process: Instance, event: ProcessExited) -> None:
    seen = turn.seen
    engine = seen.engines.get(unit.engine)
    if turn.must_end:
        process.state = ProcessState.EXITED
        return
    seen.pairs.forget(process.name)
    if engine is not None and engine.retires:
        process.state, process.registration = ProcessState.EXITED, None
        if (engine.stop_at or 0.0) > turn.now and not engine.server.is_drained:
            # It died while it finished its requests, before the supervisor sent Stop.
            engine.stop_at = turn.now
            _report_death(turn, unit, process, event)
        return
    process.state = ProcessState.FAILED
    if turn.wanted.joins(unit.engine):
        _fail_change(turn, _end_of(process, event))
        return
    if seen.phase is not LaunchPhase.READY:
        summary = f"{process.label} {event.how()} before it was ready"
        turn.fail(Failure(summary, process=process.name, said=process.error))
    elif unit.cause is None:
        # The first process to die is the cause; the others die or are killed because of it.
        unit.cause, unit.died_at = process, turn.now
        seen.ends[process.name]["died"] += 1
        _report_death(turn, unit, process, event)
    unit.is_lost |= bool(event.lost_with)
    process.error = process.error or event.how()


def _end_of(process: Instance, event: ProcessExited) -> str:
    return f"{process.label} {f'failed: {process.error}' if process.error else event.how()}"


def _report_death(turn: Turn, unit: Unit, process: Instance, event: ProcessExited) -> None:
    """Report the first death in a unit, and tell the router which requests may be to blame."""
    turn.announce(_end_of(process, event))
    # No request is to blame if the rank never served, or somebody killed it.
    step = event.last_step
    if step.origins and unit.ready_at is not None and event.by_itself:
        # Tell the router before it repeats these requests at another engine.
        suspects = control.Suspects(origins=sorted(step.origins), repeated=sorted(step.suspects))
        for router in turn.seen.routers:
            turn.do(SendMessage(router.name, suspects))


# Commands


class _Refused(Exception):
    def __init__(self, reason: str, code: control.RefusalCode = "refused") -> None:
        super().__init__(reason)
        self.code = code


def _obey(turn: Turn, command: control.Command, asker: str, plan: PlanChange) -> None:
    """Change the desired state, and answer; drop the command if nobody waits for the answer."""
    if turn.now > command.expires_at:
        turn.announce("a command is dropped: its sender no longer waits for the answer")
        return
    answer = control.Answered(question=command.question)
    try:
        match command:
            case control.Restart():
                _restart(turn, command, answer)
            case control.SetDrained():
                _set_drained(turn, command, answer)
            case control.ChangeEngines():
                _change(turn, command, answer, asker, plan)
    except _Refused as refusal:
        answer.error, answer.code = str(refusal), refusal.code
    turn.do(SendMessage(asker, answer))


def _find(seen: Observed, name: str) -> LaunchedEngine:
    found = seen.find(name)
    engine = None if found is None else seen.engines.get(found[1].spec.engine)
    if engine is None:
        reason = f"there is no engine {name[:100]}; engines are: {', '.join(seen.engines)}"
        raise _Refused(reason, code="engine_not_found")
    return engine


def _require_ready(what: str, seen: Observed, withheld: str = "") -> None:
    reason = {"joining": "it is being added", "leaving": "it is being removed"}.get(withheld, "")
    if seen.phase is not LaunchPhase.READY:
        reason = f"the launch is {seen.phase}"
    if reason:
        raise _Refused(f"{what}: {reason}", code="not_now")


def _restart(turn: Turn, command: control.Restart, answer: control.Answered) -> None:
    """Restart an engine; a second command during the restart changes nothing."""
    engine = _find(turn.seen, command.name)
    answer.engine, goal = engine.name, turn.wanted.engines[engine.name]
    _require_ready(f"{engine.name} cannot be restarted", turn.seen, goal.withheld)
    answer.incarnation = engine.server.incarnation
    if not goal.restart:
        goal.restart, goal.drain_s = True, turn.wanted.timing.drain_s
        turn.announce(f"{engine.name} is restarted, as requested")


def _set_drained(turn: Turn, command: control.SetDrained, answer: control.Answered) -> None:
    """Withhold new work from an engine, or give it work again; running requests go on."""
    engine = _find(turn.seen, command.name)
    answer.engine, goal = engine.name, turn.wanted.engines[engine.name]
    verb = "drained" if command.is_drained else "undrained"
    _require_ready(f"{engine.name} cannot be {verb}", turn.seen, goal.withheld)
    if bool(goal.withheld) == command.is_drained:
        return
    others = [each for each in turn.seen.serving(turn.wanted) if each is not engine]
    if command.is_drained and not others:
        raise _Refused(
            f"{engine.name} is not drained: no other engine serves; add one with `pdlaunch "
            "scale`, or undrain or restart another one"
        )
    if command.is_drained and not any(each.role == engine.role for each in others):
        names = ", ".join(each.name for each in others)
        answer.notes = [f"no other {engine.role} engine serves: its work goes to {names}"]
    goal.withheld = "draining" if command.is_drained else ""
    turn.announce(f"{engine.name} is {verb}, as requested")


def _change(
    turn: Turn,
    command: control.ChangeEngines,
    answer: control.Answered,
    asker: str,
    plan: PlanChange,
) -> None:
    """Check a change of the engines, and begin it unless it is a dry run."""
    wanted, seen = turn.wanted, turn.seen
    _require_ready("engines cannot change", seen)
    if wanted.change is not None and not command.dry_run:
        raise _Refused(
            f"another change is under way: {wanted.change.what}; `pdlaunch status` shows when it "
            "is done",
            code="not_now",
        )
    if command.engine:
        engine = _find(seen, command.engine)
        command = msgspec.structs.replace(command, engine=engine.name)
    serving = {engine.name for engine in seen.serving(wanted)}
    drained = {name for name, goal in wanted.engines.items() if goal.withheld == "draining"}
    try:
        change = plan(command, serving, drained)
    except PdlaunchError as error:
        fix = getattr(error, "fix", None)
        raise _Refused(f"{error}{f'; fix: {fix}' if fix else ''}") from None
    stops, drain_s = change.planned.stops, command.drain_timeout_s
    change.planned.drain_s = wanted.timing.drain_s if drain_s is None else drain_s
    if not change.starts and not stops:
        answer.change = change.planned
        answer.notes = ["there is nothing to do: the engines are as you want them"]
        return
    if not serving.difference(stops) and (change.planned.stops_first or not change.starts):
        raise _Refused(
            f"{', '.join(stops)} must not stop: no other engine serves, so requests would fail; "
            "add one first, or undrain or restart another one"
        )
    for name in stops:
        if wanted.engines[name].restart:
            raise _Refused(f"{name} is being restarted", code="not_now")
    answer.change, answer.notes = change.planned, list(change.warnings)
    if command.dry_run:
        return
    answer.is_done = False
    change.question, change.asker = command.question, asker
    wanted.change = change
    turn.announce(f"engines change, as requested: {change.what}")
