"""The two ends of the side channel as typed sockets. Each belongs to the transfer thread.

Frames are schema-checked by the codec; what is malformed is dropped, counted and logged, and hurts
nobody.
"""

from __future__ import annotations

import logging
from typing import Any

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

MAX_MESSAGES_A_TURN = 256
"""So that one talkative peer cannot keep the thread from its other work."""


class PrefillSocket:
    """ROUTER of the rank that holds blocks."""

    def __init__(self, context: SecureContext, endpoint: str) -> None:
        """Binds at once; ``endpoint`` is then where peers reach it."""
        self.socket: Any
        self.socket, self.endpoint = context.listen(zmq.ROUTER, endpoint)

    def receive(self) -> list[tuple[bytes, ToPrefillSide]]:
        """What has arrived, with the identity to answer to; never blocks."""
        received = []
        for frames in _receive_ready(self.socket):
            try:
                if len(frames) != 2:
                    raise ProtocolError(f"{len(frames)} frames instead of 2")
                received.append((frames[0], to_prefill_side.decode(frames[1])))
            except ProtocolError as error:
                logger.warning("dropped a message on the side channel: %s", error)
        return received

    def send(self, identity: bytes, message: ToDecodeSide) -> None:
        """Answer a peer; lost when it is gone."""
        try:
            self.socket.send_multipart([identity, to_decode_side.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.warning("an answer on the side channel was lost: %s", error)

    def close(self) -> None:
        self.socket.close()


class DecodeSocket:
    """DEALER to one rank that holds blocks."""

    def __init__(self, context: SecureContext, endpoint: str, *, watched: bool = False) -> None:
        """``watched``: notice when the connection breaks."""
        self.socket: Any = context.connect(zmq.DEALER, endpoint)
        self._monitor: Any = (
            self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) if watched else None
        )
        self._broken = False

    @property
    def broken(self) -> bool:
        """The connection was closed by its other end. On one host that is the end of the peer's
        process, and no mere pause.
        """
        if self._monitor is not None and not self._broken:
            self._broken = bool(self._monitor.poll(0))
        return self._broken

    def receive(self) -> list[ToDecodeSide]:
        """What has arrived; never blocks."""
        received = []
        for frames in _receive_ready(self.socket):
            try:
                received.append(to_decode_side.decode(frames[-1]))
            except ProtocolError as error:
                logger.warning("dropped an answer on the side channel: %s", error)
        return received

    def send(self, message: ToPrefillSide) -> None:
        """Queue a message; lost when the peer has stopped reading for long."""
        try:
            self.socket.send(to_prefill_side.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("a message on the side channel was lost: the peer does not read")

    def close(self) -> None:
        """What is still queued gets half a second to leave."""
        if self._monitor is not None:
            self.socket.disable_monitor()
        self.socket.close()


def _receive_ready(socket: Any) -> list[list[bytes]]:
    found: list[list[bytes]] = []
    try:
        while len(found) < MAX_MESSAGES_A_TURN:
            found.append(socket.recv_multipart(zmq.NOBLOCK))
    except zmq.Again:
        return found
    return found
