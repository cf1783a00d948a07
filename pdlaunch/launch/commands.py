"""Answers commands that change the desired state of a running launch."""

from __future__ import annotations

from collections.abc import Callable, Collection

import msgspec

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.actions import Action, Note, SendAnswer
from pdlaunch.launch.state import Desired, EngineChange, LaunchedEngine, Observed, RunningChange
from pdlaunch.launch.status import LaunchPhase
from pdlaunch.protocol.control import Answered, ChangeEngines, RefusalCode, Restart, SetDrained

PlanChange = Callable[[ChangeEngines, Collection[str], Collection[str]], EngineChange]
"""The type of ``EnginePlaces.plan``."""
Command = Restart | SetDrained | ChangeEngines


class _Refused(Exception):
    def __init__(self, reason: str, code: RefusalCode = "refused") -> None:
        super().__init__(reason)
        self.code = code


def obey(
    command: Command, asker: str, wanted: Desired, seen: Observed, plan: PlanChange
) -> list[Action]:
    """Change the desired state, and answer."""
    answer = Answered(question=command.question)
    note = ""
    try:
        match command:
            case Restart():
                note = _restart(command, answer, wanted, seen)
            case SetDrained():
                note = _set_drained(command, answer, wanted, seen)
            case ChangeEngines():
                note = _change(command, answer, asker, wanted, seen, plan)
    except _Refused as refusal:
        answer.error, answer.code = str(refusal), refusal.code
    return [*([Note(note)] if note else []), SendAnswer(asker, answer)]


def _find(seen: Observed, name: str) -> LaunchedEngine:
    engine = seen.find_engine(name)
    if engine is None:
        there = ", ".join(seen.engines)
        raise _Refused(
            f"there is no engine {name[:100]}; there are: {there}", code="engine_not_found"
        )
    return engine


def _require_ready(what: str, seen: Observed, withheld: str = "") -> None:
    reason = {"joining": "it is being added", "leaving": "it is being removed"}.get(withheld, "")
    if seen.phase is not LaunchPhase.READY:
        reason = f"the launch is {seen.phase}"
    if reason:
        raise _Refused(f"{what}: {reason}", code="not_now")


def _restart(command: Restart, answer: Answered, wanted: Desired, seen: Observed) -> str:
    """Restart an engine; another request during the restart changes nothing."""
    engine = _find(seen, command.name)
    answer.engine, goal = engine.name, wanted.engines[engine.name]
    _require_ready(f"{engine.name} cannot be restarted", seen, goal.withheld)
    answer.incarnation = engine.server.incarnation
    if goal.restart:
        return ""
    goal.restart, goal.drain_s = True, wanted.timing.drain_s
    return f"{engine.name} is restarted, as was asked"


def _set_drained(command: SetDrained, answer: Answered, wanted: Desired, seen: Observed) -> str:
    """Withhold new work from an engine, or give it work again; running requests go on.

    The last serving engine is not drained. A repeated command changes nothing.
    """
    engine = _find(seen, command.name)
    answer.engine, goal = engine.name, wanted.engines[engine.name]
    verb = "drained" if command.is_drained else "undrained"
    _require_ready(f"{engine.name} cannot be {verb}", seen, goal.withheld)
    if bool(goal.withheld) == command.is_drained:
        return ""
    others = [each for each in seen.serving(wanted) if each is not engine]
    if command.is_drained and not others:
        raise _Refused(
            f"{engine.name} is not drained: no other engine serves; add one with `pdlaunch "
            "scale`, or undrain or restart another one"
        )
    if command.is_drained and not any(each.role == engine.role for each in others):
        names = ", ".join(each.name for each in others)
        answer.notes = [f"no other {engine.role} engine serves: its work goes to {names}"]
    goal.withheld = "draining" if command.is_drained else ""
    return f"{engine.name} is {verb}, as was asked"


def _change(
    command: ChangeEngines,
    answer: Answered,
    asker: str,
    wanted: Desired,
    seen: Observed,
    plan: PlanChange,
) -> str:
    """Check a change of the engines, and begin it unless it is a dry run."""
    _require_ready("engines cannot change", seen)
    if wanted.change is not None and not command.dry_run:
        raise _Refused(
            f"another change is under way: {wanted.change.what}; `pdlaunch status` shows when it "
            "is done",
            code="not_now",
        )
    if command.turn:
        engine = _find(seen, command.turn)
        command = msgspec.structs.replace(command, turn=engine.name)
    serving = {engine.name for engine in seen.serving(wanted)}
    drained = {name for name, goal in wanted.engines.items() if goal.withheld == "draining"}
    try:
        change = plan(command, serving, drained)
    except PdlaunchError as error:
        fix = getattr(error, "fix", None)
        raise _Refused(f"{error}{f'; fix: {fix}' if fix else ''}") from None
    drain_s = wanted.timing.drain_s if command.drain_s is None else command.drain_s
    planned = change.planned(drain_s)
    if not change.starts and not change.stops:
        answer.change = planned
        answer.notes = ["there is nothing to do: the engines are as you want them"]
        return ""
    if not serving.difference(change.stops) and (change.stops_first or not change.starts):
        raise _Refused(
            f"{', '.join(change.stops)}: no other engine serves, so that requests would fail "
            "meanwhile; add one first, or undrain or restart another one"
        )
    for name in change.stops:
        if wanted.engines[name].restart:
            raise _Refused(f"{name} is being restarted", code="not_now")
    answer.change, answer.notes = planned, list(change.notes)
    if command.dry_run:
        return ""
    answer.is_done = False
    wanted.change = RunningChange(change, command.question, asker, drain_s)
    return f"engines change, as was asked: {wanted.change.what}"
