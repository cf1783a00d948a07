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
    """Sends rank 0's plans to the other ranks, which report ends of transfers and copies."""

    def __init__(self, context: SecureContext, tp_size: int) -> None:
        self.socket, self.endpoint = context.listen(zmq.ROUTER, tcp_endpoint(LOOPBACK, 0))
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


class EventMerger:
    """Merges the transfer events of all ranks into one each: a block is moved only when every rank
    has moved its heads. ``add`` returns events that are now true of the whole engine.
    """

    def __init__(self, tp_size: int) -> None:
        self._tp_size = tp_size
        self._leases: dict[LeaseId, list[LeaseEnded]] = {}
        self._finished: dict[PullId, list[PullFinished]] = {}
        self._num_drained: dict[PullId, int] = {}

    def add(self, event: TransferEvent) -> list[TransferEvent]:
        match event:
            case LeaseEnded():
                events = self._add_lease(event)
            case PullFinished():
                self._finished.setdefault(event.pull_id, []).append(event)
                events = self._pull_events(event.pull_id, newly_finished=True)
            case PullDrained():
                self._num_drained[event.pull_id] = self._num_drained.get(event.pull_id, 0) + 1
                events = self._pull_events(event.pull_id, newly_finished=False)
        return events

    def _add_lease(self, event: LeaseEnded) -> list[TransferEvent]:
        reports = self._leases.setdefault(event.lease_id, [])
        reports.append(event)
        if len(reports) < self._tp_size:
            return []
        del self._leases[event.lease_id]
        # One rank whose lease expired makes the whole lease an expired one.
        reasons = {report.reason for report in reports}
        reason = next(name for name in ("expired", "released", "pulled") if name in reasons)
        return [LeaseEnded(lease_id=event.lease_id, reason=reason)]

    def _pull_events(self, pull_id: PullId, *, newly_finished: bool) -> list[TransferEvent]:
        reports = self._finished.get(pull_id, [])
        if len(reports) < self._tp_size:
            return []
        # Each rank that reports a READ in flight sends a PullDrained, too, perhaps before the last
        # rank reports.
        num_in_flight = sum(report.in_flight for report in reports)
        num_drained = self._num_drained.get(pull_id, 0)
        all_drained = num_drained >= num_in_flight
        events: list[TransferEvent] = []
        if newly_finished:
            # The last rank reports after others have drained: then nothing is in flight any more.
            events.append(_merge(reports, in_flight=not all_drained))
        elif all_drained:
            events.append(PullDrained(pull_id=pull_id))
        if all_drained:
            del self._finished[pull_id]
            self._num_drained.pop(pull_id, None)
        return events


def _merge(reports: list[PullFinished], *, in_flight: bool) -> PullFinished:
    """Return all ranks' reports as one, which is right only if all are."""
    # One rank that has failed makes the engine compute the prompt again: the others' shares of the
    # lease are used up, so that nobody can pull it a second time.
    failed = [report for report in reports if not report.ok]
    return PullFinished(
        pull_id=reports[0].pull_id,
        ok=not failed,
        error="; ".join(sorted({report.error for report in failed})),
        in_flight=in_flight,
        num_bytes=sum(report.num_bytes for report in reports),
        seconds=max(report.seconds for report in reports),
        read_s=max(report.read_s for report in reports),
        prefill=next((report.prefill for report in reports if report.prefill), ""),
        path=join_paths(report.path for report in reports),
        verification_failed=any(report.verification_failed for report in reports),
        late=any(report.late for report in reports),
        num_retries=sum(report.num_retries for report in reports),
        reports={rank: told for report in reports for rank, told in report.reports.items()},
    )


class Wakeup:
    """Wakes a thread that polls ``fd`` and sockets, from any other thread; never blocks."""

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
