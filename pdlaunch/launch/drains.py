"""Gives engines no new work because somebody asked, until somebody asks for the opposite.

Nothing is moved by force: what runs there goes on. It holds while the engine is restarted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdlaunch.launch.instance import Unit, find_engine, server_of, serving, unknown_engine
from pdlaunch.launch.states import LaunchPhase
from pdlaunch.protocol.changes import Answered, RefusalCode, SetDrained


class Drains:
    """Answers ``pdlaunch drain`` and ``undrain``. ``units``: all of the launch."""

    def __init__(self, units: Sequence[Unit], note: Callable[[str], None]) -> None:
        self._units = units
        self._note = note

    def ask(self, message: SetDrained, phase: LaunchPhase) -> Answered:
        """Withhold new work from an engine, or give it work again.

        The last engine that serves is not drained. Asking again changes nothing.
        """
        engine = find_engine(self._units, message.name)
        verb = "drained" if message.is_drained else "undrained"

        def refused(code: RefusalCode, error: str) -> Answered:
            return Answered(question=message.question, engine=engine, code=code, error=error)

        if not engine:
            return refused("engine_not_found", unknown_engine(self._units, message.name))
        if phase is not LaunchPhase.READY:
            return refused("not_now", f"{engine} cannot be {verb}: the launch is {phase}")
        server = server_of(self._units, engine)
        if server.withheld in ("joining", "leaving"):
            doing = "added" if server.withheld == "joining" else "removed"
            return refused("not_now", f"{engine} cannot be {verb}: it is being {doing}")
        notes = []
        if message.is_drained and not server.withheld:
            others = [other for other in serving(self._units) if other.spec.engine != engine]
            if not others:
                return refused(
                    "refused",
                    f"{engine} is not drained: no other engine serves; add one with `pdlaunch "
                    "scale`, or undrain or restart another one",
                )
            if not any(other.spec.role == server.spec.role for other in others):
                names = ", ".join(other.name for other in others)
                notes.append(f"no other {server.spec.role} engine serves: its work goes to {names}")
        if bool(server.withheld) != message.is_drained:
            server.withheld = "draining" if message.is_drained else ""
            self._note(f"{engine} is {verb}, as was asked")
        return Answered(question=message.question, engine=engine, notes=notes)
