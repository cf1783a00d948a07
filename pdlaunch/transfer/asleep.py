"""What the transfer thread does while the rank sleeps: say so, and remember the registry."""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from pdlaunch.protocol.control import Entry
from pdlaunch.protocol.side_channel import Refused
from pdlaunch.protocol.transfer import TransferCommand, TransferEvent
from pdlaunch.transfer.channel.handshake import RankIdentity
from pdlaunch.transfer.channel.side_channel import PrefillSocket

LONGEST_SLEEP_S = 60.0


class AsleepLoop:
    """Stands in for a ``TransferLoop``: there is no memory, so there are no leases, peers and
    pulls.
    """

    connected = False
    idle = quiet = True
    reads_pending = False

    def __init__(
        self, socket: PrefillSocket, identity: RankIdentity, entries: Sequence[Entry]
    ) -> None:
        self._socket = socket
        self._name = identity.name
        self.entries = entries

    def execute(self, command: TransferCommand) -> None:
        raise AssertionError(f"{self._name} sleeps and got {type(command).__name__}")

    def update_registry(self, entries: Sequence[Entry]) -> None:
        self.entries = entries

    def let_peers_go(self) -> None:
        """There are none."""

    def stay(self) -> None:
        raise AssertionError(f"{self._name} sleeps already")

    def turn(self) -> list[TransferEvent]:
        """Refuse what is asked; who asks tries again later."""
        for identity, message in self._socket.receive():
            self._socket.send(
                identity, Refused(call_id=message.call_id, reason=f"{self._name} is asleep")
            )
        return []

    def register(self, poller: zmq.Poller) -> None:
        poller.register(self._socket.socket, zmq.POLLIN)

    def sleep_s(self) -> float:
        return LONGEST_SLEEP_S

    def close(self) -> None:
        """Nothing to let go of: the connector was closed before."""
