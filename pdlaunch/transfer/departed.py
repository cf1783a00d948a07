"""A holder whose process has died, and whose memory can still be read: its ledger answers in its
place.

Nobody can use the blocks of its leases for anything else, so a pull of them is as good as from the
living: the same questions, the same answers, the same proof. Leases end here as they would there,
but count only the readers of this rank, and with the last of them the memory can go. What others
read does not show: a lease that nobody here reads ends ``lease_s`` after the death.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable

from pdlaunch.errors import LeaseError
from pdlaunch.protocol.side_channel import (
    ChecksumsReply,
    Handshake,
    Heartbeat,
    HeartbeatReply,
    PullBegin,
    PullEnd,
    PullEndReply,
    PullReply,
    Push,
    Refused,
    StateChecksums,
    ToHolder,
    ToPuller,
)
from pdlaunch.transfer.ledger import read_ledger
from pdlaunch.transfer.prefill_side.lease import Lease, LeaseTable

logger = logging.getLogger(__name__)


class DepartedHolder:
    """Takes the place of the channel; what is asked before the holder's process is dead waits. The
    transfer thread owns it.
    """

    broken = False

    def __init__(
        self,
        name: str,
        *,
        process_fd: int,
        ledger_fd: int,
        patience_s: float,
        clock: Callable[[], float],
    ) -> None:
        """``name``: of the rank. ``process_fd``: its pidfd. Both descriptors must outlive this.

        ``patience_s``: for the process to die; the registry has dropped it already.
        """
        self.socket: int | None = process_fd
        """For the poller, until the process is dead."""
        self._name = name
        self._ledger_fd = ledger_fd
        self._give_up_s = clock() + patience_s
        self._clock = clock
        self._leases = LeaseTable(clock)
        self._request_ids: list[str] = []
        self._gives_way = False
        self._questions: list[ToHolder] = []

    @property
    def over(self) -> bool:
        """Nothing can be read any more: no lease is left, or the process does not die."""
        if self.socket is not None:
            return self._clock() >= self._give_up_s
        self._leases.expire()
        return not (len(self._leases) or self._questions)

    def give_way(self) -> None:
        """The memory is wanted: no pull begins any more, those that have begun go on."""
        self._gives_way = True
        for request_id in self._request_ids:
            self._leases.cancel(request_id)

    def next_deadline_s(self) -> float:
        """Clock time at which it has an answer, or may be over."""
        if self.socket is not None:
            return self._give_up_s
        if self._questions:
            return self._clock()
        return self._leases.next_deadline_s() or float("inf")

    def send(self, message: ToHolder) -> None:
        """Ask; the answer waits for ``receive``."""
        self._questions.append(message)

    def receive(self) -> list[ToPuller]:
        """Answers to what was asked since the last call; none before the process is dead."""
        if self.socket is not None and not self._open():
            return []
        questions, self._questions = self._questions, []
        return [self._answer(question) for question in questions]

    def close(self) -> None:
        """Nothing is held here."""

    def _open(self) -> bool:
        """Read the ledger, once nobody can write to it. False: not yet."""
        assert self.socket is not None
        if not has_ended(self.socket):
            return False
        self.socket = None
        for record in read_ledger(self._ledger_fd):
            self._leases.grant(record.grant, record.groups)
            self._leases.set_readers(record.grant.request_id, record.num_readers)
            self._request_ids.append(record.grant.request_id)
        if self._gives_way:
            self.give_way()
        logger.info("%s has died; %d leases of it can still be read", self._name, len(self._leases))
        return True

    def _answer(self, message: ToHolder) -> ToPuller:
        try:
            match message:
                case PullBegin():
                    return self._reply(message.call_id, self._lease_of(message))
                case Heartbeat():
                    return HeartbeatReply(
                        call_id=message.call_id,
                        lease_s=self._leases.remaining_s(self._lease_of(message)),
                    )
                case PullEnd():
                    return PullEndReply(call_id=message.call_id, held=self._end(message))
                case StateChecksums():
                    return ChecksumsReply(
                        call_id=message.call_id,
                        groups=[group.checksums for group in self._lease_of(message).groups],
                    )
                case Handshake() | Push():
                    return self._refuse(message.call_id, "only its memory is left")
        except LeaseError as error:
            return self._refuse(message.call_id, str(error))

    def _refuse(self, call_id: int, reason: str) -> Refused:
        return Refused(call_id=call_id, reason=f"{self._name} has died; {reason}")

    def _lease_of(self, message: PullBegin | StateChecksums | Heartbeat | PullEnd) -> Lease:
        """A pull that began with the living goes on as if it had begun here: a lease in the ledger
        has held until now.

        Raises LeaseError.
        """
        lease = self._leases.find(message.request_id)
        if lease is None or message.reader not in lease.open_readers:
            return self._leases.begin(message.request_id, message.reader, num_pullers=1)
        self._leases.heartbeat(message.request_id, message.reader)
        return lease

    def _end(self, message: PullEnd) -> bool:
        try:
            self._lease_of(message)
        except LeaseError:
            return False
        return self._leases.end(message.request_id, message.reader)

    def _reply(self, call_id: int, lease: Lease) -> PullReply:
        return PullReply(
            call_id=call_id,
            num_tokens=lease.grant.num_tokens,
            block_hashes=lease.grant.block_hashes,
            groups=lease.groups,
            lease_s=self._leases.remaining_s(lease),
            first_tokens=lease.grant.first_tokens,
        )


def has_ended(process_fd: int) -> bool:
    """The process of a pidfd is dead, to its last thread; one that is stopped or slow is not."""
    poller = select.poll()
    poller.register(process_fd, select.POLLIN)
    return bool(poller.poll(0))
