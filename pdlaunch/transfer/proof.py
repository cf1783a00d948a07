"""Plans what a pull reads from one prefill rank, and checks that the bytes that arrived belong to
its prompt. Peers are not trusted.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from pdlaunch.errors import TransferError, VerificationError
from pdlaunch.protocol.side_channel import Geometry, PullReply
from pdlaunch.protocol.transfer import StartPull
from pdlaunch.transfer.connectors.connector import BlockRead
from pdlaunch.transfer.integrity.checksum import ChecksumArray

UNPROVEN = "kv_verification_failures"
LATE = "kv_late_reads"  # the lease ended before the READ: bytes may be of another request


class PullFailed(TransferError):
    def __init__(self, message: str, *, counter: str = "", blames_pair: bool = True) -> None:
        """``counter``: a row of ``COUNTERS`` to increment, besides ``kv_transfer_failures``."""
        super().__init__(message)
        self.counter = counter
        self.blames_pair = blames_pair


class ReadFailed(PullFailed):
    """Raised if a READ has failed or brought wrong bytes. It has ended, and may be repeated."""


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Holds the blocks of one READ, and their positions in the lease's lists of blocks."""

    blocks: BlockRead
    places: list[slice]  # for each KV cache group: positions of its blocks in the lease's list
    num_leased: list[int]  # for each KV cache group: the number of leased blocks

    def check(self, stated: Sequence[bytes], num_heads: int, found: ChecksumArray) -> None:
        """Compare ``stated``, the prefill rank's checksums by group, with ``found``, the checksums
        of the local bytes. ``num_heads``: of the prefill rank. Raises VerificationError.
        """
        heads = self.blocks.remote_heads
        if [len(each) for each in stated] != [num * num_heads * 8 for num in self.num_leased]:
            raise VerificationError("the prefill rank sent a wrong number of checksums")
        expected = [
            # ``each``: 8 bytes for each block and head of the prefill rank, block by block.
            np.frombuffer(each, "<u8").reshape(-1, num_heads)[place, heads.start : heads.stop]
            for each, place in zip(stated, self.places, strict=True)
        ]
        wrong = np.argwhere(found != np.concatenate(expected))
        if len(wrong):
            row, head = wrong[0].tolist()
            there, here = [*chain(*self.blocks.remote_blocks)], [*chain(*self.blocks.local_blocks)]
            raise VerificationError(
                f"checksum of KV head {self.blocks.local_heads[head]} differs: block "
                f"{there[row]} there, block {here[row]} here"
            )


def plan_read(
    command: StartPull,
    lease: PullReply,
    geometry: Geometry,
    heads: range,
    first_kv_head: int,
    label: str,
) -> ReadPlan:
    """Check that the leased blocks are those of the pull's prompt, and plan their READ. ``heads``:
    global indices of the KV heads to read; ``label``: unique for this prefill rank and reader.
    Raises PullFailed.
    """
    _check_prompt(command, lease)
    num_groups = len(command.block_ids)
    if len(lease.groups) != num_groups:
        raise PullFailed(f"{len(lease.groups)} KV cache groups there, {num_groups} here")
    remote: list[list[int]] = []
    places: list[slice] = []
    wanted = zip(command.block_ids, command.first_block_index, lease.groups, strict=True)
    for index, (block_ids, first, group) in enumerate(wanted):
        # logical index          first .................. first + len(block_ids)
        # at the prefill rank    group.first_block_index ........ + len(group.block_ids)
        start = first - group.first_block_index if block_ids else 0
        place = slice(start, start + len(block_ids))
        is_known = first + len(block_ids) <= len(command.block_hashes)
        if block_ids and not (start >= 0 and place.stop <= len(group.block_ids) and is_known):
            raise PullFailed(f"it does not hold all blocks of group {index} from block {first} on")
        remote.append(group.block_ids[place])
        places.append(place)
    # A block id out of range would address other memory of the peer.
    if not all(0 <= block_id < geometry.num_blocks for group in remote for block_id in group):
        raise PullFailed(f"a block id is out of range: it has {geometry.num_blocks} blocks")
    # The hashes are chained, so the last hash identifies the whole prompt.
    digest = command.block_hashes[-1].hex() if command.block_hashes else ""
    blocks = BlockRead(
        local_blocks=command.block_ids,
        remote_blocks=remote,
        local_heads=range(heads.start - first_kv_head, heads.stop - first_kv_head),
        remote_heads=range(
            heads.start - geometry.first_kv_head, heads.stop - geometry.first_kv_head
        ),
        label=f"{digest}/{hashlib.sha256(label.encode()).hexdigest()}",
    )
    return ReadPlan(blocks, places, [len(group.block_ids) for group in lease.groups])


def _check_prompt(command: StartPull, lease: PullReply) -> None:
    """Check that the leased blocks were computed for the pull's prompt. Raises PullFailed."""
    ours, theirs = command.block_hashes, lease.block_hashes
    if lease.num_tokens < command.num_tokens or theirs[: len(ours)] != ours:
        pairs = enumerate(zip(ours, theirs, strict=False))
        first = next((index for index, (one, other) in pairs if one != other), len(theirs))
        raise PullFailed(
            f"token hashes of request {command.remote.lease_id} differ from block {first} on "
            f"({command.num_tokens} tokens here, {lease.num_tokens} there)",
            counter=UNPROVEN,
        )
