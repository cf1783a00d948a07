"""Defines the channel between the supervisor (ROUTER) and the agents of other hosts (DEALER).

Every message has three frames: the sender's version, the number of the message in the session, and
the message. If a number is not the next one, messages were lost with a connection: the session
ends, and its processes are killed.
"""

import struct

from pdlaunch import __version__
from pdlaunch.errors import ProtocolError
from pdlaunch.launch.hosts.local import ProcessExited
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.host import EngineCommand
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.wire import Codec, Message

VERSION = __version__.encode()
_NUMBER = struct.Struct("<Q")


class Join(Message):
    name: str  # name of the host
    address: str  # the host's address on the route to the supervisor
    machine: Machine
    environ: dict[str, str] = {}  # environment variables that rules read
    executables: dict[str, EngineCommand] = {}  # programs of engines that the agent allows, by name


class Beat(Message):
    """Heartbeat, in both directions."""

    # Time on the agent's clock. The supervisor sends the last stamp back, 0 before the first.
    stamp: float = 0.0


class Said(Message):
    name: str
    frame: bytes


class Printed(Message):
    name: str
    data: bytes


class AgentRefused(Message):
    reason: str


class Leave(Message):
    """Ends the session; all of its processes are killed at once."""

    reason: str


FromAgent = Join | Beat | ProcessExited | Said | Printed | Leave


class AgentWelcome(Message):
    timeout_s: float  # the agent ends its processes after this time without an answered Beat
    beat_s: float  # interval of the agent's Beats


class Spawn(Message):
    spec: ProcessSpec
    incarnation: int
    bootstrap: Bootstrap


class Signal(Message):
    name: str
    number: int


class Send(Message):
    name: str
    frame: bytes


ToAgent = AgentWelcome | Beat | AgentRefused | Leave | Spawn | Signal | Send

from_agent: Codec[FromAgent] = Codec(FromAgent)
to_agent: Codec[ToAgent] = Codec(ToAgent)


class Session:
    """Numbers the messages of one side and checks the numbers of the other side."""

    def __init__(self) -> None:
        self._num_sent = self._num_received = 0

    def frames(self, payload: bytes) -> list[bytes]:
        self._num_sent += 1
        return [VERSION, _NUMBER.pack(self._num_sent), payload]

    def payload(self, frames: list[bytes]) -> bytes:
        """Check the frames of the next message and return its payload. Raises ProtocolError."""
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
