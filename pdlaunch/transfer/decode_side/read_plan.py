"""Plans what a pull reads from one prefill rank: which blocks, from where to where, and only blocks
of this very prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pdlaunch.errors import TransferError
from pdlaunch.protocol.ids import ReaderId
from pdlaunch.protocol.side_channel import Geometry, GroupBlocks, PullReply
from pdlaunch.protocol.transfer import StartPull
from pdlaunch.transfer.connectors.connector import BlockRead
from pdlaunch.transfer.integrity.checksum import ChecksumArray


class PullFailed(TransferError):
    """Says why a pull cannot go on."""

    def __init__(self, message: str, *, verification: bool = False, late: bool = False) -> None:
        super().__init__(message)
        self.verification = verification
        self.late = late

    def without_traceback(self) -> PullFailed:
        """Return a copy without traceback, whose frames would keep alive all that their functions
        saw.
        """
        return PullFailed(str(self), verification=self.verification, late=self.late)


@dataclass(frozen=True, slots=True)
class Share:
    """Names the KV heads of a model that come from one prefill rank."""

    prefill_rank: str
    """Name of the prefill rank."""
    reader: ReaderId
    """Name of the reader, as in the PullBegin."""
    heads: range
    """Global indices."""
    first_local_head: int
    """Global index of this rank's first one."""

    @property
    def local_heads(self) -> range:
        """Return the indices within this rank."""
        return range(
            self.heads.start - self.first_local_head, self.heads.stop - self.first_local_head
        )

    def remote_heads(self, geometry: Geometry) -> range:
        """Return the indices within the prefill rank."""
        return range(
            self.heads.start - geometry.first_kv_head, self.heads.stop - geometry.first_kv_head
        )


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Holds the plan of one READ."""

    read: BlockRead
    spans: tuple[tuple[int, range], ...]
    """The blocks, one after another: group, and logical indices within the request."""

    @property
    def is_empty(self) -> bool:
        """Return whether nothing is needed of this prefill rank."""
        return not self.read.local_blocks or not self.read.local_heads


def check_hashes(command: StartPull, reply: PullReply, prefill_rank: str) -> None:
    """Check that the blocks were computed for this very prompt. Raises PullFailed."""
    ours = command.block_hashes
    if reply.num_tokens < command.num_tokens or reply.block_hashes[: len(ours)] != ours:
        pairs = zip(ours, reply.block_hashes, strict=False)
        first = next(
            (index for index, pair in enumerate(pairs) if pair[0] != pair[1]),
            len(reply.block_hashes),
        )
        raise PullFailed(
            f"{prefill_rank}: token hashes of request {command.remote.lease_id} differ from block "
            f"{first} on "
            f"({command.num_tokens} tokens here, {reply.num_tokens} there)",
            verification=True,
        )


def plan_read(
    command: StartPull, reply: PullReply, geometry: Geometry, share: Share, blocks: range
) -> ReadPlan:
    """Plan to read what the pull wants of ``blocks``, logical indices. ``geometry`` is that of the
    prefill rank. Raises PullFailed.
    """
    if len(reply.groups) != len(command.block_ids):
        raise PullFailed(
            f"{share.prefill_rank} has {len(reply.groups)} KV cache groups, "
            f"{len(command.block_ids)} here"
        )
    local: list[int] = []
    remote: list[int] = []
    spans = tuple(_wanted_spans(command, blocks))
    for index, span in spans:
        group, first = reply.groups[index], command.first_block_index[index]
        # logical index      first ........................ first + len(command.block_ids[index])
        # wanted now                 span.start .. span.stop
        # at the prefill rank    group.first_block_index ........ + len(group.block_ids)
        start = span.start - group.first_block_index
        found = group.block_ids[start : start + len(span)] if start >= 0 else []
        if len(found) != len(span) or span.stop > len(command.block_hashes):
            raise PullFailed(
                f"{share.prefill_rank} does not hold all blocks of group {index} from "
                f"{span.start} on"
            )
        local += command.block_ids[index][span.start - first : span.stop - first]
        remote += found
    # What a peer says is not trusted: a block out of range would be somebody else's memory.
    if remote and not 0 <= min(remote) <= max(remote) < geometry.num_blocks:
        raise PullFailed(f"{share.prefill_rank} named a block outside of its {geometry.num_blocks}")
    read = BlockRead(
        local_blocks=local,
        remote_blocks=remote,
        local_heads=share.local_heads,
        remote_heads=share.remote_heads(geometry),
        lease_id=command.remote.lease_id,
        reader=share.reader,
        digest=command.block_hashes[-1].hex(),
    )
    return ReadPlan(read, spans)


def _wanted_spans(command: StartPull, blocks: range) -> Iterator[tuple[int, range]]:
    for index, (block_ids, first) in enumerate(
        zip(command.block_ids, command.first_block_index, strict=True)
    ):
        span = range(max(first, blocks.start), min(first + len(block_ids), blocks.stop))
        if span:
            yield index, span


def stated_checksums(
    groups: Sequence[GroupBlocks], geometry: Geometry, plan: ReadPlan
) -> ChecksumArray:
    """Return the checksums that the prefill rank states of a READ's blocks: [num_blocks,
    num_heads], or fewer rows where it does not state all.
    """
    heads = plan.read.remote_heads
    found = [np.empty((0, len(heads)), np.uint64)]
    for index, span in plan.spans:
        group, num_heads = groups[index], geometry.num_kv_heads
        stated, start = group.checksums or b"", span.start - group.first_block_index
        if len(stated) == len(group.block_ids) * num_heads * 8 and start >= 0:
            # 8 bytes for each block and head of the prefill rank, block by block.
            by_block = np.frombuffer(stated, "<u8").reshape(-1, num_heads)
            found.append(by_block[start : start + len(span), heads.start : heads.stop])
    return np.concatenate(found)
