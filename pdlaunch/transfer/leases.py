"""Keeps the blocks of each finished prompt for decode ranks, under a lease with a deadline, and
answers the messages of decode ranks on the side channel.

::

    grant ──> waiting ── begin(reader) ──> pulling ── last reader ends ──> ended: pulled
                 │                            │
                 ├── cancel: ended: released  ├── cancel, then end: ended: released
                 └── deadline: ended: expired └── deadline: ended: expired

While a pull is open, only the deadline ends its lease, because readers rely on the remaining
seconds in the answers. Answers never contain the deadline itself.
"""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from fractions import Fraction

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
    PullHeartbeat,
    PullReply,
    Push,
    PushEnded,
    Refused,
    StateChecksums,
    ToDecodeSide,
    ToPrefillSide,
)
from pdlaunch.protocol.transfer import EndLease, GrantLease, LeaseEnd, LeaseEnded, PrefillCommand
from pdlaunch.transfer.connectors.connector import Connector
from pdlaunch.transfer.integrity.checksum import Checksums, KVHasher

logger = logging.getLogger(__name__)

# Other users of ``lease_s``: pulls send four heartbeats in that time (``pull``); rule PD107 checks
# that pulls time out sooner; engines of vLLM get it in whole seconds; routers hand over blocks of
# such engines within half of it. An engine sleeps only after its last lease has ended.
# Extensions end at this many times ``lease_s``, because a reader that never ends its pull must not
# hold the blocks for good.
MAX_EXTENSIONS = 20
MAX_OPEN_READERS = 4096  # pulls of one lease that may be open at once
MAX_PAST_LEASES = 4096  # ended leases whose reasons are still kept
# A message about an unknown lease waits this long for the lease's grant to arrive. Then it is
# refused.
GRANT_LAG_S = 2.0
MAX_WAITING = 4096  # messages that may wait; further messages are answered at once


@dataclass(slots=True, eq=False)
class Lease:
    grant: GrantLease
    deadline_at: float
    last_at: float  # latest deadline that extensions may reach
    # Checksums of the blocks of all groups, one group after another; None until they are started.
    checksums: Checksums | None = None
    # Pulls that have begun and not ended, each with the number of decode ranks that pull here.
    open_readers: dict[ReaderId, int] = field(default_factory=dict)
    served_readers: set[ReaderId] = field(default_factory=set)  # pulls that have ended
    # Decode engines whose pulls have ended. If k ranks of an engine pull here, each counts 1/k:
    # fractions, because three thirds must add up to exactly one.
    served: Fraction = Fraction(0)
    cancelled: bool = False

    @property
    def is_hashed(self) -> bool:
        return self.checksums is not None and self.checksums.ready()

    def stated_checksums(self) -> list[bytes]:
        """Return each group's checksums as little-endian uint64 bytes. They must be ready."""
        assert self.checksums is not None
        ends = np.cumsum([len(group) for group in self.grant.block_ids])
        by_group = np.split(self.checksums.result().astype("<u8"), ends[:-1])
        return [group.tobytes() for group in by_group]


class LeaseTable:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._leases: dict[LeaseId, Lease] = {}
        # Why the latest leases have ended, the oldest first.
        self._past: dict[LeaseId, LeaseEnd] = {}
        self._ended: list[LeaseEnded] = []

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, grant: GrantLease) -> Lease:
        lease_id, lease_s, now = grant.lease_id, grant.lease_s, self._clock()
        if lease_id in self._leases:
            raise LeaseError(f"request {lease_id} has a lease already")
        logger.debug("lease of %s begins, for %g s", lease_id, lease_s)
        self._past.pop(lease_id, None)
        lease = Lease(grant, now + lease_s, now + MAX_EXTENSIONS * lease_s)
        self._leases[lease_id] = lease
        return lease

    def get(self, lease_id: LeaseId) -> Lease | None:
        return self._leases.get(lease_id)

    def how_ended(self, lease_id: LeaseId) -> LeaseEnd | None:
        """Return why the lease ended; None if it has not ended, or its reason is dropped."""
        return self._past.get(lease_id)

    def living(self, lease_id: LeaseId) -> Lease:
        self.expire()
        if (lease := self._leases.get(lease_id)) is None:
            end = self.how_ended(lease_id) or "never granted, or ended long ago"
            raise LeaseError(f"request {lease_id} has no lease here: {end}")
        return lease

    def begin(self, lease_id: LeaseId, reader: ReaderId, num_decode_ranks: int) -> Lease:
        """Open a pull, if it is not open, and extend the lease. Raises LeaseError after its end."""
        lease = self.living(lease_id)
        if num_decode_ranks < 1:
            raise LeaseError(f"num_decode_ranks is {num_decode_ranks}, it must be at least 1")
        if lease.cancelled:
            raise LeaseError(f"request {lease_id} was cancelled")
        # A repeated PullBegin that arrives after PullEnd must not open the pull again.
        if reader in lease.served_readers:
            raise LeaseError(f"reader {reader} has ended its pull of request {lease_id}")
        if len(lease.open_readers) >= MAX_OPEN_READERS:
            raise LeaseError(f"request {lease_id} has {MAX_OPEN_READERS} open pulls")
        lease.open_readers[reader] = num_decode_ranks
        self._extend(lease)
        return lease

    def opened(self, lease_id: LeaseId, reader: ReaderId) -> Lease:
        lease = self.living(lease_id)
        if reader not in lease.open_readers:
            raise LeaseError(f"reader {reader} has no open pull of request {lease_id}")
        return lease

    def heartbeat(self, lease_id: LeaseId, reader: ReaderId) -> float:
        lease = self.opened(lease_id, reader)
        self._extend(lease)
        return self.remaining_s(lease)

    def end(self, lease_id: LeaseId, reader: ReaderId) -> None:
        lease = self.opened(lease_id, reader)
        lease.served += Fraction(1, lease.open_readers.pop(reader))
        lease.served_readers.add(reader)
        self._end_if_done(lease)

    def cancel(self, lease_id: LeaseId) -> None:
        if (lease := self._leases.get(lease_id)) is not None:
            lease.cancelled = True
            self._end_if_done(lease)

    def expire(self) -> None:
        now = self._clock()
        for lease in [lease for lease in self._leases.values() if lease.deadline_at <= now]:
            self._end(lease, "expired")

    def take_ended(self) -> list[LeaseEnded]:
        """Return the leases that have ended since the last call. Their blocks are free."""
        ended, self._ended = self._ended, []
        return ended

    def remaining_s(self, lease: Lease) -> float:
        return max(0.0, lease.deadline_at - self._clock())

    def deadlines(self) -> list[float]:
        return [lease.deadline_at for lease in self._leases.values()]

    def _extend(self, lease: Lease) -> None:
        extended_at = min(self._clock() + lease.grant.lease_s, lease.last_at)
        # A deadline never becomes earlier: readers rely on the remaining seconds they were told.
        lease.deadline_at = max(lease.deadline_at, extended_at)

    def _end_if_done(self, lease: Lease) -> None:
        # More pulls than ``num_readers`` may be open: after a failure of the decode engine, another
        # engine pulls the prompt while the first may still read.
        if lease.open_readers:
            return
        if lease.served >= lease.grant.num_readers:
            self._end(lease, "pulled")
        elif lease.cancelled:
            self._end(lease, "released")

    def _end(self, lease: Lease, reason: LeaseEnd) -> None:
        lease_id = lease.grant.lease_id
        logger.debug("lease of %s has ended: %s", lease_id, reason)
        del self._leases[lease_id]
        # Later messages about this lease are refused at once and do not wait for a grant.
        self._past[lease_id] = reason
        if len(self._past) > MAX_PAST_LEASES:
            del self._past[next(iter(self._past))]
        self._ended.append(LeaseEnded(lease_id=lease_id, reason=reason))


@dataclass(frozen=True, slots=True)
class _Question:
    identity: bytes  # ZMQ identity of the decode rank's socket
    message: ToPrefillSide
    asked_at: float


@dataclass(eq=False)
class PrefillSide:
    """Answers decode ranks about the leases of one rank. Only the transfer thread uses it. Each
    message except PullEnd gets one answer. Invalid messages are refused and change nothing.
    """

    card: HandshakeReply  # the answer to handshakes, without its call_id
    hasher: KVHasher | None  # None without ``verify``
    connector: Connector
    send: Callable[[bytes, ToDecodeSide], None]  # takes the ZMQ identity of the receiver first
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.leases = LeaseTable(self.clock)
        # Name and incarnation of each decode rank that has sent a handshake.
        self.known_ranks: set[tuple[str, int]] = set()
        self._unhashed: list[Lease] = []  # new leases whose checksums are not started yet
        self._waiting: list[_Question] = []  # messages that cannot be answered yet
        self._writes: list[tuple[_Question, Future[None]]] = []

    def execute(self, command: PrefillCommand) -> None:
        match command:
            case GrantLease():
                # No kernel writes to the blocks any more: the first token, computed from them, is
                # known.
                self._unhashed.append(self.leases.grant(command))
            case EndLease():
                self.leases.cancel(command.lease_id)

    def turn(self, received: Iterable[tuple[bytes, ToPrefillSide]]) -> list[LeaseEnded]:
        """Answer messages, start the checksums of new leases, and return the leases that have
        ended. The engine frees their blocks; later messages about these leases are refused.
        """
        now = self.clock()
        self._answer_all([_Question(*question, now) for question in received])
        # After the first answers, so that decode ranks read while the checksums are computed.
        if self._unhashed:
            self.hash_leases()
            self._answer_all([])
        self._end_writes()
        self.leases.expire()
        return self.leases.take_ended()

    @property
    def is_idle(self) -> bool:
        """Return True if there is no lease and no write to a decode rank."""
        return not self.leases and not self._writes

    def polling_since(self) -> list[float]:
        """Return when the messages arrived that wait for a grant, for checksums or for a write."""
        questions = [*self._waiting, *(question for question, _ in self._writes)]
        return [question.asked_at for question in questions]

    def hash_leases(self) -> None:
        for lease in self._unhashed:
            if self.hasher is not None:
                lease.checksums = self.hasher.start(lease.grant.block_ids, slice(None))
        self._unhashed.clear()

    def _answer_all(self, received: list[_Question]) -> None:
        now = self.clock()
        # In order of arrival: a PullEnd must not overtake its PullBegin.
        questions, self._waiting = [*self._waiting, *received], []
        for question in questions:
            message = question.message
            may_wait = now < question.asked_at + GRANT_LAG_S and len(self._waiting) < MAX_WAITING
            if may_wait and self._must_wait(message):
                self._waiting.append(question)
                continue
            try:
                reply = self._answer(question, message)
            except (LeaseError, TransferError) as error:
                reason = f"{self.card.rank_name}: {error}"
                end = None
                if not isinstance(message, Handshake):
                    end = self.leases.how_ended(message.lease_id)
                reply = Refused(call_id=message.call_id, reason=reason, lease_end=end)
            if reply is not None:
                self.send(question.identity, reply)

    def _must_wait(self, message: ToPrefillSide) -> bool:
        """Return True if a message is about an unknown lease of this engine, or asks for checksums
        that are not computed. A grant may be late: rank 0 sends the prefill's answer once it has
        sent the grants, so a decode rank may ask another rank before that rank has its grant.
        """
        if isinstance(message, Handshake | Push) or message.engine_id != self.card.engine_id:
            return False
        if (lease := self.leases.get(message.lease_id)) is None:
            return self.leases.how_ended(message.lease_id) is None
        return isinstance(message, StateChecksums) and not lease.is_hashed

    def _answer(self, question: _Question, message: ToPrefillSide) -> ToDecodeSide | None:
        """Return the answer, or None: PullEnd has no answer, and a Push is answered at its end.
        Raises LeaseError, TransferError.
        """
        own, asked = self.card.engine_id, message.engine_id
        if asked != own:
            raise LeaseError(f"this rank belongs to engine_id {own}, not {asked}")
        call_id = message.call_id
        match message:
            case Handshake():
                logger.info(
                    "handshake with %s, incarnation %d", message.rank_name, message.incarnation
                )
                # Also if the decode rank is incompatible: ``is_connected_to`` must not wait for it.
                self.known_ranks.add((message.rank_name, message.incarnation))
                return msgspec.structs.replace(self.card, call_id=call_id)
            case PullBegin():
                lease = self.leases.begin(
                    message.lease_id, message.reader, message.num_decode_ranks
                )
                grant = lease.grant
                return PullReply(
                    call_id=call_id,
                    num_tokens=grant.num_tokens,
                    block_hashes=grant.block_hashes,
                    groups=[
                        GroupBlocks(first_block_index=first, block_ids=block_ids)
                        for first, block_ids in zip(
                            grant.first_block_index, grant.block_ids, strict=True
                        )
                    ],
                    lease_s=self.leases.remaining_s(lease),
                )
            case PullHeartbeat():
                lease_s = self.leases.heartbeat(message.lease_id, message.reader)
                return HeartbeatReply(call_id=call_id, lease_s=lease_s)
            case PullEnd():
                self.leases.end(message.lease_id, message.reader)
                return None
            case StateChecksums():
                # Without an open pull, too: its PullBegin may have been lost and will be repeated.
                lease = self.leases.living(message.lease_id)
                if not lease.is_hashed:
                    raise LeaseError(
                        f"the checksums of request {message.lease_id} are not computed yet"
                    )
                return ChecksumsReply(call_id=call_id, groups=lease.stated_checksums())
            case Push():
                heads = self._check_push(message)
                # A write cannot be cancelled: it owns the reader's blocks until the answer.
                write = self.connector.push(message.target, message.block_ids, heads)
                self._writes.append((question, write))
                return None

    def _check_push(self, message: Push) -> range:
        """Return the KV heads to write. Raises LeaseError if the reader may not have them."""
        if not self.connector.pushes:
            raise LeaseError("the connector here does not write to its readers")
        heads = range(message.first_head, message.first_head + message.num_heads)
        # This rank writes, so this rank must check what the reader may see. Without blocks, the
        # reader asks for the scratch, which contains no prompt.
        if message.block_ids:
            lease = self.leases.opened(message.lease_id, message.reader)
            leased = lease.grant.block_ids
            if len(message.block_ids) != len(leased) or not all(
                set(asked).issubset(held)
                for asked, held in zip(message.block_ids, leased, strict=True)
            ):
                raise LeaseError(f"request {message.lease_id} has no lease for all of these blocks")
            if not 0 <= heads.start < heads.stop <= self.card.geometry.num_kv_heads:
                raise LeaseError(f"there are no {message.num_heads} heads from {heads.start} on")
        return heads

    def _end_writes(self) -> None:
        pending = []
        for question, write in self._writes:
            if not write.done():
                pending.append((question, write))
                continue
            failure = write.exception()
            error = "" if failure is None else f"{self.card.agent_name}: {failure}"
            if error:
                logger.warning("a write to a reader failed: %s", error)
            ended = PushEnded(call_id=question.message.call_id, ok=not error, error=error)
            self.send(question.identity, ended)
        self._writes = pending
