"""What the scheduler asks of the connector on every rank, and what the connector reports back.

Block ids are the engine's own. Ownership: blocks named in ``GrantLease`` belong to the lease until
``LeaseEnded``; blocks named in ``StartPull`` belong to the transfer until ``PullFinished``, or
``PullDrained`` where that said ``in_flight``.
"""

from __future__ import annotations

from pdlaunch.protocol.ids import LeaseId, PullId, RequestId
from pdlaunch.protocol.kv_params import FirstToken, RemoteKV
from pdlaunch.protocol.wire import Message


class AnnounceBlocks(Message):
    """Prefill: a request that a decode engine awaits has these blocks so far; nothing writes to the
    first of them any more.

    The request keeps them until it is granted a lease, or until ``WithdrawBlocks``.
    """

    lease_id: LeaseId
    block_ids: list[list[int]]
    """By group, from first_block_index on; those that later steps compute may be lacking."""
    first_block_index: list[int]
    num_ready_blocks: int
    """Logical blocks, from the beginning of the prompt, that are complete."""
    block_hashes: list[bytes]
    """Of all blocks of the prompt."""
    num_tokens: int
    """Of the prompt."""


class WithdrawBlocks(Message):
    """Prefill: announced blocks go back to the engine, which may give them to others. There may be
    a new announcement later.
    """

    lease_id: LeaseId


class GrantLease(Message):
    """Prefill: the blocks of a finished request may be pulled."""

    lease_id: LeaseId
    block_ids: list[list[int]]
    """By group, from first_block_index on."""
    first_block_index: list[int]
    block_hashes: list[bytes]
    num_tokens: int
    num_readers: int
    first_tokens: list[FirstToken]
    lease_s: float


class EndLease(Message):
    """Prefill: the request was cancelled; the lease ends at once unless a pull has begun."""

    lease_id: LeaseId


class SetLeaseReaders(Message):
    """Prefill: fewer readers than ``num_readers`` of the grant will come; the lease ends when this
    many have pulled.
    """

    lease_id: LeaseId
    num_readers: int


class StartPull(Message):
    """Decode: pull a prompt's blocks. ``block_ids`` belong to the transfer until ``PullFinished``
    or ``PullDrained``.
    """

    pull_id: PullId
    request_id: RequestId
    remote: RemoteKV
    block_ids: list[list[int]]
    """By group: destination of the blocks from first_block_index on."""
    first_block_index: list[int]
    """Logical index of the first block to pull; earlier ones are in the prefix cache or out of the
    window.
    """
    block_hashes: list[bytes]
    """What this engine computed for its own prompt, all blocks; compared with the holder's."""
    num_tokens: int
    timeout_s: float
    num_attempts: int = 1
    """READs that one holder rank's share may take, when they fail or bring wrong bytes."""
    awaits: bool = False
    """The prompt may still be computed there: ``timeout_s`` counts from when its lease is known.
    ``block_ids`` may be empty.
    """


class CancelPull(Message):
    """Decode: nobody wants the blocks any more; ends in PullFinished like any other pull."""

    pull_id: PullId


PrefillCommand = AnnounceBlocks | WithdrawBlocks | GrantLease | EndLease | SetLeaseReaders
DecodeCommand = StartPull | CancelPull
TransferCommand = PrefillCommand | DecodeCommand


class LeaseEnded(Message):
    """Prefill: this rank's share of the lease is over; rank 0 frees the blocks when all ranks have
    said so.
    """

    lease_id: LeaseId
    reason: str
    """``pulled``, ``released`` or ``expired``."""


class PullFinished(Message):
    """Decode: this rank's pull has ended."""

    pull_id: PullId
    ok: bool
    """The blocks are proven: READ done, lease held throughout, hashes and checksums equal."""
    error: str = ""
    in_flight: bool = False
    """A READ may still write to the blocks: quarantine them until PullDrained."""
    num_bytes: int = 0
    seconds: float = 0.0
    read_s: float = 0.0
    """Of the slowest READ, when the blocks are proven."""
    verification_failed: bool = False
    """Hashes or checksums differed, though perhaps not in the last attempt."""
    late: bool = False
    """The lease had ended before the READ was over: the bytes may be another request's."""
    num_retries: int = 0
    """READs that were repeated."""
    first_tokens: list[FirstToken] = []
    """What the lease says of them, also of a pull that failed after it was known; empty when none
    was.
    """


class PullDrained(Message):
    """Decode: no READ of this pull can write any more (its handle ended, or the peer is dead)."""

    pull_id: PullId


TransferEvent = LeaseEnded | PullFinished | PullDrained
