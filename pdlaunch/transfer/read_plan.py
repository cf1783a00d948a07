"""What a pull reads from one holder rank, and the proof that it got it: token hashes, then checksums by (block, KV head)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pdlaunch.errors import TransferError, VerificationError
from pdlaunch.protocol.side_channel import Geometry, GroupBlocks, PullReply
from pdlaunch.protocol.transfer import StartPull
from pdlaunch.transfer.checksum import BlockHasher, ChecksumArray, Checksums
from pdlaunch.transfer.connector import BlockRead


class PullFailed(TransferError):
    """Why a pull cannot go on."""

    def __init__(self, message: str, *, verification: bool = False, late: bool = False) -> None:
        super().__init__(message)
        self.verification = verification
        self.late = late


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """One READ and what its bytes must be."""

    read: BlockRead
    expected: ChecksumArray
    """As many rows as blocks, or none when the holder stated none."""

    @property
    def is_empty(self) -> bool:
        """Nothing of this holder is needed."""
        return not self.read.local_blocks or not self.read.local_heads


def check_hashes(command: StartPull, reply: PullReply, holder: str) -> None:
    """The holder's blocks were computed for this very prompt. Raises PullFailed."""
    ours = command.block_hashes
    if reply.num_tokens < command.num_tokens or reply.block_hashes[: len(ours)] != ours:
        pairs = zip(ours, reply.block_hashes, strict=False)
        first = next((index for index, pair in enumerate(pairs) if pair[0] != pair[1]), len(reply.block_hashes))
        raise PullFailed(
            f"{holder}: token hashes of request {command.remote.request_id} differ from block {first} on "
            f"({command.num_tokens} tokens here, {reply.num_tokens} there)",
            verification=True,
        )


def plan_read(
    command: StartPull, reply: PullReply, geometry: Geometry, *, heads: range, first_local_head: int, holder: str, reader: str
) -> ReadPlan:
    """``heads``: of the model, that come from this holder; ``geometry``: the holder's. Raises PullFailed."""
    if len(reply.groups) != len(command.block_ids):
        raise PullFailed(f"{holder} has {len(reply.groups)} KV cache groups, {len(command.block_ids)} here")
    remote_heads = range(heads.start - geometry.first_kv_head, heads.stop - geometry.first_kv_head)
    local: list[int] = []
    remote: list[int] = []
    checksums = [np.empty((0, len(remote_heads)), np.uint64)]
    for index, (block_ids, first, group) in enumerate(
        zip(command.block_ids, command.first_block_index, reply.groups, strict=True)
    ):
        if not block_ids:
            continue
        start = first - group.first_block_index
        wanted = slice(start, start + len(block_ids))
        found = group.block_ids[wanted] if start >= 0 else []
        if len(found) != len(block_ids) or first + len(block_ids) > len(command.block_hashes):
            raise PullFailed(f"{holder} does not hold all blocks of group {index} from {first} on")
        local += block_ids
        remote += found
        checksums.append(_checksums_of(group, geometry.num_kv_heads)[wanted, remote_heads.start : remote_heads.stop])
    if remote and not 0 <= min(remote) <= max(remote) < geometry.num_blocks:
        raise PullFailed(f"{holder} named a block outside of its {geometry.num_blocks}")
    read = BlockRead(
        local_blocks=local,
        remote_blocks=remote,
        local_heads=range(heads.start - first_local_head, heads.stop - first_local_head),
        remote_heads=remote_heads,
        request_id=command.remote.request_id,
        reader=reader,
        digest=command.block_hashes[-1].hex(),
    )
    return ReadPlan(read, np.concatenate(checksums))


class Proof:
    """Checksums of what a READ has brought, asked for part by part while the rest is under way."""

    def __init__(self, plan: ReadPlan, hasher: BlockHasher) -> None:
        self._plan = plan
        self._hasher = hasher
        self._found: list[Checksums] = []
        self._num_hashed = 0
        """Blocks whose checksums were asked for."""

    def hash_until(self, num_blocks: int) -> None:
        """Have the checksums computed of the READ's blocks before ``num_blocks``: nothing writes to them any more."""
        read = self._plan.read
        if num_blocks > self._num_hashed:
            heads = slice(read.local_heads.start, read.local_heads.stop)
            self._found.append(self._hasher.start(read.local_blocks[self._num_hashed : num_blocks], heads))
            self._num_hashed = num_blocks

    def ready(self) -> bool:
        """Whether ``check`` returns at once."""
        return all(checksums.ready() for checksums in self._found)

    def check(self) -> None:
        """Raises VerificationError that names the first block and head that differ."""
        read, expected = self._plan.read, self._plan.expected
        if len(expected) != len(read.local_blocks):
            raise VerificationError("the holder stated no checksums")
        wrong = np.argwhere(np.concatenate([checksums.result() for checksums in self._found]) != expected)
        if len(wrong):
            row, head = wrong[0].tolist()
            raise VerificationError(
                f"checksum of KV head {read.local_heads[head]} differs: block {read.remote_blocks[row]} there, "
                f"block {read.local_blocks[row]} here"
            )


def _checksums_of(group: GroupBlocks, num_heads: int) -> ChecksumArray:
    """[num_blocks, num_heads]; of no block unless there is one for each."""
    stated = group.checksums or b""
    if len(stated) != len(group.block_ids) * num_heads * 8:
        return np.empty((0, num_heads), np.uint64)
    return np.frombuffer(stated, "<u8").reshape(-1, num_heads)
