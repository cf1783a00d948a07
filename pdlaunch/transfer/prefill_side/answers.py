"""Answers what decode ranks ask about the leased blocks of this rank.

Every question gets one answer; one that makes no sense is refused and changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from pdlaunch.errors import LeaseError
from pdlaunch.protocol.ids import LeaseId
from pdlaunch.protocol.side_channel import (
    ChecksumsReply,
    Compatibility,
    Geometry,
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
    Refused,
    StateChecksums,
    ToDecodeSide,
    ToPrefillSide,
)
from pdlaunch.protocol.transfer import (
    EndLease,
    GrantLease,
    LeaseEnded,
    SetLeaseReaders,
)
from pdlaunch.transfer.channel.handshake import RankIdentity
from pdlaunch.transfer.connectors.connector import PushJob
from pdlaunch.transfer.integrity.checksum import Checksums, KVHasher
from pdlaunch.transfer.prefill_side.leases import LeaseTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankCard:
    """Says to decode ranks, in the handshake, what this rank is."""

    identity: RankIdentity
    compatibility: Compatibility
    geometry: Geometry
    agent_name: str
    agent_metadata: bytes


@dataclass(slots=True)
class _Hashing:
    """Holds a lease whose checksums are being computed, or are about to be."""

    groups: list[GroupBlocks]
    granted_at: float
    checksums: Checksums | None = None
    """Checksums of the blocks of all groups, one group after another; None before their computation
    begins.
    """

    def stated(self) -> list[GroupBlocks]:
        """Return the groups with their checksums, which must be ready."""
        assert self.checksums is not None
        # The hasher was given the blocks of all groups in one list: cut its rows at the ends of
        # groups.
        ends = np.cumsum([len(group.block_ids) for group in self.groups])
        parts = np.split(self.checksums.result().astype("<u8"), ends[:-1])
        pairs = zip(self.groups, parts, strict=True)
        return [msgspec.structs.replace(group, checksums=part.tobytes()) for group, part in pairs]


class LeaseAnswers:
    """Keeps the leases of one rank, and answers questions about them. The transfer
    thread owns it.
    """

    def __init__(self, card: RankCard, hasher: KVHasher | None, clock: Callable[[], float]) -> None:
        """``hasher`` is None when ``kv_transfer.verify`` is off."""
        self._card = card
        self._hasher = hasher
        self._clock = clock
        self._known_ranks: set[tuple[str, int]] = set()
        self._leases = LeaseTable(clock)
        self._hashing: dict[LeaseId, _Hashing] = {}

    @property
    def known_ranks(self) -> frozenset[tuple[str, int]]:
        """Return name and incarnation of every rank that has shaken hands."""
        return frozenset(self._known_ranks)

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @property
    def hashing_since_at(self) -> float | None:
        """Return the instant of the latest grant whose checksums are still being computed."""
        return max((hashing.granted_at for hashing in self._hashing.values()), default=None)

    def next_deadline_at(self) -> float | None:
        """Return when the next lease expires."""
        return self._leases.next_deadline_at()

    def grant(self, command: GrantLease) -> None:
        """Keep the blocks of a finished request for its readers.

        Nothing writes to the blocks any more: whoever grants knows a token that all ranks computed
        from them. ``advance_checksums`` begins to compute their checksums, so that readers who wait
        for the lease are answered first and read meanwhile.
        """
        groups = [
            GroupBlocks(first_block_index=first, block_ids=block_ids, checksums=None)
            for first, block_ids in zip(command.first_block_index, command.block_ids, strict=True)
        ]
        try:
            self._leases.grant(command, groups)
        except LeaseError as error:
            # The scheduler refuses a request whose id still has a lease, so this is a fault of
            # ours.
            raise AssertionError(str(error)) from error
        if self._hasher is not None:
            self._hashing[command.lease_id] = _Hashing(groups, self._clock())

    def end(self, command: EndLease) -> None:
        """Give the blocks back to the engine, at once or with the end of a pull that has begun."""
        self._leases.cancel(command.lease_id)

    def set_readers(self, command: SetLeaseReaders) -> None:
        """Expect fewer readers than were granted."""
        self._leases.set_readers(command.lease_id, command.num_readers)

    def advance_checksums(self) -> bool:
        """Begin to compute the checksums of new leases, and state those that are there.

        Returns whether any have come: questions may have waited for them.
        """
        num_hashing = len(self._hashing)
        for lease_id, hashing in list(self._hashing.items()):
            if hashing.checksums is None:
                assert self._hasher is not None
                block_ids = [block_id for group in hashing.groups for block_id in group.block_ids]
                hashing.checksums = self._hasher.start(block_ids, slice(None))
            if hashing.checksums.ready():
                del self._hashing[lease_id]
                # Of a lease that has ended meanwhile, somebody else may have written to the blocks:
                # nobody is told these checksums, as its id is unknown.
                self._leases.set_groups(lease_id, hashing.stated())
        return len(self._hashing) < num_hashing

    def take_ended(self) -> list[LeaseEnded]:
        """End the leases whose deadline has passed, and return all that have ended since the last
        call.
        """
        # The engine frees the blocks when it hears of the end; no answer may promise them after it.
        self._leases.expire()
        return [
            LeaseEnded(lease_id=lease_id, reason=reason)
            for lease_id, reason in self._leases.take_ended()
        ]

    def must_wait(self, message: ToPrefillSide) -> bool:
        """Return whether a question asks about a lease of this engine that this rank has never
        heard of, as the grant may be on its way, or for checksums that are being computed.
        """
        match message:
            case PullBegin() | PullHeartbeat() | PullEnd() | StateChecksums() if (
                message.engine_id == self._card.identity.engine_id
            ):
                lease_id = message.lease_id
                # First, as the lease is known by then, and the last line would let it pass.
                if isinstance(message, StateChecksums) and lease_id in self._hashing:
                    return True
                # Grants and questions travel over different connections: either may be first.
                return not self._leases.knows(lease_id)
            case _:
                return False

    def job_of(self, message: Push) -> PushJob:
        """Return the write that a reader asks for. Raises LeaseError when it may not have what it
        names.
        """
        identity, num_heads = self._card.identity, self._card.geometry.num_kv_heads
        if message.engine_id != identity.engine_id:
            raise LeaseError(
                f"{identity.name} belongs to engine_id {identity.engine_id}, not to "
                f"{message.engine_id}"
            )
        # Whoever writes to a peer's memory decides what the peer may see. The scratch, which is
        # meant when there are no blocks, holds nobody's prompt.
        if message.block_ids:
            lease = self._leases.opened(message.lease_id, message.reader)
            leased = {block_id for group in lease.groups for block_id in group.block_ids}
            if not leased.issuperset(message.block_ids):
                raise LeaseError(
                    f"{identity.name}: request {message.lease_id} has no lease for all of these "
                    "blocks"
                )
            if not 0 <= message.first_head < message.first_head + message.num_heads <= num_heads:
                raise LeaseError(
                    f"{identity.name}: there are no {message.num_heads} heads from "
                    f"{message.first_head} on"
                )
        return PushJob(
            message.target,
            message.block_ids,
            range(message.first_head, message.first_head + message.num_heads),
        )

    def answer(self, message: ToPrefillSide) -> ToDecodeSide:
        """Return the answer to a decode rank's question."""
        asked = message.expected_engine_id if isinstance(message, Handshake) else message.engine_id
        identity = self._card.identity
        # Another engine may have had this port before, or be a restart of the one that is meant.
        if asked != identity.engine_id:
            reason = f"{identity.name} belongs to engine_id {identity.engine_id}, not to {asked}"
            return Refused(call_id=message.call_id, reason=reason)
        try:
            return self._answer(message)
        except LeaseError as error:
            return Refused(call_id=message.call_id, reason=f"{identity.name}: {error}")

    def _answer(self, message: ToPrefillSide) -> ToDecodeSide:
        match message:
            case Handshake():
                return self._introduce(message)
            case PullBegin():
                return self._begin(message)
            case PullHeartbeat():
                lease_s = self._leases.heartbeat(message.lease_id, message.reader)
                return HeartbeatReply(call_id=message.call_id, lease_s=lease_s)
            case PullEnd():
                held = self._leases.end(message.lease_id, message.reader)
                return PullEndReply(call_id=message.call_id, held=held)
            case StateChecksums():
                return self._state_checksums(message)
            case Push():
                raise LeaseError("the connector here does not write to its readers")

    def _introduce(self, message: Handshake) -> HandshakeReply:
        logger.info("handshake with %s, incarnation %d", message.rank_name, message.incarnation)
        # Whether it fits or not: nobody waits for a rank that has come and cannot be served
        # (``TransferSides.is_connected_to``).
        self._known_ranks.add((message.rank_name, message.incarnation))
        card = self._card
        return HandshakeReply(
            call_id=message.call_id,
            engine_id=card.identity.engine_id,
            rank_name=card.identity.name,
            incarnation=card.identity.incarnation,
            tp_rank=card.identity.tp_rank,
            tp_size=card.identity.tp_size,
            compatibility=card.compatibility,
            geometry=card.geometry,
            agent_name=card.agent_name,
            agent_metadata=card.agent_metadata,
        )

    def _begin(self, message: PullBegin) -> PullReply:
        lease = self._leases.begin(message.lease_id, message.reader, message.num_decode_ranks)
        return PullReply(
            call_id=message.call_id,
            num_tokens=lease.grant.num_tokens,
            block_hashes=lease.grant.block_hashes,
            groups=lease.groups,
            lease_s=self._leases.remaining_s(lease),
        )

    def _state_checksums(self, message: StateChecksums) -> ChecksumsReply:
        lease = self._leases.opened(message.lease_id, message.reader)
        # The question may be here because its time to wait is over: look once more before refusing
        # it.
        self.advance_checksums()
        if message.lease_id in self._hashing:
            raise LeaseError(f"the checksums of request {message.lease_id} are not there yet")
        return ChecksumsReply(
            call_id=message.call_id, groups=[group.checksums for group in lease.groups]
        )
