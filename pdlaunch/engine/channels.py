"""Holds the channels that a rank's step loop polls: to rank 0's server, to ranks, to threads."""

from __future__ import annotations

import contextlib
import logging
import os

import zmq

from pdlaunch.engine.step import FromRankZero, StepDone, from_rank_zero, step_done
from pdlaunch.errors import ProtocolError
from pdlaunch.machine.network import tcp_endpoint
from pdlaunch.protocol.engine import FromRank, Hello, ToRank, from_rank, to_rank
from pdlaunch.protocol.sockets import SecureContext

LOOPBACK = "127.0.0.1"
"""A server runs on the host of its rank 0, and most TP groups on one host."""

logger = logging.getLogger(__name__)


class ServerLink:
    """Holds rank 0's end of the channel to its engine's server.

    The server that said Hello last is the engine's; messages of any other are dropped.
    """

    def __init__(self, context: SecureContext) -> None:
        self.socket, self.endpoint = context.listen(zmq.ROUTER, tcp_endpoint(LOOPBACK, 0))
        self._server: bytes | None = None

    @property
    def connected(self) -> bool:
        """Return whether a server has said Hello."""
        return self._server is not None

    def receive(self) -> list[ToRank]:
        """Return the messages that have arrived, in order; never blocks."""
        messages: list[ToRank] = []
        for identity, *_, frame in _drain(self.socket):
            try:
                message = to_rank.decode(frame)
            except ProtocolError as error:
                logger.error("dropped a message from the server: %s", error)
                continue
            if isinstance(message, Hello):
                self._server = identity
            if identity == self._server:
                messages.append(message)
        return messages

    def send(self, message: FromRank) -> None:
        """Send to the server, if there is one; one that restarts misses it and says Hello again."""
        if self._server is not None:
            self.socket.send_multipart([self._server, from_rank.encode(message)])


class LeaderChannel:
    """Holds rank 0's end of the step channel of a TP group.

    Rank 0 sends every plan to the other ranks, which report the ends of transfers and copies back.
    """

    def __init__(
        self,
        context: SecureContext,
        tp_size: int,
        bind_address: str = LOOPBACK,
        advertise_address: str = LOOPBACK,
    ) -> None:
        self.socket, bound = context.listen(zmq.ROUTER, tcp_endpoint(bind_address, 0))
        self.endpoint = tcp_endpoint(advertise_address, int(bound.rpartition(":")[2]))
        self._num_followers = tp_size - 1
        self._followers: dict[int, bytes] = {}

    @property
    def complete(self) -> bool:
        """Return whether every other rank has said something."""
        return len(self._followers) == self._num_followers

    def send(self, message: FromRankZero) -> None:
        frame = from_rank_zero.encode(message)
        for identity in self._followers.values():
            self.socket.send_multipart([identity, frame])

    def receive(self) -> list[StepDone]:
        """Return what the other ranks have reported; never blocks."""
        reports = []
        for identity, *_, frame in _drain(self.socket):
            report = step_done.decode(frame)
            self._followers[report.tp_rank] = identity
            reports.append(report)
        return reports


class FollowerChannel:
    """Holds the end of any other rank of the step channel."""

    def __init__(self, context: SecureContext, endpoint: str, tp_rank: int) -> None:
        self.socket = context.connect(zmq.DEALER, endpoint)
        self._tp_rank = tp_rank
        self.report(StepDone(tp_rank=tp_rank))

    def report(self, message: StepDone) -> None:
        self.socket.send(step_done.encode(message))

    def receive(self) -> list[FromRankZero]:
        """Return rank 0's messages in the order in which they were sent; never blocks."""
        return [from_rank_zero.decode(frames[-1]) for frames in _drain(self.socket)]


class Wakeup:
    """Wakes a thread that polls sockets, from any other thread.

    ``fd`` is the end of a pipe, for the poller; ``set`` never blocks.
    """

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write_fd, False)

    def set(self) -> None:
        # A full pipe wakes the poller as well as one more byte would.
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_fd, b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 4096):
                pass


def _drain(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    """Receive all messages that have arrived, each as its frames."""
    frames = []
    while True:
        try:
            frames.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return frames
