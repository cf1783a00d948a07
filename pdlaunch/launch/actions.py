"""Names what the supervisor does when it acts on the state of a launch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from pdlaunch.protocol.control import FromSupervisor


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
    """Send a message; an answer to a command follows the registry that the command has changed."""

    process: str
    message: FromSupervisor


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell people, the log and the router what has happened."""

    text: str
    prefill: str = ""
    decode: str = ""  # the engines of a pair that has failed


@dataclass(frozen=True, slots=True)
class SendSuspects:
    """Tell the router the requests of an engine's last step, before it repeats them elsewhere."""

    engine: str


@dataclass(frozen=True, slots=True)
class ForgetEngine:
    """Drop all records of an engine that is gone for good."""

    engine: str


class Chore(Enum):
    """Actions without arguments."""

    ADD_ENGINES = auto()  # take in the processes of the engines that the running change starts
    CLOSE_LISTENERS = auto()  # refuse connections: no router will accept any more


Action = Start | SendSignal | SendMessage | Announce | SendSuspects | ForgetEngine | Chore
