"""Commands that change which engines of a launch are given work, or which there are.

The router asks for somebody who may; the supervisor answers with ``Answered``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.protocol.wire import Message

Withheld = Literal["", "joining", "draining", "leaving"]
"""Why an engine that is ready is given no new work: its pairs are yet to be proven, somebody drains
it, or it is about to be removed.
"""
RefusalCode = Literal["engine_not_found", "not_now", "refused"]


def why_withheld(withheld: Withheld, engine: str) -> str:
    """Return the reason in words; empty without one."""
    match withheld:
        case "joining":
            return "it joins once its pairs are proven"
        case "draining":
            return f"no new work until `pdlaunch undrain {engine}`"
        case "leaving":
            return "it finishes what runs, and is removed"
        case "":
            return ""


class SetDrained(Message):
    """Asks to give an engine no new work, or to give it work again."""

    question: int
    """Comes back with the answer."""
    name: str
    """Names the engine, or one of its processes."""
    is_drained: bool


class ChangeEngines(Message):
    """Asks for another number of engines of some roles, or for an engine under another role."""

    question: int
    replicas: dict[Role, int] = msgspec.field(default_factory=dict)
    """Numbers of engines; other roles keep theirs."""
    turn: str = ""
    """The engine, or one of its processes, that takes ``role``."""
    role: Role | None = None
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    drain_s: float | None = None
    """Seconds that running requests get at an engine that stops; None: ``drain_timeout_s``."""


class PlannedEngine(Message, tag=False):
    """Describes an engine that is to start, on ``cpu`` or the ``cuda:N`` of each rank."""

    name: str
    role: Role
    host: str
    devices: list[str]
    num_threads: int


class PlannedChange(Message, tag=False):
    """Describes a change of the engines of a launch."""

    replicas: dict[Role, int]
    """Engines of each role once it is done."""
    starts: list[PlannedEngine]
    stops: list[str]
    stops_first: bool
    drain_s: float
    """Seconds that running requests get at an engine that stops, before they go on elsewhere."""


class Answered(Message):
    """Answers one of these commands: it is done or has begun, or ``error`` says why not."""

    question: int
    engine: str = ""
    error: str = ""
    code: RefusalCode = "refused"
    notes: list[str] = msgspec.field(default_factory=list)
    change: PlannedChange | None = None
    """The change that is made, or would be with ``dry_run``."""
    is_done: bool = True
    """Another answer follows when it is."""


class AwaitIdle(Message):
    """Asks a router to tell when an engine that is given no new work has none left, and nobody has
    yet to read KV blocks that it has computed.
    """

    engine: str


class EngineIdle(Message):
    """Answers AwaitIdle."""

    engine: str
