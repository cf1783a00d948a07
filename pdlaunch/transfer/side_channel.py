"""Typed sockets for both ends of the side channel. A message that does not fit the schema is logged
and dropped; other messages are not affected.
"""

import logging

import zmq

from pdlaunch.errors import ProtocolError
from pdlaunch.protocol.side_channel import (
    ToDecodeSide,
    ToPrefillSide,
    to_decode_side,
    to_prefill_side,
)
from pdlaunch.protocol.sockets import SecureContext

logger = logging.getLogger(__name__)

# Limit for one turn, so that a peer that floods the socket cannot block the thread's other work.
MAX_MESSAGES_A_TURN = 256


class PrefillSocket:
    """Receives and answers the messages of decode ranks, at the prefill rank; a ROUTER."""

    def __init__(self, context: SecureContext, endpoint: str) -> None:
        """Bind the socket. The attribute ``endpoint`` is the address that peers connect to."""
        self.socket, self.endpoint = context.listen(zmq.ROUTER, endpoint)

    def receive(self) -> list[tuple[bytes, ToPrefillSide]]:
        received = []
        for frames in _receive_ready(self.socket):
            try:
                # The sender's identity, added by the ROUTER, and the message.
                if len(frames) != 2:
                    raise ProtocolError(f"{len(frames)} frames instead of 2")
                received.append((frames[0], to_prefill_side.decode(frames[1])))
            except ProtocolError as error:
                logger.warning("dropped a message on the side channel: %s", error)
        return received

    def send(self, identity: bytes, message: ToDecodeSide) -> None:
        """Answer a peer. The answer is lost if the peer is gone."""
        try:
            self.socket.send_multipart([identity, to_decode_side.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.warning("an answer on the side channel was lost: %s", error)

    def close(self) -> None:
        self.socket.close()


class DecodeSocket:
    """Sends messages to one prefill rank and receives its answers; a DEALER."""

    def __init__(self, context: SecureContext, endpoint: str, *, watched: bool = False) -> None:
        """Connect. ``watched``: set ``broken`` when the connection breaks."""
        self.socket = context.connect(zmq.DEALER, endpoint)
        # Only a Push needs to know of a broken connection: pulls repeat their questions.
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) if watched else None
        self._broken = False

    @property
    def broken(self) -> bool:
        """Return True if the peer has disconnected. On one host, its process has ended then."""
        if self._monitor is not None and not self._broken:
            self._broken = bool(self._monitor.poll(0))
        return self._broken

    def receive(self) -> list[ToDecodeSide]:
        received = []
        for frames in _receive_ready(self.socket):
            try:
                received.append(to_decode_side.decode(frames[-1]))
            except ProtocolError as error:
                logger.warning("dropped an answer on the side channel: %s", error)
        return received

    def send(self, message: ToPrefillSide) -> None:
        """Queue a message, or drop the message if the queue is full: the peer does not read."""
        try:
            self.socket.send(to_prefill_side.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("a message on the side channel was lost: the peer does not read")

    def close(self) -> None:
        if self._monitor is not None:
            self.socket.disable_monitor()
            self._monitor.close()
        self.socket.close()


def _receive_ready(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    found: list[list[bytes]] = []
    try:
        while len(found) < MAX_MESSAGES_A_TURN:
            found.append(socket.recv_multipart(zmq.NOBLOCK))
    except zmq.Again:
        pass
    return found
