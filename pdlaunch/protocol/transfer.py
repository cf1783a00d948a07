"""Commands of the scheduler to the transfer thread of every rank, and the events that come back.

Block ids are the engine's own. Blocks named in ``GrantLease`` belong to the lease until
``LeaseEnded``; blocks named in ``StartPull`` belong to the transfer until ``PullFinished``, or
``PullDrained`` where that said ``in_flight``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pdlaunch.observe.spans import SpanReport
from pdlaunch.protocol.ids import LeaseId, PullId, RequestId
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.wire import Message


class GrantLease(Message):
    """Prefill: let the blocks of a finished request be pulled."""

    lease_id: LeaseId
    block_ids: list[list[int]]  # blocks of each group from first_block_index on
    first_block_index: list[int]
    block_hashes: list[bytes]
    num_tokens: int
    num_readers: int
    lease_s: float


class EndLease(Message):
    """Prefill: end the lease of a cancelled request, at once or with the last pull under way."""

    lease_id: LeaseId


class StartPull(Message):
    pull_id: PullId
    request_id: RequestId
    remote: RemoteKV
    block_ids: list[list[int]]  # destinations in each group of the blocks from first_block_index on
    # Logical index of the first block to pull; earlier ones are cached or out of the window.
    first_block_index: list[int]
    block_hashes: list[bytes]  # of all blocks of the prompt; compared with the prefill engine's
    num_tokens: int
    records_spans: bool = False


class CancelPull(Message):
    """Decode: cancel a pull, which ends in PullFinished like any other."""

    pull_id: PullId


PrefillCommand = GrantLease | EndLease
DecodeCommand = StartPull | CancelPull
TransferCommand = PrefillCommand | DecodeCommand


LeaseEnd = Literal["pulled", "released", "expired"]


class LeaseEnded(Message):
    """Prefill: the lease has ended on this rank; rank 0 frees the blocks when it has on all."""

    lease_id: LeaseId
    reason: LeaseEnd


class PullFinished(Message):
    pull_id: PullId
    ok: bool  # the blocks are proven: READ done, lease held throughout, hashes and checksums equal
    error: str = ""
    # A READ may still write to the blocks: quarantine them until PullDrained.
    in_flight: bool = False
    num_bytes: int = 0
    seconds: float = 0.0
    read_s: float = 0.0  # of the slowest READ; as prefill and path, set when the blocks are proven
    prefill: str = ""  # name of the engine that the blocks came from
    path: str = ""  # the path that they came over; several where ranks differ
    blames_pair: bool = False  # the failure is a fault of the two engines or their path
    # By the names of ``observe.counters.COUNTERS``: READs repeated, and 1 for each cause of a
    # failure, though perhaps not of the last attempt.
    counts: dict[str, int] = {}
    # Spans of each rank, by tp_rank, where its StartPull asked for that.
    reports: dict[int, SpanReport] = {}


def join_paths(paths: Iterable[str]) -> str:
    """Return the paths of several ranks as one name: a single one where all have the same."""
    return " + ".join(sorted(set(filter(None, paths))))


class PullDrained(Message):
    """Decode: no READ of this pull can write any more."""

    pull_id: PullId


TransferEvent = LeaseEnded | PullFinished | PullDrained
