"""Answers commands that change what is wanted of a running launch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import msgspec

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.actions import Action, Note, SendAnswer
from pdlaunch.launch.state import Desired, EngineChange, LaunchedEngine, Observed, RunningChange
from pdlaunch.launch.status import LaunchPhase
from pdlaunch.protocol.changes import Answered, ChangeEngines, SetDrained
from pdlaunch.protocol.control import Restart, Restarting

PlanChange = Callable[[ChangeEngines, Collection[str], Collection[str]], EngineChange]
"""Is ``EnginePlaces.plan``."""
Command = Restart | SetDrained | ChangeEngines


def obey(
    command: Command, asker: str, wanted: Desired, seen: Observed, plan: PlanChange
) -> Iterator[Action]:
    """Change what is wanted, and answer."""
    match command:
        case Restart():
            yield from _restart(command, asker, wanted, seen)
        case SetDrained():
            yield from _set_drained(command, asker, wanted, seen)
        case ChangeEngines():
            yield from _change(command, asker, wanted, seen, plan)


def _unknown(seen: Observed, name: str) -> str:
    return f"there is no engine {name[:100]}; there are: {', '.join(seen.engines)}"


def _restart(command: Restart, asker: str, wanted: Desired, seen: Observed) -> Iterator[Action]:
    """Asking again while a restart is under way changes nothing."""
    engine = seen.find_engine(command.name)
    answer = Restarting(question=command.question)
    if engine is None:
        answer.error = _unknown(seen, command.name)
        yield SendAnswer(asker, answer)
        return
    answer.engine = engine.name
    goal = wanted.engines[engine.name]
    if reason := _why_not(goal.withheld, seen):
        answer.error = f"{engine.name} cannot be restarted: {reason}"
    else:
        answer.incarnation = engine.server.incarnation
        if not goal.restart:
            goal.restart, goal.drain_s = True, wanted.timing.drain_s
            yield Note(f"{engine.name} is restarted, as was asked")
    yield SendAnswer(asker, answer)


def _why_not(withheld: str, seen: Observed) -> str:
    """Say why an engine takes no command now; empty: it does."""
    if seen.phase is not LaunchPhase.READY:
        return f"the launch is {seen.phase}"
    return {"joining": "it is being added", "leaving": "it is being removed"}.get(withheld, "")


def _set_drained(
    command: SetDrained, asker: str, wanted: Desired, seen: Observed
) -> Iterator[Action]:
    """Withhold new work from an engine, or give it work again; what runs there goes on.

    The last engine that serves is not drained. Asking again changes nothing.
    """
    engine = seen.find_engine(command.name)
    answer = Answered(question=command.question)
    if engine is None:
        answer.code, answer.error = "engine_not_found", _unknown(seen, command.name)
        yield SendAnswer(asker, answer)
        return
    answer.engine = engine.name
    goal = wanted.engines[engine.name]
    verb = "drained" if command.is_drained else "undrained"
    others = [each for each in seen.serving(wanted) if each is not engine]
    if reason := _why_not(goal.withheld, seen):
        answer.code, answer.error = "not_now", f"{engine.name} cannot be {verb}: {reason}"
    elif command.is_drained and not goal.withheld and not others:
        answer.error = (
            f"{engine.name} is not drained: no other engine serves; add one with `pdlaunch "
            "scale`, or undrain or restart another one"
        )
    elif bool(goal.withheld) != command.is_drained:
        if command.is_drained and not any(each.role == engine.role for each in others):
            names = ", ".join(each.name for each in others)
            answer.notes = [f"no other {engine.role} engine serves: its work goes to {names}"]
        goal.withheld = "draining" if command.is_drained else ""
        yield Note(f"{engine.name} is {verb}, as was asked")
    yield SendAnswer(asker, answer)


def _change(
    command: ChangeEngines, asker: str, wanted: Desired, seen: Observed, plan: PlanChange
) -> Iterator[Action]:
    """Judge a change of the engines, and begin it unless it is a dry run."""
    answer = Answered(question=command.question)
    change = _judge(command, wanted, seen, plan, answer)
    answer.is_done = change is None
    yield SendAnswer(asker, answer)
    if change is not None and answer.change is not None:
        drain_s = answer.change.drain_s
        wanted.change = RunningChange(change, command.question, asker, drain_s)
        yield Note(f"engines change, as was asked: {wanted.change.what}")


def _judge(
    command: ChangeEngines,
    wanted: Desired,
    seen: Observed,
    plan: PlanChange,
    answer: Answered,
) -> EngineChange | None:
    """Return the change that is to begin, and write down the answer."""
    if seen.phase is not LaunchPhase.READY:
        answer.code, answer.error = "not_now", f"engines cannot change: the launch is {seen.phase}"
        return None
    if wanted.change is not None and not command.dry_run:
        answer.code, answer.error = (
            "not_now",
            f"another change is under way: {wanted.change.what}; `pdlaunch status` shows when it "
            "is done",
        )
        return None
    if command.turn:
        engine = seen.find_engine(command.turn)
        if engine is None:
            answer.code, answer.error = "engine_not_found", _unknown(seen, command.turn)
            return None
        command = msgspec.structs.replace(command, turn=engine.name)
    try:
        serving = {engine.name for engine in seen.serving(wanted)}
        drained = {name for name, goal in wanted.engines.items() if goal.withheld == "draining"}
        change = plan(command, serving, drained)
    except PdlaunchError as error:
        fix = getattr(error, "fix", None)
        answer.error = f"{error}{f'; fix: {fix}' if fix else ''}"
        return None
    drain_s = wanted.timing.drain_s if command.drain_s is None else command.drain_s
    planned = change.planned(drain_s)
    busy = [name for name in change.stops if wanted.engines[name].restart]
    if not change.starts and not change.stops:
        notes = "there is nothing to do: the engines are as you want them"
        answer.change, answer.notes = planned, [*change.notes, notes]
        return None
    if not _somebody_serves(change, seen.serving(wanted)):
        answer.error = (
            f"{', '.join(change.stops)}: no other engine serves, so that requests would fail "
            "meanwhile; add one first, or undrain or restart another one"
        )
        return None
    if busy:
        answer.code, answer.error = "not_now", f"{busy[0]} is being restarted"
        return None
    answer.change, answer.notes = planned, list(change.notes)
    return None if command.dry_run else change


def _somebody_serves(change: EngineChange, serving: Sequence[LaunchedEngine]) -> bool:
    """Return whether requests can be served while the change is made."""
    stays = {engine.name for engine in serving}.difference(change.stops)
    return bool(stays) or bool(change.starts and not change.stops_first)
