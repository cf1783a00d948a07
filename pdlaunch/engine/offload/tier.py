"""Keeps the host tier's record: which host block holds what, which are in use, and which leave when
room is short. No torch, no copies.

    free ── begin_store ──▶ storing ─┬─ finish_store(ok) ──▶ resident ── evict ──▶ free
                                     └─ failed ────────────▶ free
    resident ── begin_load: pins + 1 ──▶ resident ── finish_load: pins - 1
                     a block that failed is found no more, and free when its last pin is gone

Only resident blocks are found. Storing and pinned blocks are in flight: a copy reads or writes
them, so they never leave.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdlaunch.engine.offload.jobs import BlockKey


@dataclass(slots=True)
class _HostBlock:
    key: BlockKey
    is_resident: bool = False
    pins: int = 0
    is_failed: bool = False


class HostTier:
    """Decides over ``num_blocks`` host blocks, by id from 0 on; the least recently used leaves
    first.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        # A stack, low ids on top: little memory is touched while the tier is young.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._blocks: dict[int, _HostBlock] = {}
        self._by_key: OrderedDict[BlockKey, int] = OrderedDict()
        """Storing and resident blocks but for failed ones, the least recently used first."""
        self.num_evicted_blocks = 0
        self.num_refused_blocks = 0
        """Stores for which there was no room: everything was in flight."""

    @property
    def num_used_blocks(self) -> int:
        """Return the number of host blocks that hold something or are in flight."""
        return len(self._blocks)

    def find(self, group: int, block_hash: bytes) -> int | None:
        """Return the resident host block with this content."""
        host_id = self._by_key.get(BlockKey(group, block_hash))
        return host_id if host_id is not None and self._blocks[host_id].is_resident else None

    def begin_store(self, key: BlockKey) -> int | None:
        """Return a host block to write to until ``finish_store``; None when the content is there
        already or being stored, or when there is no room.
        """
        if key in self._by_key:
            return None
        if not self._free:
            oldest = next(filter(self._is_idle, self._by_key.values()), None)
            if oldest is None:
                self.num_refused_blocks += 1
                return None
            self._give_up(oldest)
            self.num_evicted_blocks += 1
        host_id = self._by_key[key] = self._free.pop()
        self._blocks[host_id] = _HostBlock(key)
        return host_id

    def finish_store(self, host_id: int, *, ok: bool) -> None:
        """Record that the copy has ended: the block can be found, or is free."""
        block = self._blocks[host_id]
        assert not block.is_resident
        if ok:
            block.is_resident = True
            self._by_key.move_to_end(block.key)
        else:
            self._give_up(host_id)

    def begin_load(self, host_ids: Sequence[int]) -> None:
        """Pin resident blocks of one prefix, in its order, and count them as used."""
        # The end of a prefix is of no use without its beginning: that counts as used last.
        for host_id in reversed(host_ids):
            block = self._blocks[host_id]
            assert block.is_resident
            assert not block.is_failed
            block.pins += 1
            self._by_key.move_to_end(block.key)

    def finish_load(self, host_ids: Iterable[int], failed_host_ids: Iterable[int] = ()) -> None:
        """Unpin what ``begin_load`` pinned; failed blocks hold wrong bytes and are given up."""
        failed = set(failed_host_ids)
        for host_id in host_ids:
            block = self._blocks[host_id]
            assert block.pins > 0
            block.pins -= 1
            if host_id in failed and not block.is_failed:
                del self._by_key[block.key]
                block.is_failed = True
            # Other loads may still read what has failed: it is free after the last of them.
            if block.is_failed and not block.pins:
                self._release(host_id)

    def check_integrity(self, *, storing: Iterable[int] = (), loading: Iterable[int] = ()) -> None:
        """Prove that every host block is free or used once, pinned as often as ``loading`` says,
        and found only when resident.

        Given are the ids of all stores and loads in flight, an id once for each load. Raises
        AssertionError.
        """
        pins = dict.fromkeys(range(self.num_blocks), 0)
        for host_id in loading:
            pins[host_id] += 1
        assert sorted([*self._free, *self._blocks]) == list(range(self.num_blocks)), (
            "a host block is lost or twice used"
        )
        in_store = [host_id for host_id, block in self._blocks.items() if not block.is_resident]
        assert sorted(in_store) == sorted(storing), "the stores in flight are not those of the tier"
        for host_id, block in self._blocks.items():
            assert block.pins == pins[host_id], "the pins are not those of the loads"
            assert block.is_failed or self._by_key[block.key] == host_id
            assert not block.is_failed or block.pins, "a failed block that nobody loads is not free"
        assert len(self._by_key) == sum(not block.is_failed for block in self._blocks.values())

    def _is_idle(self, host_id: int) -> bool:
        """Return whether no copy reads or writes the block."""
        block = self._blocks[host_id]
        return block.is_resident and not block.pins

    def _give_up(self, host_id: int) -> None:
        del self._by_key[self._blocks[host_id].key]
        self._release(host_id)

    def _release(self, host_id: int) -> None:
        del self._blocks[host_id]
        self._free.append(host_id)
