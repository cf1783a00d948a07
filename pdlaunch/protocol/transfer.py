"""Commands of the scheduler to the transfer thread of every rank, and the thread's events.

Block ids are the engine's own. Blocks in ``GrantLease`` belong to the lease until ``LeaseEnded``.
Blocks in ``StartPull`` belong to the transfer until ``PullFinished``; if that has ``in_flight``,
until ``PullDrained``.
"""

from collections.abc import Iterable
from typing import Literal

from pdlaunch.observe.spans import SpanReport
from pdlaunch.protocol.ids import LeaseId, PullId, RequestId
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.wire import Message


class GrantLease(Message):
    lease_id: LeaseId
    block_ids: list[list[int]]  # blocks of each group, from first_block_index on
    first_block_index: list[int]
    block_hashes: list[bytes]
    num_tokens: int
    num_readers: int
    lease_s: float


class EndLease(Message):
    """Prefill: end the lease of a cancelled request, at once or with its last running pull."""

    lease_id: LeaseId


class StartPull(Message):
    pull_id: PullId
    request_id: RequestId
    remote: RemoteKV
    block_ids: list[list[int]]  # destination blocks of each group, from first_block_index on
    # Logical index of the first block to pull; earlier blocks are cached or out of the window.
    first_block_index: list[int]
    block_hashes: list[bytes]  # of the prompt's blocks; must equal those of the prefill engine
    num_tokens: int
    records_spans: bool = False


class CancelPull(Message):
    """Decode: cancel a pull. It still ends with PullFinished."""

    pull_id: PullId


PrefillCommand = GrantLease | EndLease
DecodeCommand = StartPull | CancelPull
TransferCommand = PrefillCommand | DecodeCommand


LeaseEnd = Literal["pulled", "released", "expired"]


class LeaseEnded(Message):
    """Prefill: the lease has ended on this rank. Rank 0 frees the blocks when all ranks say so."""

    lease_id: LeaseId
    reason: LeaseEnd


class PullFinished(Message):
    pull_id: PullId
    ok: bool  # the blocks are proven: READ done, lease valid throughout, hashes and checksums equal
    error: str = ""
    # A READ may still write to the blocks: quarantine them until PullDrained.
    in_flight: bool = False
    num_bytes: int = 0
    seconds: float = 0.0
    read_s: float = 0.0  # time of the slowest READ; set, like prefill and path, if ``ok``
    prefill: str = ""  # name of the engine from which the blocks came
    path: str = ""  # path of the READs; several paths if ranks used different ones
    blames_pair: bool = False  # the failure is a fault of the two engines or their path
    # Name in ``observe.counters.COUNTERS`` -> number: repeated READs, and 1 for each cause of a
    # failed attempt (perhaps not the last attempt).
    counts: dict[str, int] = {}
    # tp_rank -> spans of this rank, if StartPull asked for spans.
    reports: dict[int, SpanReport] = {}


def join_paths(paths: Iterable[str]) -> str:
    """Return the paths of several ranks as one text; equal paths are named once."""
    return " + ".join(sorted(set(filter(None, paths))))


class PullDrained(Message):
    """Decode: no READ of this pull can write to its blocks any more."""

    pull_id: PullId


TransferEvent = LeaseEnded | PullFinished | PullDrained
