"""Rank 0's end of the channel to its engine's server."""

from __future__ import annotations

import logging
from typing import Any

import zmq

from pdlaunch.errors import ProtocolError
from pdlaunch.protocol.engine import FromRank, Hello, ToRank, from_rank, to_rank
from pdlaunch.protocol.sockets import SecureContext

logger = logging.getLogger(__name__)


class ServerLink:
    """One server at a time: the one that said Hello last. Messages of any other are dropped."""

    def __init__(self, context: SecureContext) -> None:
        self.socket, self.endpoint = context.listen(zmq.ROUTER, "tcp://127.0.0.1:0")
        self._server: bytes | None = None

    @property
    def connected(self) -> bool:
        """A server has said Hello."""
        return self._server is not None

    def receive(self) -> list[ToRank]:
        """What has arrived, in order; never blocks."""
        messages: list[ToRank] = []
        while True:
            try:
                identity, frame = self._receive_frame()
            except zmq.Again:
                return messages
            try:
                message = to_rank.decode(frame)
            except ProtocolError as error:
                logger.error("dropped a message from the server: %s", error)
                continue
            if isinstance(message, Hello):
                self._server = identity
            if identity == self._server:
                messages.append(message)

    def send(self, message: FromRank) -> None:
        """Send to the server, if one is there; a server that has gone misses it and says Hello
        again.
        """
        if self._server is not None:
            self.socket.send_multipart([self._server, from_rank.encode(message)])

    def _receive_frame(self) -> tuple[bytes, bytes]:
        frames: list[Any] = self.socket.recv_multipart(zmq.NOBLOCK)
        return frames[0], frames[-1]
