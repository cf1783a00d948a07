"""Reads one prefill rank's share of a prompt, and proves the bytes that arrived.

::

    lease ── plan ──▶ READ ── parts land ──▶ their checksums are computed
                       └── over ── checksums that the prefill rank states ──▶ equal: proven
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from pdlaunch.errors import TransferError, VerificationError
from pdlaunch.observe.spans import SpanLog
from pdlaunch.protocol.ids import ReaderId
from pdlaunch.protocol.side_channel import PullReply
from pdlaunch.protocol.transfer import StartPull
from pdlaunch.transfer.connectors.connector import BlockRead, Read, ReadPart
from pdlaunch.transfer.handshake import DecodeSetup
from pdlaunch.transfer.integrity.checksum import ChecksumArray, Checksums
from pdlaunch.transfer.peers import Peer


class PullFailed(TransferError):
    """Says why a pull cannot go on."""

    def __init__(self, message: str, *, verification: bool = False, late: bool = False) -> None:
        super().__init__(message)
        self.verification = verification
        self.late = late

    def without_traceback(self) -> PullFailed:
        """Return a copy without traceback: its frames would keep their functions' local variables
        alive.
        """
        return PullFailed(str(self), verification=self.verification, late=self.late)


class ReadFailed(PullFailed):
    """Says that a READ has failed or brought wrong bytes; it is over, and may be repeated."""


class ShareRead:
    """Reads the KV heads of a model that come from one prefill rank in one READ, and proves it.
    One READ at a time goes into these blocks.
    """

    def __init__(
        self,
        command: StartPull,
        peer: Peer,
        setup: DecodeSetup,
        reader: ReaderId,
        heads: range,
        log: SpanLog,
    ) -> None:
        """``heads`` are global indices."""
        self.read_s = 0.0
        """Duration of the READ, as exactly as the connector knows."""
        self.ended_at = 0.0
        """Instant at which it was over."""
        self.is_complete = False
        """All blocks of the lease have been read."""
        self._command = command
        self._peer = peer
        self._setup = setup
        self._reader = reader
        self._heads = heads
        self._log = log
        self._lease: PullReply | None = None
        self._read: BlockRead | None = None
        self._spans: list[tuple[int, range]] = []
        """Its blocks, one after another: group, and logical indices within the request."""
        self._reading: Read | None = None
        self._started_at = 0.0
        self._found: list[Checksums] = []
        self._num_hashed = 0
        """Blocks whose checksums were asked for."""

    @property
    def in_flight(self) -> bool:
        """Return whether a READ may still write to the blocks."""
        return self._reading is not None

    @property
    def num_bytes(self) -> int:
        """Return the size of the READ under the latest lease."""
        if self._read is None:
            return 0
        return len(self._read.local_blocks) * len(self._heads) * self._setup.head_bytes

    @property
    def lacks_checksums(self) -> bool:
        """Return whether the prefill rank has yet to state checksums."""
        groups = () if self._lease is None else self._lease.groups
        return self._setup.hasher is not None and any(group.checksums is None for group in groups)

    def begin(self, lease: PullReply) -> None:
        """Start to read the blocks of a lease. Raises PullFailed for a lease of another prompt,
        ReadFailed when the READ is refused.
        """
        assert self._reading is None
        self._check_hashes(lease)
        read = self._plan(lease)
        self._lease, self._read = lease, read
        self._found, self._num_hashed = [], 0
        self.is_complete = not read.local_blocks or not self._heads
        if self.is_complete:
            return
        try:
            self._reading = self._peer.read(read)
        except TransferError as error:
            self._peer.reconnect()
            raise ReadFailed(f"{self._peer.name}: {error}") from error
        self._started_at = self._setup.clock()

    def state(self, checksums: Sequence[bytes | None]) -> None:
        """Keep the stated checksums of the leased blocks, by group. Raises PullFailed."""
        lease = self._lease
        if lease is None or len(checksums) != len(lease.groups) or None in checksums:
            raise PullFailed(f"{self._peer.name} stated no checksums", verification=True)
        pairs = zip(lease.groups, checksums, strict=True)
        groups = [msgspec.structs.replace(group, checksums=stated) for group, stated in pairs]
        self._lease = msgspec.structs.replace(lease, groups=groups)

    def advance(self) -> None:
        """Poll the READ; never waits. Raises ReadFailed."""
        if self._reading is None:
            return
        state = self._reading.poll()
        if state == "pending":
            # Checksums of landed blocks are computed while the rest moves.
            for num_blocks, landed in _worth_hashing(self._reading.parts()):
                self._hash_until(num_blocks, landed)
            return
        self.ended_at = self._setup.clock()
        self.read_s = self._reading.seconds() if state == "done" else 0.0
        self._release()
        assert self._read is not None
        num_blocks = len(self._read.local_blocks)
        self._log.add(
            "read",
            self._started_at,
            self.ended_at,
            source=self._peer.name,
            bytes=self.num_bytes,
            gb_s=round(self.num_bytes / self.read_s / 1e9, 3) if self.read_s else None,
            blocks=num_blocks,
            state=state,
        )
        if state == "failed":
            self._peer.reconnect()
            raise ReadFailed(f"READ from {self._peer.name} failed")
        self._hash_until(num_blocks)
        self.is_complete = True

    def settle(self) -> None:
        """Release the READ in flight once it is over."""
        if self._reading is not None and self._reading.poll() != "pending":
            self._release()

    def is_proven(self) -> bool:
        """Return whether all bytes are known to be right. Raises VerificationError when some are
        wrong.
        """
        # A READ may end first: the prefill rank begins its checksums once it has answered.
        if not self.is_complete or self.lacks_checksums:
            return False
        if self._setup.hasher is None or not self._num_hashed:
            return True
        if not all(checksums.ready() for checksums in self._found):
            return False
        assert self._read is not None
        expected = self._stated_checksums(self._read.remote_heads)
        if len(expected) != len(self._read.local_blocks):
            raise VerificationError("the prefill rank stated no checksums")
        found = np.concatenate([checksums.result() for checksums in self._found])
        wrong = np.argwhere(found != expected)
        if len(wrong):
            row, head = wrong[0].tolist()
            raise VerificationError(
                f"checksum of KV head {self._read.local_heads[head]} differs: block "
                f"{self._read.remote_blocks[row]} there, block {self._read.local_blocks[row]} here"
            )
        return True

    def _check_hashes(self, lease: PullReply) -> None:
        """Check that the blocks were computed for this very prompt. Raises PullFailed."""
        command, theirs = self._command, lease.block_hashes
        ours = command.block_hashes
        if lease.num_tokens < command.num_tokens or theirs[: len(ours)] != ours:
            pairs = enumerate(zip(ours, theirs, strict=False))
            first = next((index for index, (one, other) in pairs if one != other), len(theirs))
            raise PullFailed(
                f"{self._peer.name}: token hashes of request {command.remote.lease_id} differ from "
                f"block {first} on "
                f"({command.num_tokens} tokens here, {lease.num_tokens} there)",
                verification=True,
            )

    def _plan(self, lease: PullReply) -> BlockRead:
        """Plan the READ of the blocks that the pull wants. Raises PullFailed."""
        command, name, geometry = self._command, self._peer.name, self._peer.geometry
        num_groups = len(command.block_ids)
        if len(lease.groups) != num_groups:
            raise PullFailed(f"{name} has {len(lease.groups)} KV cache groups, {num_groups} here")
        local: list[int] = []
        remote: list[int] = []
        self._spans = []
        wanted = zip(command.block_ids, command.first_block_index, lease.groups, strict=True)
        for index, (block_ids, first, group) in enumerate(wanted):
            # logical index          first .................. first + len(block_ids)
            # at the prefill rank    group.first_block_index ........ + len(group.block_ids)
            span, start = range(first, first + len(block_ids)), first - group.first_block_index
            found = group.block_ids[start : start + len(span)] if start >= 0 else []
            if not span:
                continue
            if len(found) != len(span) or span.stop > len(command.block_hashes):
                raise PullFailed(
                    f"{name} does not hold all blocks of group {index} from {first} on"
                )
            local += block_ids
            remote += found
            self._spans.append((index, span))
        # Peers are not trusted: a block out of range would be other memory.
        if remote and not 0 <= min(remote) <= max(remote) < geometry.num_blocks:
            raise PullFailed(f"{name} named a block outside of its {geometry.num_blocks}")
        ours, theirs = self._setup.first_kv_head, geometry.first_kv_head
        return BlockRead(
            local_blocks=local,
            remote_blocks=remote,
            local_heads=range(self._heads.start - ours, self._heads.stop - ours),
            remote_heads=range(self._heads.start - theirs, self._heads.stop - theirs),
            lease_id=command.remote.lease_id,
            reader=self._reader,
            digest=command.block_hashes[-1].hex(),
        )

    def _stated_checksums(self, heads: range) -> ChecksumArray:
        """Return the checksums that the prefill rank states of the READ's blocks, [num_blocks,
        num_heads], or fewer rows where it does not state all. ``heads`` are its own indices.
        """
        assert self._lease is not None
        num_heads = self._peer.geometry.num_kv_heads
        found = [np.empty((0, len(heads)), np.uint64)]
        for index, span in self._spans:
            group = self._lease.groups[index]
            stated, start = group.checksums or b"", span.start - group.first_block_index
            if len(stated) == len(group.block_ids) * num_heads * 8:
                # 8 bytes for each block and head of the prefill rank, block by block.
                by_block = np.frombuffer(stated, "<u8").reshape(-1, num_heads)
                found.append(by_block[start : start + len(span), heads.start : heads.stop])
        return np.concatenate(found)

    def _hash_until(self, num_blocks: int, after: torch.cuda.Event | None = None) -> None:
        """Hash the blocks before ``num_blocks``, which are final now, or once ``after`` has
        fired.
        """
        hasher, read = self._setup.hasher, self._read
        if hasher is None or read is None or num_blocks <= self._num_hashed:
            return
        blocks = read.local_blocks[self._num_hashed : num_blocks]
        heads = slice(read.local_heads.start, read.local_heads.stop)
        self._found.append(hasher.start(blocks, heads, after))
        self._num_hashed = num_blocks

    def _release(self) -> None:
        assert self._reading is not None
        self._peer.release(self._reading)
        self._reading = None


def _worth_hashing(parts: Sequence[ReadPart]) -> list[ReadPart]:
    """Return the last two parts and every fourth before. Each launch of a hash takes the host 0.1
    to 0.4 ms, so not every part gets one; the last launch should find little left to do.
    """
    last = len(parts) - 1
    return [part for index, part in enumerate(parts) if index == last or (last - index) % 4 == 1]
