"""Defines the channel between the supervisor (ROUTER) and the agents of other hosts (DEALER).

Every message is three frames: the version of the sender, its number in the session, and the
message. A number that is not the next one tells that messages were lost with a connection: the
session is over then, and its processes with it.
"""

from __future__ import annotations

import struct

from pdlaunch import __version__
from pdlaunch.errors import ProtocolError
from pdlaunch.machine.engine_commands import EngineCommand
from pdlaunch.machine.facts import Machine
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.step_record import LastStep
from pdlaunch.protocol.wire import Codec, Message

VERSION = __version__.encode()
_NUMBER = struct.Struct("<Q")


class Join(Message):
    """Asks to join, as the first message of a session."""

    name: str  # name of the host
    address: str  # its address on the route to the supervisor
    machine: Machine
    environ: dict[str, str] = {}  # the variables that rules read
    executables: dict[str, EngineCommand] = {}  # the programs of engines that it allows, by name


class Beat(Message):
    """Tells, in both directions, that the sender lives."""

    # Instant of the agent's clock; the supervisor sends the last one back, 0 before the first.
    stamp: float = 0.0


class Exited(Message):
    """Tells that a process has ended, and all of its group with it."""

    name: str
    incarnation: int
    returncode: int
    last_step: LastStep = LastStep()  # what the ranks of its engine computed; empty for a server


class Said(Message):
    """Passes a message of the control channel on."""

    name: str
    frame: bytes


class Printed(Message):
    """Passes on what a process has printed."""

    name: str
    data: bytes


class AgentRefused(Message):
    """Tells that an agent is not let in, or that its session is over."""

    reason: str


class Leave(Message):
    """Ends the session, and all processes of it at once."""

    reason: str


FromAgent = Join | Beat | Exited | Said | Printed | Leave


class AgentWelcome(Message):
    """Lets an agent join."""

    timeout_s: float  # it ends its processes when no Beat of its own was answered for so long
    beat_s: float  # it says Beat so often


class Spawn(Message):
    """Starts a process."""

    spec: ProcessSpec
    incarnation: int
    bootstrap: Bootstrap


class Signal(Message):
    """Signals a process and all that it has started."""

    name: str
    number: int


class Send(Message):
    """Passes a message of the control channel on to a process."""

    name: str
    frame: bytes


ToAgent = AgentWelcome | Beat | AgentRefused | Leave | Spawn | Signal | Send

from_agent: Codec[FromAgent] = Codec(FromAgent)
to_agent: Codec[ToAgent] = Codec(ToAgent)


class Session:
    """Numbers the messages of one side and checks those of the other."""

    def __init__(self) -> None:
        self._num_sent = self._num_received = 0

    def frames(self, payload: bytes) -> list[bytes]:
        """Return the frames of the next message."""
        self._num_sent += 1
        return [VERSION, _NUMBER.pack(self._num_sent), payload]

    def payload(self, frames: list[bytes]) -> bytes:
        """Return what stands in the frames of the next message. Raises ProtocolError."""
        if len(frames) != 3 or len(frames[1]) != _NUMBER.size:
            raise ProtocolError(f"a message of {len(frames)} frames")
        if frames[0] != VERSION:
            other = frames[0][:40].decode(errors="replace")
            raise ProtocolError(
                f"the sender is pdlaunch {other}, the receiver is {__version__}: install the same "
                "version on both hosts"
            )
        (number,) = _NUMBER.unpack(frames[1])
        if number != self._num_received + 1:
            raise ProtocolError(f"message {number} came after {self._num_received}: some were lost")
        self._num_received = number
        return frames[2]
