"""Names what the supervisor does when it acts on the state of a launch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from pdlaunch.protocol.control import Answered, FromSupervisor


@dataclass(frozen=True, slots=True)
class Start:
    """Start a unit under its next incarnation, where there is room for it."""

    unit: str


@dataclass(frozen=True, slots=True)
class SendSignal:
    """Signal a process and all that it has started."""

    process: str
    number: int


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Tell a process something now."""

    process: str
    message: FromSupervisor


@dataclass(frozen=True, slots=True)
class SendAnswer:
    """Answer a command once all processes know what has changed."""

    process: str
    message: Answered


@dataclass(frozen=True, slots=True)
class Note:
    """Tell people, the log and the router what has happened."""

    text: str
    prefill: str = ""
    decode: str = ""
    """The engines of a pair that has failed."""


@dataclass(frozen=True, slots=True)
class Show:
    """Show people a line of the router's log."""

    line: str


@dataclass(frozen=True, slots=True)
class Greet:
    """Tell a process that has just registered what the others know."""

    process: str


@dataclass(frozen=True, slots=True)
class TellSuspects:
    """Tell the router the requests of an engine's last step, before it repeats them elsewhere."""

    engine: str


@dataclass(frozen=True, slots=True)
class ForgetEngine:
    """Drop what is kept of an engine that is gone for good."""

    engine: str


class Chore(Enum):
    """Is an action that says all by its name."""

    PREPARE = auto()
    """Work out what servers and ranks are given, now that all models are converted."""
    ADD_ENGINES = auto()
    """Take in the processes of the engines that the running change starts."""
    CLOSE_LISTENERS = auto()
    """Refuse connections: no router will accept any more."""


Action = (
    Start
    | SendSignal
    | SendMessage
    | SendAnswer
    | Note
    | Show
    | Greet
    | TellSuspects
    | ForgetEngine
    | Chore
)
