"""Takes the questions of decode ranks to this rank, and answers them or makes them wait.

A connector that pushes has the prefill side write what a decode rank asks for. A write that has
begun cannot be taken back: whoever asked owns the destination until the answer is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from pdlaunch.errors import LeaseError, TransferError
from pdlaunch.protocol.side_channel import Push, PushEnded, Refused, ToDecodeSide
from pdlaunch.protocol.transfer import (
    EndLease,
    GrantLease,
    LeaseEnded,
    PrefillCommand,
    SetLeaseReaders,
)
from pdlaunch.transfer.channel.side_channel import PrefillSocket
from pdlaunch.transfer.connectors.connector import Connector, Pusher, Write
from pdlaunch.transfer.instants import earliest, latest
from pdlaunch.transfer.integrity.checksum import KVHasher
from pdlaunch.transfer.prefill_side.answers import LeaseAnswers, RankCard
from pdlaunch.transfer.prefill_side.pending_questions import PendingQuestions

logger = logging.getLogger(__name__)


class PrefillSide:
    """Serves the leases of one rank to decode ranks. The transfer thread owns it."""

    def __init__(
        self,
        card: RankCard,
        socket: PrefillSocket,
        connector: Connector,
        hasher: KVHasher | None,
        clock: Callable[[], float],
    ) -> None:
        """``hasher`` is None when ``kv_transfer.verify`` is off. The socket stays the caller's."""
        self._socket = socket
        self._pusher = connector.pusher
        self._answers = LeaseAnswers(card, hasher, clock)
        self._pending = PendingQuestions(self._answers.must_wait, clock)
        self._writes = Writes(self._answers, clock)

    def execute(self, command: PrefillCommand) -> None:
        """Take a command of the scheduler."""
        match command:
            case GrantLease():
                self._answers.grant(command)
            case EndLease():
                self._answers.end(command)
            case SetLeaseReaders():
                self._answers.set_readers(command)

    def turn(self) -> list[LeaseEnded]:
        """Answer what can be answered, have checksums computed, and return the leases that have
        ended.
        """
        self._answer()
        # Decode ranks were answered first: they read while the checksums are computed.
        if self._answers.advance_checksums():
            self._answer()
        return self._answers.take_ended()

    @property
    def known_ranks(self) -> frozenset[tuple[str, int]]:
        """Return name and incarnation of every decode rank that has shaken hands."""
        return self._answers.known_ranks

    @property
    def is_idle(self) -> bool:
        """Return whether there is no lease, and nothing is written to a decode rank."""
        return not self._answers.num_leases and self._writes.latest_at is None

    @property
    def polling_since_at(self) -> float | None:
        """Return the instant at which the latest of the unfinished writes and checksums began."""
        return latest((self._writes.latest_at, self._answers.hashing_since_at))

    def next_deadline_at(self) -> float | None:
        """Return when ``turn`` has something to do, messages aside."""
        return earliest((self._pending.next_deadline_at(), self._answers.next_deadline_at()))

    def _answer(self) -> None:
        for identity, message in self._pending.sift(self._socket.receive()):
            if isinstance(message, Push) and self._pusher is not None:
                self._writes.start(self._pusher, identity, message)
            else:
                self._socket.send(identity, self._answers.answer(message))
        for identity, ended in self._writes.take_answers():
            self._socket.send(identity, ended)


@dataclass(frozen=True, slots=True)
class _Write:
    identity: bytes
    """Names the socket of the decode rank that asked."""
    call_id: int
    write: Write
    started_at: float


class Writes:
    """Executes the writes that decode ranks ask for; every ``Push`` gets one answer."""

    def __init__(self, answers: LeaseAnswers, clock: Callable[[], float]) -> None:
        self._answers = answers
        self._clock = clock
        self._writes: list[_Write] = []
        self._refused: list[tuple[bytes, ToDecodeSide]] = []

    @property
    def latest_at(self) -> float | None:
        """Return the instant at which the latest of the unfinished writes began."""
        return max((write.started_at for write in self._writes), default=None)

    def start(self, pusher: Pusher, identity: bytes, message: Push) -> None:
        """Begin to write, or refuse. ``identity`` names the socket to answer."""
        try:
            write = pusher.push(self._answers.job_of(message))
        except (LeaseError, TransferError) as error:
            self._refused.append((identity, Refused(call_id=message.call_id, reason=str(error))))
            return
        self._writes.append(_Write(identity, message.call_id, write, self._clock()))

    def take_answers(self) -> list[tuple[bytes, ToDecodeSide]]:
        """Return what was refused or has ended since the last call; never waits."""
        answers, self._refused = self._refused, []
        pending = []
        for asked in self._writes:
            error = asked.write.poll()
            if error is None:
                pending.append(asked)
                continue
            if error:
                logger.warning("a write to a reader failed: %s", error)
            answers.append(
                (asked.identity, PushEnded(call_id=asked.call_id, ok=not error, error=error))
            )
        self._writes = pending
        return answers
