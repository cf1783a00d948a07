"""Answers commands that change the desired state of a running launch."""

from __future__ import annotations

from collections.abc import Callable, Collection

import msgspec

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.actions import Action, SendMessage
from pdlaunch.launch.state import Desired, EngineChange, LaunchedEngine, Observed, Turn
from pdlaunch.launch.status import LaunchPhase
from pdlaunch.protocol.control import (
    Answered,
    ChangeEngines,
    Command,
    RefusalCode,
    Restart,
    SetDrained,
)

PlanChange = Callable[[ChangeEngines, Collection[str], Collection[str]], EngineChange]
"""The type of ``EnginePlaces.plan``."""


class _Refused(Exception):
    def __init__(self, reason: str, code: RefusalCode = "refused") -> None:
        super().__init__(reason)
        self.code = code


def obey(
    command: Command, asker: str, wanted: Desired, seen: Observed, plan: PlanChange, now: float
) -> list[Action]:
    """Change the desired state, and answer; do nothing when the asker has given up."""
    turn = Turn(wanted, seen, now)
    if now > command.expires_at:
        turn.announce("a command is dropped: nobody waits for its answer any more")
        return turn.actions
    answer = Answered(question=command.question)
    try:
        match command:
            case Restart():
                _restart(turn, command, answer)
            case SetDrained():
                _set_drained(turn, command, answer)
            case ChangeEngines():
                _change(turn, command, answer, asker, plan)
    except _Refused as refusal:
        answer.error, answer.code = str(refusal), refusal.code
    turn.do(SendMessage(asker, answer))
    return turn.actions


def _find(seen: Observed, name: str) -> LaunchedEngine:
    engine = seen.find_engine(name)
    if engine is None:
        reason = f"there is no engine {name[:100]}; there are: {', '.join(seen.engines)}"
        raise _Refused(reason, code="engine_not_found")
    return engine


def _require_ready(what: str, seen: Observed, withheld: str = "") -> None:
    reason = {"joining": "it is being added", "leaving": "it is being removed"}.get(withheld, "")
    if seen.phase is not LaunchPhase.READY:
        reason = f"the launch is {seen.phase}"
    if reason:
        raise _Refused(f"{what}: {reason}", code="not_now")


def _restart(turn: Turn, command: Restart, answer: Answered) -> None:
    """Restart an engine; another request during the restart changes nothing."""
    engine = _find(turn.seen, command.name)
    answer.engine, goal = engine.name, turn.wanted.engines[engine.name]
    _require_ready(f"{engine.name} cannot be restarted", turn.seen, goal.withheld)
    answer.incarnation = engine.server.incarnation
    if not goal.restart:
        goal.restart, goal.drain_s = True, turn.wanted.timing.drain_s
        turn.announce(f"{engine.name} is restarted, as was asked")


def _set_drained(turn: Turn, command: SetDrained, answer: Answered) -> None:
    """Withhold new work from an engine, or give it work again; running requests go on.

    The last serving engine is not drained. A repeated command changes nothing.
    """
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
    turn.announce(f"{engine.name} is {verb}, as was asked")


def _change(
    turn: Turn, command: ChangeEngines, answer: Answered, asker: str, plan: PlanChange
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
    stops, drain_s = change.planned.stops, command.drain_s
    change.planned.drain_s = wanted.timing.drain_s if drain_s is None else drain_s
    if not change.starts and not stops:
        answer.change = change.planned
        answer.notes = ["there is nothing to do: the engines are as you want them"]
        return
    if not serving.difference(stops) and (change.planned.stops_first or not change.starts):
        raise _Refused(
            f"{', '.join(stops)}: no other engine serves, so that requests would fail meanwhile; "
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
    turn.announce(f"engines change, as was asked: {change.what}")
