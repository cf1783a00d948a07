"""Gives both ends of the side channel a typed socket. A frame that does not fit the schema is
dropped and logged, and hurts nobody else.
"""

from __future__ import annotations

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

# Limit for one turn, so that a talkative peer cannot keep the thread from its other work.
MAX_MESSAGES_A_TURN = 256


class PrefillSocket:
    """Receives questions of decode ranks at the rank that holds the blocks; it is a ROUTER."""

    def __init__(self, context: SecureContext, endpoint: str) -> None:
        """Bind at once; the attribute ``endpoint`` then says where peers reach the socket."""
        self.socket, self.endpoint = context.listen(zmq.ROUTER, endpoint)

    def receive(self) -> list[tuple[bytes, ToPrefillSide]]:
        received = []
        for frames in _receive_ready(self.socket):
            try:
                # The identity, which the ROUTER adds, and the message.
                if len(frames) != 2:
                    raise ProtocolError(f"{len(frames)} frames instead of 2")
                received.append((frames[0], to_prefill_side.decode(frames[1])))
            except ProtocolError as error:
                logger.warning("dropped a message on the side channel: %s", error)
        return received

    def send(self, identity: bytes, message: ToDecodeSide) -> None:
        """Answer a peer. The answer is lost when the peer is gone."""
        try:
            self.socket.send_multipart([identity, to_decode_side.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.warning("an answer on the side channel was lost: %s", error)

    def close(self) -> None:
        self.socket.close()


class DecodeSocket:
    """Asks one prefill rank; it is a DEALER."""

    def __init__(self, context: SecureContext, endpoint: str, *, watched: bool = False) -> None:
        """Connect. ``watched``: notice when the connection breaks."""
        self.socket = context.connect(zmq.DEALER, endpoint)
        # Only writes by the peer need to know of its end: what pulls ask, they ask again.
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) if watched else None
        self._broken = False

    @property
    def broken(self) -> bool:
        """Return whether the other end is closed: on one host its process has ended."""
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
        """Queue a message. It is lost when the peer has not read for long."""
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
