"""Keeps the last events of a deployment, for the status and the page."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from pdlaunch.protocol.control import Registry
from pdlaunch.protocol.status import EventKind, GoneEngine, StatusEvent
from pdlaunch.router.engine import Engine

MAX_EVENTS = 100
MAX_TEXT = 500  # characters; what a dead process said may be longer
GONE_S = 600.0
MAX_GONE = 100


class EventLog:
    """Holds what has happened, and the engines that are gone. ``wall_clock`` tells Unix time."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._events: deque[StatusEvent] = deque(maxlen=MAX_EVENTS)
        self._seen: dict[str, tuple[str | None, str]] = {}  # roles and states of engines
        self._gone: dict[str, tuple[str | None, float]] = {}
        # Engines that were ready, and were not seen to sleep or drain since.
        self._served: set[str] = set()

    @property
    def events(self) -> list[StatusEvent]:
        return list(self._events)

    def add(
        self, kind: EventKind, name: str, text: str, *, is_bad: bool, ago_s: float = 0.0
    ) -> None:
        at = self._wall_clock() - ago_s
        event = StatusEvent(at=at, kind=kind, name=name, text=text[:MAX_TEXT], is_bad=is_bad)
        # What the supervisor tells a new router happened before what that one saw itself.
        in_order = sorted([*self._events, event], key=lambda each: each.at)
        self._events = deque(in_order, maxlen=MAX_EVENTS)

    def gone(self) -> list[GoneEngine]:
        """Return the engines that have left in the last minutes and are not back."""
        now_at = self._wall_clock()
        return [
            GoneEngine(name=name, role=role, gone_s=now_at - at)
            for name, (role, at) in self._gone.items()
            if now_at - at < GONE_S
        ]

    def is_down(self, engine: Engine) -> bool:
        """Tell whether an engine does not work though nobody has asked for that."""
        if engine.state == "starting":
            return engine.name in self._served
        return engine.state in ("failed", "stalled")

    def engines_changed(self, registry: Registry, engines: Sequence[Engine]) -> None:
        """Note each engine whose state is another one than in the registry before."""
        before, self._seen = self._seen, {each.name: (each.role, each.state) for each in engines}
        for engine in engines:
            name, state = engine.name, engine.state
            if state == "ready":
                self._served.add(name)
            elif state in ("sleeping", "draining"):
                self._served.discard(name)
            self._gone.pop(name, None)
            _, state_before = before.get(name, (None, ""))
            # The start of a launch is no event: it would be one for each engine.
            is_first = not state_before and (not before or not registry.serving)
            if state_before == state or is_first:
                continue
            was = f"was {state_before}" if state_before else "is here"
            reason = f": {engine.reason}" if engine.reason else ""
            self.add("engine", name, f"{state} ({was}){reason}", is_bad=self.is_down(engine))
        for name, (role, state) in before.items():
            if name not in self._seen:
                self.add("engine", name, f"gone (was {state})", is_bad=state == "ready")
                self._gone[name] = (role, self._wall_clock())
        while len(self._gone) > MAX_GONE:
            del self._gone[next(iter(self._gone))]
        self._served &= self._seen.keys() | self._gone.keys()
