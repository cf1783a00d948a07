"""Keeps the blocks of finished requests for their readers, each request's under a lease with a
deadline, and answers what decode ranks ask about them.

::

    grant ──> waiting ── begin(reader) ──> pulling ── last reader ends ──> ended: pulled
                 │                            │
                 ├── cancel: ended: released  ├── cancel, then end: ended: released
                 └── deadline: ended: expired └── deadline: ended: expired

While a pull is open only the deadline ends its lease: readers rely on the seconds that they were
told. Deadlines never leave this process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import msgspec
import numpy as np

from pdlaunch.errors import LeaseError, TransferError
from pdlaunch.protocol.ids import LeaseId, ReaderId
from pdlaunch.protocol.side_channel import (
    ChecksumsReply,
    GroupBlocks,
    Handshake,
    HandshakeReply,
    HeartbeatReply,
    PullBegin,
    PullEnd,
    PullEndReply,
    PullHeartbeat,
    PullReply,
    Push,
    PushEnded,
    Refused,
    StateChecksums,
    ToDecodeSide,
    ToPrefillSide,
)
from pdlaunch.protocol.transfer import (
    EndLease,
    GrantLease,
    LeaseEnded,
    PrefillCommand,
)
from pdlaunch.transfer.connectors.connector import Connector, PushJob
from pdlaunch.transfer.integrity.checksum import Checksums, KVHasher

logger = logging.getLogger(__name__)

EndReason = Literal["pulled", "released", "expired"]

# Other users of ``lease_s``: heartbeats, four in that time (``pull``); PD107, because pulls must
# end sooner; engines of vLLM, in whole seconds; routers, which hand blocks of such engines over
# within half of it. Sleep waits for the last.
MAX_EXTENSIONS = 20
"""A lease lives at most this many times ``lease_s``, however often it is extended: heartbeats of a
reader that never ends must not hold blocks for good.
"""
MAX_OPEN_READERS = 4096  # pulls of one lease that may be open at once
MAX_PAST_LEASES = 4096  # ended leases whose ids are still known
GRANT_LAG_S = 2.0
"""A rank hears of a lease at most this long after its readers do. Questions that come later, or
about a lease that never was, are refused.
"""
MAX_WAITING = 4096  # questions that may wait; further ones are answered at once


@dataclass(slots=True)
class Lease:
    """Keeps one finished request's blocks on this rank."""

    grant: GrantLease
    groups: list[GroupBlocks]
    granted_at: float
    deadline_at: float
    num_readers: int
    """Choices that will pull; fewer than granted when some have ended with their first token."""
    checksums: Checksums | None = None
    """Checksums of the blocks of all groups, one group after another, while they are computed."""
    open_readers: dict[ReaderId, int] = field(default_factory=dict)
    """Pulls that have begun and not ended, with their number of decode ranks."""
    served_readers: set[ReaderId] = field(default_factory=set)  # pulls that have ended
    served: Fraction = Fraction(0)
    """Readers that have ended; one of the k decode ranks of a reader counts 1/k."""
    cancelled: bool = False

    def state_checksums(self) -> None:
        """Tell readers the checksums, which must be ready."""
        assert self.checksums is not None
        ends = np.cumsum([len(group.block_ids) for group in self.groups])
        parts = np.split(self.checksums.result().astype("<u8"), ends[:-1])
        self.groups = [
            msgspec.structs.replace(group, checksums=part.tobytes())
            for group, part in zip(self.groups, parts, strict=True)
        ]


class LeaseTable:
    """Keeps the living leases of one rank."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._leases: dict[LeaseId, Lease] = {}
        self._past: dict[LeaseId, None] = {}
        """Ids of the latest leases that have ended, the oldest first."""
        self._ended: list[tuple[LeaseId, EndReason]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, grant: GrantLease) -> Lease:
        """Take over the blocks of a finished request. Raises LeaseError if its id still has a
        lease.
        """
        if grant.lease_id in self._leases:
            raise LeaseError(f"request {grant.lease_id} has a lease already")
        logger.debug("lease of %s begins, for %g s", grant.lease_id, grant.lease_s)
        self._past.pop(grant.lease_id, None)
        groups = [
            GroupBlocks(first_block_index=first, block_ids=block_ids, checksums=None)
            for first, block_ids in zip(grant.first_block_index, grant.block_ids, strict=True)
        ]
        now = self._clock()
        lease = Lease(grant, groups, now, now + grant.lease_s, grant.num_readers)
        self._leases[grant.lease_id] = lease
        return lease

    def knows(self, lease_id: LeaseId) -> bool:
        """Return whether the lease exists, or ended recently."""
        return lease_id in self._leases or lease_id in self._past

    def living(self, lease_id: LeaseId) -> Lease:
        """Return a lease that still holds. Raises LeaseError."""
        self.expire()
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseError(
                f"request {lease_id} has no lease here: it has expired, ended or never was"
            )
        return lease

    def begin(self, lease_id: LeaseId, reader: ReaderId, num_decode_ranks: int) -> Lease:
        """Begin a pull, or repeat its beginning, which extends the lease. Raises LeaseError, also
        once the pull has ended.
        """
        lease = self.living(lease_id)
        if num_decode_ranks < 1:
            raise LeaseError(f"num_decode_ranks is {num_decode_ranks}, it must be at least 1")
        if lease.cancelled:
            raise LeaseError(f"request {lease_id} was cancelled")
        # A repeated question that arrives late must not open the pull again.
        if reader in lease.served_readers:
            raise LeaseError(f"reader {reader} has ended its pull of request {lease_id}")
        if len(lease.open_readers) >= MAX_OPEN_READERS:
            raise LeaseError(f"request {lease_id} has {MAX_OPEN_READERS} open pulls")
        lease.open_readers[reader] = num_decode_ranks
        self._extend(lease)
        return lease

    def opened(self, lease_id: LeaseId, reader: ReaderId) -> Lease:
        """Return the lease of a pull that has begun and not ended. Raises LeaseError."""
        lease = self.living(lease_id)
        if reader not in lease.open_readers:
            raise LeaseError(f"reader {reader} has no open pull of request {lease_id}")
        return lease

    def heartbeat(self, lease_id: LeaseId, reader: ReaderId) -> float:
        """Extend the lease of a pull that is pending, and return the remaining seconds. Raises
        LeaseError.
        """
        lease = self.opened(lease_id, reader)
        self._extend(lease)
        return self.remaining_s(lease)

    def end(self, lease_id: LeaseId, reader: ReaderId) -> bool:
        """End a pull, and return whether the lease has held since its begin."""
        # First: a lease past its deadline has not held.
        self.expire()
        lease = self._leases.get(lease_id)
        num_decode_ranks = lease.open_readers.pop(reader, None) if lease is not None else None
        if lease is None or num_decode_ranks is None:
            return False
        lease.served_readers.add(reader)
        # Fractions, because thirds must add up to exactly one.
        lease.served += Fraction(1, num_decode_ranks)
        self._end_if_done(lease)
        return True

    def cancel(self, lease_id: LeaseId) -> None:
        """End a lease that nobody needs any more, now or with its last open pull. Unknown ids are
        ignored.
        """
        if (lease := self._leases.get(lease_id)) is not None:
            lease.cancelled = True
            self._end_if_done(lease)

    def expire(self) -> None:
        """End the leases whose deadline has passed."""
        now = self._clock()
        for lease in [lease for lease in self._leases.values() if lease.deadline_at <= now]:
            self._end(lease, "expired")

    def take_ended(self) -> list[tuple[LeaseId, EndReason]]:
        """Return the leases that have ended since the last call: their blocks belong to the engine
        again.
        """
        ended, self._ended = self._ended, []
        return ended

    def remaining_s(self, lease: Lease) -> float:
        return max(0.0, lease.deadline_at - self._clock())

    def next_deadline_at(self) -> float | None:
        """Return when ``expire`` has something to do; None without leases."""
        return min((lease.deadline_at for lease in self._leases.values()), default=None)

    def _extend(self, lease: Lease) -> None:
        lease_s = lease.grant.lease_s
        last_at = lease.granted_at + MAX_EXTENSIONS * lease_s
        # Never shortened: readers rely on the seconds that they were told.
        lease.deadline_at = max(lease.deadline_at, min(self._clock() + lease_s, last_at))

    def _end_if_done(self, lease: Lease) -> None:
        """End a lease with no reader left to come, unless a pull is open.

        More pulls may be open than readers were granted: a prompt whose decode engine failed is
        pulled by another one, while the first still reads.
        """
        if lease.open_readers:
            return
        if lease.served >= lease.num_readers:
            self._end(lease, "pulled")
        elif lease.cancelled:
            self._end(lease, "released")

    def _end(self, lease: Lease, reason: EndReason) -> None:
        logger.debug("lease of %s has ended: %s", lease.grant.lease_id, reason)
        del self._leases[lease.grant.lease_id]
        # Questions about it are refused at once, and do not wait for a grant.
        self._past[lease.grant.lease_id] = None
        if len(self._past) > MAX_PAST_LEASES:
            del self._past[next(iter(self._past))]
        self._ended.append((lease.grant.lease_id, reason))


@dataclass(frozen=True, slots=True)
class _AskedWrite:
    identity: bytes  # names the socket of the decode rank that asked
    call_id: int
    write: Future[None]
    started_at: float


class PrefillSide:
    """Serves the leases of one rank to decode ranks. The transfer thread owns it.

    Every question gets one answer; invalid questions are refused and change nothing.
    """

    def __init__(
        self,
        card: HandshakeReply,
        hasher: KVHasher | None,
        send: Callable[[bytes, ToDecodeSide], None],
        clock: Callable[[], float],
        pusher: Connector | None = None,
    ) -> None:
        """``card`` says what this rank is; ``hasher`` is None when ``kv_transfer.verify`` is off;
        ``send`` gets the identity of the socket that asked; ``pusher`` is a connector that
        ``pushes``.
        """
        self.leases = LeaseTable(clock)
        self.known_ranks: set[tuple[str, int]] = set()
        """Name and incarnation of every decode rank that has shaken hands."""
        self._card = card
        self._hasher = hasher
        self._send = send
        self._clock = clock
        self._pusher = pusher
        self._hashing: list[Lease] = []
        """Leases whose checksums are not stated yet."""
        self._waiting: list[tuple[bytes, ToPrefillSide, float]] = []
        """Questions that cannot be answered yet, with the socket that asked and a deadline."""
        self._writes: list[_AskedWrite] = []

    def execute(self, command: PrefillCommand) -> None:
        match command:
            case GrantLease():
                # The scheduler refuses a request whose id still has a lease. Nothing writes to the
                # blocks any more: whoever grants knows a token that all ranks computed from them.
                lease = self.leases.grant(command)
                if self._hasher is not None:
                    self._hashing.append(lease)
            case EndLease():
                self.leases.cancel(command.lease_id)

    def turn(self, received: Iterable[tuple[bytes, ToPrefillSide]]) -> list[LeaseEnded]:
        """Answer what can be answered, have checksums computed, and return the leases that have
        ended. The engine frees their blocks, and no answer promises these any more.
        """
        self._answer_all(received)
        # Decode ranks were answered first: they read while the checksums are computed.
        if self.advance_checksums():
            self._answer_all(())
        self.leases.expire()
        return [
            LeaseEnded(lease_id=lease_id, reason=reason)
            for lease_id, reason in self.leases.take_ended()
        ]

    @property
    def is_idle(self) -> bool:
        """Return whether there is no lease, and nothing is written to a decode rank."""
        return not self.leases and not self._writes

    @property
    def polling_since_at(self) -> float | None:
        """Return the instant at which the latest of the unfinished writes and checksums began."""
        since = [write.started_at for write in self._writes]
        return max([*since, *(lease.granted_at for lease in self._hashing)], default=None)

    def next_deadline_at(self) -> float | None:
        """Return when ``turn`` has something to do, messages aside."""
        due_at = [deadline_at for _, _, deadline_at in self._waiting]
        if (next_at := self.leases.next_deadline_at()) is not None:
            due_at.append(next_at)
        return min(due_at, default=None)

    def advance_checksums(self) -> bool:
        """Begin to compute the checksums of new leases, and state those that are there.

        Returns whether any have come: questions may have waited for them.
        """
        unfinished = []
        for lease in self._hashing:
            if lease.checksums is None:
                assert self._hasher is not None
                block_ids = [block_id for group in lease.groups for block_id in group.block_ids]
                lease.checksums = self._hasher.start(block_ids, slice(None))
            if lease.checksums.ready():
                lease.state_checksums()
            else:
                unfinished.append(lease)
        has_news = len(unfinished) < len(self._hashing)
        self._hashing = unfinished
        return has_news

    def answer(self, message: ToPrefillSide) -> ToDecodeSide:
        asked = message.expected_engine_id if isinstance(message, Handshake) else message.engine_id
        name, engine_id = self._card.rank_name, self._card.engine_id
        # Another engine may have had this port before, or be a restart of the one that is meant.
        if asked != engine_id:
            reason = f"{name} belongs to engine_id {engine_id}, not to {asked}"
            return Refused(call_id=message.call_id, reason=reason)
        try:
            return self._answer(message)
        except LeaseError as error:
            return Refused(call_id=message.call_id, reason=f"{name}: {error}")

    def _answer_all(self, received: Iterable[tuple[bytes, ToPrefillSide]]) -> None:
        now = self._clock()
        # In order: the end of a pull must not overtake its beginning.
        questions = self._waiting
        questions += [(identity, message, now + GRANT_LAG_S) for identity, message in received]
        self._waiting = []
        for identity, message, deadline_at in questions:
            may_wait = now < deadline_at and len(self._waiting) < MAX_WAITING
            if may_wait and self._must_wait(message):
                self._waiting.append((identity, message, deadline_at))
            elif isinstance(message, Push) and message.engine_id == self._card.engine_id:
                self._write(identity, message)
            else:
                self._send(identity, self.answer(message))
        self._end_writes()

    def _must_wait(self, message: ToPrefillSide) -> bool:
        """Return whether a question asks about a lease of this engine that this rank has never
        heard of, or for checksums that are being computed.

        Rank 0 of a TP group lets the answer of a prefill go when it has sent the grants to the
        other ranks, so that a decode rank may ask one of them before its grant is there.
        """
        if isinstance(message, Handshake | Push) or message.engine_id != self._card.engine_id:
            return False
        if not self.leases.knows(message.lease_id):
            return True
        return isinstance(message, StateChecksums) and self._is_hashing(message.lease_id)

    def _is_hashing(self, lease_id: LeaseId) -> bool:
        return any(lease.grant.lease_id == lease_id for lease in self._hashing)

    def _answer(self, message: ToPrefillSide) -> ToDecodeSide:
        call_id = message.call_id
        match message:
            case Handshake():
                logger.info(
                    "handshake with %s, incarnation %d", message.rank_name, message.incarnation
                )
                # Whether it fits or not: nobody waits for a rank that has come and cannot be
                # served.
                self.known_ranks.add((message.rank_name, message.incarnation))
                return msgspec.structs.replace(self._card, call_id=call_id)
            case PullBegin():
                lease = self.leases.begin(
                    message.lease_id, message.reader, message.num_decode_ranks
                )
                return PullReply(
                    call_id=call_id,
                    num_tokens=lease.grant.num_tokens,
                    block_hashes=lease.grant.block_hashes,
                    groups=lease.groups,
                    lease_s=self.leases.remaining_s(lease),
                )
            case PullHeartbeat():
                lease_s = self.leases.heartbeat(message.lease_id, message.reader)
                return HeartbeatReply(call_id=call_id, lease_s=lease_s)
            case PullEnd():
                held = self.leases.end(message.lease_id, message.reader)
                return PullEndReply(call_id=call_id, held=held)
            case StateChecksums():
                lease = self.leases.opened(message.lease_id, message.reader)
                # The time to wait may be over: look once more before refusing.
                self.advance_checksums()
                if self._is_hashing(message.lease_id):
                    raise LeaseError(
                        f"the checksums of request {message.lease_id} are not there yet"
                    )
                return ChecksumsReply(
                    call_id=call_id, groups=[group.checksums for group in lease.groups]
                )
            case Push():
                raise LeaseError("the connector here does not write to its readers")

    def _write(self, identity: bytes, message: Push) -> None:
        """Begin to write to a reader, or refuse. A write cannot be taken back: the reader owns the
        destination until it has the answer.
        """
        try:
            if self._pusher is None:
                raise LeaseError("the connector here does not write to its readers")
            write = self._pusher.push(self._job_of(message))
        except (LeaseError, TransferError) as error:
            reason = f"{self._card.rank_name}: {error}"
            self._send(identity, Refused(call_id=message.call_id, reason=reason))
            return
        self._writes.append(_AskedWrite(identity, message.call_id, write, self._clock()))

    def _job_of(self, message: Push) -> PushJob:
        """Return the write that a reader asks for. Raises LeaseError if it may not have these
        blocks.
        """
        heads = range(message.first_head, message.first_head + message.num_heads)
        # Whoever writes to a peer's memory decides what the peer may see. The scratch, which is
        # meant when there are no blocks, holds nobody's prompt.
        if message.block_ids:
            lease = self.leases.opened(message.lease_id, message.reader)
            leased = {block_id for group in lease.groups for block_id in group.block_ids}
            if not leased.issuperset(message.block_ids):
                raise LeaseError(f"request {message.lease_id} has no lease for all of these blocks")
            if not 0 <= heads.start < heads.stop <= self._card.geometry.num_kv_heads:
                raise LeaseError(f"there are no {message.num_heads} heads from {heads.start} on")
        return PushJob(message.target, message.block_ids, heads)

    def _end_writes(self) -> None:
        pending = []
        for asked in self._writes:
            if not asked.write.done():
                pending.append(asked)
                continue
            failure = asked.write.exception()
            error = "" if failure is None else f"{self._card.agent_name}: {failure}"
            if error:
                logger.warning("a write to a reader failed: %s", error)
            ended = PushEnded(call_id=asked.call_id, ok=not error, error=error)
            self._send(asked.identity, ended)
        self._writes = pending
