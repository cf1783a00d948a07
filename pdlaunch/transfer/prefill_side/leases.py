"""Keeps the blocks of finished requests for their readers, each under a lease with a deadline.

::

    grant ──> waiting ── begin(reader) ──> pulling ── last reader ends ──> ended: pulled
                 │                            │
                 ├── cancel: ended: released  ├── cancel, then end: ended: released
                 └── deadline: ended: expired └── deadline: ended: expired

While a pull is open nothing but the deadline ends a lease: readers rely on the seconds that they
were told. A lease knows no sockets and no tensors, and asks the injected clock alone. Deadlines
never leave this process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from pdlaunch.errors import LeaseError
from pdlaunch.protocol.ids import LeaseId, ReaderId
from pdlaunch.protocol.side_channel import GroupBlocks
from pdlaunch.protocol.transfer import GrantLease

logger = logging.getLogger(__name__)

EndReason = Literal["pulled", "released", "expired"]

# What goes by ``lease_s`` elsewhere: heartbeats, four in that time (``lease_hold``); PD107, as
# pulls must end sooner; engines of vLLM, in whole seconds (``engines/vllm.py``); routers, which
# hand blocks of such engines over within half of it (``prompt_lease``). Sleep waits for the last.
MAX_EXTENSIONS = 20
"""A lease lives at most this many times ``lease_s``, however often it is extended: heartbeats of a
reader that never ends must not hold blocks for good.
"""
MAX_OPEN_READERS = 4096
"""Pulls of one lease that may be open at once."""
MAX_PAST_LEASES = 4096
"""Ended leases whose ids are still known."""


@dataclass(slots=True)
class Lease:
    """Keeps one finished request's blocks on this rank."""

    grant: GrantLease
    groups: list[GroupBlocks]
    deadline_at: float
    last_deadline_at: float
    """No extension goes beyond this."""
    num_readers: int
    """Choices that will pull; fewer than granted when some have ended with their first token."""
    open_readers: dict[ReaderId, int] = field(default_factory=dict)
    """Pulls that have begun and not ended, with their number of decode ranks."""
    served_readers: set[ReaderId] = field(default_factory=set)
    """Pulls that have ended."""
    served: Fraction = Fraction(0)
    """Readers that have ended; one of the k decode ranks of a reader counts 1/k."""
    cancelled: bool = False


class LeaseTable:
    """Keeps the living leases of one rank. Not thread-safe: the transfer thread owns it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._leases: dict[LeaseId, Lease] = {}
        self._past: dict[LeaseId, None] = {}
        """Ids of the latest leases that have ended, the oldest first."""
        self._ended: list[tuple[LeaseId, EndReason]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, grant: GrantLease, groups: list[GroupBlocks]) -> None:
        """Take over the blocks of a finished request. Raises LeaseError when its id has a living
        lease.
        """
        if grant.lease_id in self._leases:
            raise LeaseError(f"request {grant.lease_id} has a lease already")
        logger.debug("lease of %s begins, for %g s", grant.lease_id, grant.lease_s)
        # A client may use an id again, once its first lease has ended.
        self._past.pop(grant.lease_id, None)
        now = self._clock()
        last_deadline_at = now + MAX_EXTENSIONS * grant.lease_s
        self._leases[grant.lease_id] = Lease(
            grant, groups, now + grant.lease_s, last_deadline_at, grant.num_readers
        )

    def set_groups(self, lease_id: LeaseId, groups: list[GroupBlocks]) -> None:
        """Tell readers this of a lease's blocks from now on. Unknown ids are ignored."""
        if (lease := self._leases.get(lease_id)) is not None:
            lease.groups = groups

    def knows(self, lease_id: LeaseId) -> bool:
        """Return whether there is such a lease, or was one not long ago."""
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

    def set_readers(self, lease_id: LeaseId, num_readers: int) -> None:
        """Expect that many readers and no more: the lease ends when all have been here. Unknown
        ids are ignored.
        """
        lease = self._leases.get(lease_id)
        if lease is None:
            return
        lease.num_readers = num_readers
        self._end_if_done(lease)

    def begin(self, lease_id: LeaseId, reader: ReaderId, num_decode_ranks: int) -> Lease:
        """Begin a pull, or begin it anew, which extends the lease. Raises LeaseError, also once the
        pull has ended.
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
        # A reader that begins anew takes its own place.
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
        # First: a lease whose deadline has passed unnoticed has not held.
        self.expire()
        lease = self._leases.get(lease_id)
        num_decode_ranks = lease.open_readers.pop(reader, None) if lease is not None else None
        if lease is None or num_decode_ranks is None:
            return False
        lease.served_readers.add(reader)
        # Fractions, as thirds must add up to one exactly.
        lease.served += Fraction(1, num_decode_ranks)
        self._end_if_done(lease)
        return True

    def cancel(self, lease_id: LeaseId) -> None:
        """End a lease that nobody wants any more, now or with its last open pull. Unknown ids are
        ignored.
        """
        lease = self._leases.get(lease_id)
        if lease is None:
            return
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
        extended = min(self._clock() + lease.grant.lease_s, lease.last_deadline_at)
        # Never shortened: readers rely on the seconds that they were told.
        lease.deadline_at = max(lease.deadline_at, extended)

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
