"""Reads one prefill rank's share of a pull in chunks, and proves what has come.

::

    prompt    0 ........... ready ........... end      logical blocks of the prompt
    before the lease        ├─ next answer ──▶         read while prefill computes the rest
    with it                 ├───────────────▶┤         the rest

One READ at a time: a chunk goes into blocks that nothing else writes to. What was read before there
was a lease counts only if the lease is of the same generation: else these blocks went back to the
engine in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch

from pdlaunch.errors import TransferError, VerificationError
from pdlaunch.observe.spans import SpanLog
from pdlaunch.protocol.side_channel import Geometry, GroupBlocks, PullReply
from pdlaunch.protocol.transfer import StartPull
from pdlaunch.transfer.connectors.connector import Read, ReadPart
from pdlaunch.transfer.decode_side.links import PrefillLink, PullSetup
from pdlaunch.transfer.decode_side.read_plan import (
    PullFailed,
    ReadPlan,
    Share,
    check_hashes,
    plan_read,
    stated_checksums,
)
from pdlaunch.transfer.integrity.checksum import ChecksumArray, Checksums, HashBatch


class ReadFailed(PullFailed):
    """Says that a READ has failed or brought wrong bytes; it is over, and may be repeated."""


@dataclass(slots=True)
class _Chunk:
    """Holds one READ and the checksums of what it brings, asked for while it is under way."""

    plan: ReadPlan
    batch: HashBatch | None
    """None when ``kv_transfer.verify`` is off."""
    expected: ChecksumArray | None = None
    """Stated by the prefill rank; [num_blocks, num_heads]."""
    counts: bool = True
    found: list[Checksums] = field(default_factory=list)
    num_hashed: int = 0
    """Blocks whose checksums were asked for."""

    def hash_until(self, num_blocks: int, after: torch.cuda.Event | None = None) -> None:
        """Hash the blocks before ``num_blocks``, which are final now, or once ``after`` has
        fired.
        """
        if self.batch is not None and num_blocks > self.num_hashed:
            self.found.append(self.batch.start(slice(self.num_hashed, num_blocks), after))
            self.num_hashed = num_blocks

    def check(self, groups: Sequence[GroupBlocks], geometry: Geometry) -> None:
        """Raise a VerificationError that names the first block and head that differ."""
        read = self.plan.read
        expected = (
            stated_checksums(groups, geometry, self.plan)
            if self.expected is None
            else self.expected
        )
        if len(expected) != len(read.local_blocks):
            raise VerificationError("the prefill rank stated no checksums")
        wrong = np.argwhere(
            np.concatenate([checksums.result() for checksums in self.found]) != expected
        )
        if len(wrong):
            row, head = wrong[0].tolist()
            raise VerificationError(
                f"checksum of KV head {read.local_heads[head]} differs: block "
                f"{read.remote_blocks[row]} there, "
                f"block {read.local_blocks[row]} here"
            )


@dataclass(frozen=True, slots=True)
class _Places:
    """Says where a READ's blocks lie at the prefill rank: equal places mean an equal READ."""

    generation: int
    first_block: int
    end_block: int
    groups: list[tuple[int, list[int]]]
    """The first logical index of each group, and the blocks there."""


def _worth_hashing(parts: Sequence[ReadPart]) -> list[ReadPart]:
    """Return the last two parts and every fourth before. Each launch of a hash takes the host 0.1
    to 0.4 ms, so not every part gets one; the last launch should find little left to do.
    """
    last = len(parts) - 1
    return [part for index, part in enumerate(parts) if index == last or (last - index) % 4 == 1]


def _places(offer: PullReply, first_block: int, end_block: int) -> _Places:
    groups = [(group.first_block_index, group.block_ids) for group in offer.groups]
    return _Places(offer.generation, first_block, end_block, groups)


class ChunkedReads:
    """Reads what the prefill rank offers, as soon as it does."""

    def __init__(
        self,
        command: StartPull,
        link: PrefillLink,
        setup: PullSetup,
        share: Share,
        log: SpanLog | None = None,
    ) -> None:
        self._log = log
        self.num_bytes = 0
        self.read_s = 0.0
        """Duration of all READs, as exactly as the connector knows."""
        self.ended_at = 0.0
        """Instant at which the last one was over."""
        self._command = command
        self._link = link
        self._setup = setup
        self._share = share
        self._offer: PullReply | None = None
        self._lease: PullReply | None = None
        self._generation: int | None = None
        self._next_block = 0
        """Logical blocks before this one have been read, or are being read."""
        self._reading: Read | None = None
        self._started_at = 0.0
        """Instant at which the latest READ began."""
        self._current: _Chunk | None = None
        self._chunks: list[_Chunk] = []
        """Chunks that are done."""
        self._prepared: tuple[_Places, _Chunk] | None = None
        """The READ of all that is left, for when there is a lease."""

    @property
    def in_flight(self) -> bool:
        """Return whether a READ may still write to the blocks."""
        return self._reading is not None

    @property
    def num_bytes_in_flight(self) -> int:
        """Return the size of the READ that is pending."""
        return 0 if self._current is None else self._num_bytes(self._current)

    @property
    def is_complete(self) -> bool:
        """Return whether all blocks of the lease have been read."""
        return (
            self._lease is not None
            and self._reading is None
            and self._next_block >= len(self._command.block_hashes)
        )

    @property
    def lacks_checksums(self) -> bool:
        """Return whether the prefill rank has yet to state checksums."""
        groups = () if self._lease is None else self._lease.groups
        return self._setup.hasher is not None and any(group.checksums is None for group in groups)

    def offer(self, reply: PullReply) -> None:
        """Take in the latest answer. Raises PullFailed when it is not about this prompt."""
        check_hashes(self._command, reply, self._share.prefill_rank)
        if reply.generation != self._generation:
            # The blocks were withdrawn in between: what was read may be another request's.
            self.forget()
            self._generation = reply.generation
        self._offer = reply
        if reply.leased:
            self._lease = reply

    def state(self, checksums: Sequence[bytes | None]) -> None:
        """Take in the checksums of the leased blocks, by group. Raises PullFailed."""
        lease = self._lease
        if lease is None or len(checksums) != len(lease.groups) or None in checksums:
            raise PullFailed(f"{self._share.prefill_rank} stated no checksums", verification=True)
        pairs = zip(lease.groups, checksums, strict=True)
        groups = [msgspec.structs.replace(group, checksums=stated) for group, stated in pairs]
        self._lease = msgspec.structs.replace(lease, groups=groups)
        # Cut out now, while the last READ moves; ``check`` does it for chunks that begin later.
        for chunk in self._chunks if self._current is None else (*self._chunks, self._current):
            chunk.expected = stated_checksums(groups, self._link.geometry, chunk.plan)

    def wait(self) -> None:
        """Read no more before the next offer."""
        # The generation stays: if the next offer is of the same, what was read still counts.
        self._offer = self._lease = None

    def forget(self) -> None:
        """Count nothing that was read so far."""
        self._chunks.clear()
        self._prepared = None
        self._next_block = self.num_bytes = 0
        # It cannot be taken back. It may go on, but what it brings does not count.
        if self._current is not None:
            self._current.counts = False

    def start(self) -> None:
        """Begin to read, if possible; ``advance`` does the rest. Raises ReadFailed, PullFailed."""
        if self._reading is None:
            self._start_next()

    def advance(self) -> None:
        """Read what can be read now; never waits. Raises ReadFailed, PullFailed."""
        while self._poll() and self._start_next():
            pass
        self._prepare_rest()

    def settle(self) -> None:
        """Release the READ in flight once it is over; no other begins any more."""
        if self._reading is not None and self._reading.poll() != "pending":
            self._release()

    def is_proven(self) -> bool:
        """Return whether all bytes are known to be right. Raises VerificationError when some are
        wrong.
        """
        # A READ may end first: the prefill rank begins its checksums once it has answered.
        if not self.is_complete or self.lacks_checksums:
            return False
        if self._setup.hasher is None:
            return True
        if not all(checksums.ready() for chunk in self._chunks for checksums in chunk.found):
            return False
        assert self._lease is not None
        for chunk in self._chunks:
            chunk.check(self._lease.groups, self._link.geometry)
        return True

    def _start_next(self) -> bool:
        """Begin the next READ. Returns False when there is nothing to read, or nothing yet."""
        offer, link = self._offer, self._link
        # A prefill rank that writes by itself does so only under a lease.
        if offer is None or link.status != "ready" or not (offer.leased or link.reads_early):
            return False
        num_blocks = len(self._command.block_hashes)
        # 0 ............ next_block ............ end ............ num_blocks
        #   read already      │      this READ     │  not ready yet  │
        end = num_blocks if offer.leased else min(num_blocks, offer.num_ready_blocks)
        if end <= self._next_block:
            return False
        # A prepared READ fits only if it is of the same blocks in the same places.
        prepared, self._prepared = self._prepared, None
        chunk = (
            prepared[1]
            if prepared is not None and prepared[0] == _places(offer, self._next_block, end)
            else self._chunk(offer, range(self._next_block, end))
        )
        if not chunk.plan.is_empty:
            try:
                self._reading = link.read(chunk.plan.read)
            except TransferError as error:
                link.reconnect()
                raise ReadFailed(f"{self._share.prefill_rank}: {error}") from error
            self._current, self._started_at = chunk, self._setup.clock()
        # Also when the pull wants none of these blocks, as they were cached here.
        self._next_block = end
        return True

    def _chunk(self, offer: PullReply, blocks: range) -> _Chunk:
        """Plan a READ of what is wanted of ``blocks``, logical indices. Raises PullFailed."""
        plan, hasher = (
            plan_read(self._command, offer, self._link.geometry, self._share, blocks),
            self._setup.hasher,
        )
        if hasher is None or plan.is_empty:
            return _Chunk(plan, None)
        heads = slice(plan.read.local_heads.start, plan.read.local_heads.stop)
        return _Chunk(plan, hasher.prepare(plan.read.local_blocks, heads))

    def _prepare_rest(self) -> None:
        """Prepare the READ of the last blocks while they are computed, so that it begins as soon as
        there is a lease.
        """
        offer, link = self._offer, self._link
        if offer is None or offer.leased or self._prepared is not None or self._reading is not None:
            return
        if link.status != "ready" or not link.reads_early:
            return
        places = _places(offer, self._next_block, len(self._command.block_hashes))
        with contextlib.suppress(TransferError):
            chunk = self._chunk(offer, range(places.first_block, places.end_block))
            if not chunk.plan.is_empty:
                link.prepare(chunk.plan.read)
                self._prepared = places, chunk

    def _poll(self) -> bool:
        """Return False while a READ is pending. Raises ReadFailed."""
        if self._reading is None:
            return True
        chunk = self._current
        assert chunk is not None
        state = self._reading.poll()
        if state == "pending":
            for num_blocks, landed in _worth_hashing(self._reading.parts()):
                chunk.hash_until(num_blocks, landed)
            return False
        self.ended_at = self._setup.clock()
        read_s = self._reading.seconds() if state == "done" else 0.0
        self._note_read(chunk, read_s, state)
        self._release()
        if state == "failed":
            # The next READ begins with the same blocks, unless all of them are read anew anyway.
            if chunk.counts:
                self._next_block = min(span.start for _, span in chunk.plan.spans)
            self._link.reconnect()
            raise ReadFailed(f"READ from {self._share.prefill_rank} failed")
        if chunk.counts:
            self._count(chunk, read_s)
        return True

    def _note_read(self, chunk: _Chunk, read_s: float, state: str) -> None:
        if self._log is not None:
            num_bytes = self._num_bytes(chunk)
            self._log.add(
                "read",
                self._started_at,
                self.ended_at,
                source=self._share.prefill_rank,
                bytes=num_bytes,
                gb_s=round(num_bytes / read_s / 1e9, 3) if read_s else None,
                blocks=len(chunk.plan.read.local_blocks),
                state=state,
            )

    def _count(self, chunk: _Chunk, read_s: float) -> None:
        self.num_bytes += self._num_bytes(chunk)
        self.read_s += read_s
        chunk.hash_until(len(chunk.plan.read.local_blocks))
        self._chunks.append(chunk)

    def _num_bytes(self, chunk: _Chunk) -> int:
        return (
            len(chunk.plan.read.local_blocks)
            * len(chunk.plan.read.local_heads)
            * self._setup.head_bytes
        )

    def _release(self) -> None:
        assert self._reading is not None
        self._link.release(self._reading)
        self._reading = self._current = None
