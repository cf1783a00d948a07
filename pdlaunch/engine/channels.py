"""Holds the channels that a rank's step loop polls: to rank 0's server, to ranks, to threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from pdlaunch.engine.step import FromRankZero, StepDone, from_rank_zero, step_done
from pdlaunch.machine.network import tcp_endpoint
from pdlaunch.protocol.engine import FromRank, Hello, ToRank, from_rank, to_rank
from pdlaunch.protocol.ids import LeaseId, PullId
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import (
    LeaseEnded,
    PullDrained,
    PullFinished,
    TransferEvent,
    join_paths,
)

LOOPBACK = "127.0.0.1"  # a server and all ranks of an engine run on one host

logger = logging.getLogger(__name__)


class ServerLink:
    """Holds rank 0's end of the channel to its server: the one that said Hello last."""

    def __init__(self, context: SecureContext) -> None:
        self.socket, self.endpoint = context.listen(zmq.ROUTER, tcp_endpoint(LOOPBACK, 0))
        self._server: bytes | None = None

    @property
    def connected(self) -> bool:
        return self._server is not None

    def receive(self) -> list[ToRank]:
        """Return the messages that have arrived, in order; never blocks."""
        messages: list[ToRank] = []
        for identity, *_, frame in drain(self.socket):
            message = to_rank.decode(frame)
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
    """Sends rank 0's plans to the other ranks, which report ends of transfers and copies."""

    def __init__(self, context: SecureContext, tp_size: int) -> None:
        self.socket, self.endpoint = context.listen(zmq.ROUTER, tcp_endpoint(LOOPBACK, 0))
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
        """Return what the other ranks have reported; never blocks."""
        reports = []
        for identity, *_, frame in drain(self.socket):
            reports.append(step_done.decode(frame))
            self._followers[reports[-1].tp_rank] = identity
        return reports


class EventMerger:
    """Merges the transfer events of all ranks into one each: a block is moved only when every rank
    has moved its heads.
    """

    def __init__(self, tp_size: int) -> None:
        self._tp_size = tp_size
        self._leases: dict[LeaseId, list[str]] = {}
        self._pulls: dict[PullId, list[PullFinished]] = {}
        self._num_drained: dict[PullId, int] = {}

    def add(self, event: TransferEvent) -> TransferEvent | None:
        """Return the event of the whole engine; None until every rank has reported."""
        if isinstance(event, LeaseEnded):
            reasons = self._leases.setdefault(event.lease_id, [])
            reasons.append(event.reason)
            if len(reasons) < self._tp_size:
                return None
            del self._leases[event.lease_id]
            # One rank whose lease expired makes the whole lease an expired one.
            reason = next(name for name in ("expired", "released", "pulled") if name in reasons)
            return LeaseEnded(lease_id=event.lease_id, reason=reason)
        pull_id = event.pull_id
        reports = self._pulls.setdefault(pull_id, [])
        num_drained = self._num_drained.setdefault(pull_id, 0)
        if isinstance(event, PullDrained):
            num_drained = self._num_drained[pull_id] = num_drained + 1
        else:
            reports.append(event)
        if len(reports) < self._tp_size:
            return None
        # Each rank that reports a READ in flight sends a PullDrained, too, perhaps before the last
        # rank reports: then nothing is in flight any more.
        in_flight = num_drained < sum(report.in_flight for report in reports)
        if not in_flight:
            del self._pulls[pull_id], self._num_drained[pull_id]
        if isinstance(event, PullDrained):
            return None if in_flight else event
        merged = {
            name: merge([getattr(report, name) for report in reports])
            for name, merge in _MERGED.items()
        }
        return PullFinished(**merged | {"in_flight": in_flight})


_MERGED: dict[str, Callable[[Sequence[Any]], Any]] = {
    "pull_id": min,
    # One rank that has failed makes the engine compute the prompt again: the others' shares of the
    # lease are used up, so that nobody can pull it a second time.
    "ok": all,
    "error": lambda errors: "; ".join(sorted({*filter(None, errors)})),
    "in_flight": any,
    "num_bytes": sum,
    "seconds": max,
    "read_s": max,
    "prefill": max,
    "path": join_paths,
    "verification_failed": any,
    "late": any,
    "num_retries": sum,
    "reports": lambda of_ranks: {rank: told for one in of_ranks for rank, told in one.items()},
}
"""How to merge the ranks' values of each field of PullFinished."""
# A field without an entry would be lost silently.
assert _MERGED.keys() == {*PullFinished.__struct_fields__}


def drain(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    """Receive all messages that have arrived, each as its frames; never blocks."""
    frames = []
    while True:
        try:
            frames.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return frames
