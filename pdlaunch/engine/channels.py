"""Holds rank 0's channels to the server and to the other ranks, and merges the ranks' reports."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, TypeVar

import zmq

from pdlaunch.engine.offload.planner import JobFinished
from pdlaunch.engine.step import FromRankZero, StepDone, from_rank_zero, step_done
from pdlaunch.machine.network import tcp_endpoint
from pdlaunch.protocol.engine import FromRank, Hello, ToRank, from_rank, to_rank
from pdlaunch.protocol.ids import LeaseId, PullId
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import (
    LeaseEnd,
    LeaseEnded,
    PullDrained,
    PullFinished,
    TransferEvent,
    join_paths,
)

LOOPBACK = "127.0.0.1"  # a server and all ranks of an engine run on one host

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ServerLink:
    """Holds rank 0's end of the channel to its server, the process that sent the last Hello."""

    def __init__(self, context: SecureContext) -> None:
        self.socket, self.endpoint = context.listen(zmq.ROUTER, tcp_endpoint(LOOPBACK, 0))
        self._server: bytes | None = None

    @property
    def connected(self) -> bool:
        return self._server is not None

    def receive(self) -> list[ToRank]:
        messages: list[ToRank] = []
        for identity, *_, frame in drain(self.socket):
            message = to_rank.decode(frame)
            if isinstance(message, Hello):
                self._server = identity
            if identity == self._server:
                messages.append(message)
        return messages

    def send(self, message: FromRank) -> None:
        """Send to the server, if it has connected. While the server restarts, messages are lost."""
        if self._server is not None:
            self.socket.send_multipart([self._server, from_rank.encode(message)])


class LeaderChannel:
    """Sends rank 0's messages to the other ranks, and receives their reports."""

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
        reports = []
        for identity, *_, frame in drain(self.socket):
            reports.append(step_done.decode(frame))
            self._followers[reports[-1].tp_rank] = identity
        return reports


class RankReports:
    """Merges the ranks' reports: a block is moved only when each rank has moved its KV heads."""

    def __init__(self, tp_size: int) -> None:
        self._tp_size = tp_size
        self._reports: dict[tuple[type, LeaseId | PullId | int], list[Any]] = {}
        self._num_drained: Counter[PullId] = Counter()

    def add(self, report: JobFinished | TransferEvent) -> JobFinished | TransferEvent | None:
        """Return the merged report of all ranks; None until the last rank has reported."""
        match report:
            case JobFinished():
                if reports := self._complete(report, report.job_id):
                    return _merged(JobFinished, JobFinished.__slots__, reports)
            case LeaseEnded():
                if reports := self._complete(report, report.lease_id):
                    # If the lease expired on one rank, it counts as expired for the engine.
                    reasons = {one.reason for one in reports}
                    names: tuple[LeaseEnd, ...] = ("expired", "released", "pulled")
                    reason = next(name for name in names if name in reasons)
                    return LeaseEnded(lease_id=report.lease_id, reason=reason)
            case PullFinished():
                if reports := self._complete(report, report.pull_id):
                    merged = _merged(PullFinished, PullFinished.__struct_fields__, reports)
                    # A rank with a READ in flight sends a PullDrained later, perhaps before the
                    # last rank reports. If all such ranks have, no READ is in flight any more.
                    num_in_flight = sum(one.in_flight for one in reports)
                    self._num_drained[report.pull_id] -= num_in_flight
                    merged.in_flight = not self._is_drained(report.pull_id)
                    return merged
            case PullDrained():
                self._num_drained[report.pull_id] += 1
                return report if self._is_drained(report.pull_id) else None
        return None

    def _complete(self, report: object, name: LeaseId | PullId | int) -> list[Any] | None:
        key = type(report), name
        reports = self._reports.setdefault(key, [])
        reports.append(report)
        return self._reports.pop(key) if len(reports) == self._tp_size else None

    def _is_drained(self, pull_id: PullId) -> bool:
        """Return True if each rank that left a READ in flight has sent its PullDrained."""
        # Below 0 while a PullDrained is missing, above 0 while a PullFinished is.
        if self._num_drained[pull_id] == 0:
            del self._num_drained[pull_id]
            return True
        return False


# How to merge the ranks' values of a field
_MERGED: dict[str, Callable[[Sequence[Any]], Any]] = {
    "pull_id": min,
    "job_id": min,
    # If one rank has failed, the engine computes the prompt itself. It cannot pull the lease again,
    # because the other ranks have used up their shares.
    "ok": all,
    "error": lambda errors: "; ".join(sorted({*filter(None, errors)})),
    "in_flight": any,
    "blames_pair": any,
    "num_bytes": sum,
    "seconds": max,
    "read_s": max,
    "prefill": max,
    "path": join_paths,
    # Retries of READs are summed over the ranks. A cause of failure counts once for each pull.
    "counts": lambda of_ranks: {
        name: (sum if name == "kv_pull_retries" else max)([one.get(name, 0) for one in of_ranks])
        for name in {*chain(*of_ranks)}
    },
    "reports": lambda of_ranks: {rank: told for one in of_ranks for rank, told in one.items()},
    "failed_host_ids": lambda of_ranks: sorted({*chain(*of_ranks)}),
}


def _merged(kind: type[T], names: Iterable[str], reports: Sequence[object]) -> T:
    # A field without an entry in ``_MERGED`` raises KeyError instead of being lost silently.
    return kind(
        **{name: _MERGED[name]([getattr(report, name) for report in reports]) for name in names}
    )


def drain(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    """Receive all messages that have arrived, each as its frames; never blocks."""
    frames = []
    while True:
        try:
            frames.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return frames
