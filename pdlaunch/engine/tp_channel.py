"""The step channel of a TP group: rank 0 sends every plan to the other ranks, they report their
transfer events back.
"""

from __future__ import annotations

from typing import Any

import zmq

from pdlaunch.engine.step import FromRankZero, StepDone, from_rank_zero, step_done
from pdlaunch.protocol.sockets import SecureContext


class LeaderChannel:
    """Rank 0's end. A rank is there once it has said anything; ``socket`` is for the poller of the
    step loop.
    """

    def __init__(self, context: SecureContext, tp_size: int) -> None:
        self.socket, self.endpoint = context.listen(zmq.ROUTER, "tcp://127.0.0.1:0")
        self._num_followers = tp_size - 1
        self._followers: dict[int, bytes] = {}

    @property
    def complete(self) -> bool:
        return len(self._followers) == self._num_followers

    def send(self, message: FromRankZero) -> None:
        frame = from_rank_zero.encode(message)
        for identity in self._followers.values():
            self.socket.send_multipart([identity, frame])

    def receive(self) -> list[StepDone]:
        """What the followers have reported; never blocks."""
        reports = []
        for identity, frame in _drain(self.socket):
            report = step_done.decode(frame)
            self._followers[report.tp_rank] = identity
            reports.append(report)
        return reports


class FollowerChannel:
    """The end of any other rank."""

    def __init__(self, context: SecureContext, endpoint: str, tp_rank: int) -> None:
        self.socket = context.connect(zmq.DEALER, endpoint)
        self._tp_rank = tp_rank
        self.report(StepDone(tp_rank=tp_rank, step_id=-1))

    def report(self, message: StepDone) -> None:
        self.socket.send(step_done.encode(message))

    def receive(self) -> list[FromRankZero]:
        """Plans in the order in which they were sent; never blocks."""
        return [from_rank_zero.decode(frames[-1]) for frames in _drain(self.socket)]


def _drain(socket: Any) -> list[list[bytes]]:
    frames = []
    while True:
        try:
            frames.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return frames
