"""Keeps the host tier's record: which chunk holds what, which are in use, and which leave when room
is short. No torch, no copies.

    free ── begin_store ──▶ storing ─┬─ finish_store(ok) ──▶ resident ── evict ──▶ free
                                     └─ failed ────────────▶ free
    resident ── begin_load: pins + 1 ──▶ resident ── finish_load: pins - 1
                     a chunk that failed is found no more, and free when its last pin is gone

Only resident chunks are found. Storing and pinned chunks are in flight: a copy reads or writes
them, so they never leave.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdlaunch.engine.offload.jobs import ChunkKey


@dataclass(slots=True)
class _Chunk:
    key: ChunkKey
    first_slot: int
    """Slots before it hold nothing: the blocks had left the window when the chunk was stored."""
    is_resident: bool = False
    pins: int = 0
    is_failed: bool = False

    @property
    def is_idle(self) -> bool:  # no copy reads or writes it
        return self.is_resident and not self.pins


class HostTier:
    """Decides over ``num_chunks`` chunks, by id from 0 on; the least recently used leaves first."""

    def __init__(self, num_chunks: int) -> None:
        assert num_chunks > 0
        self.num_chunks = num_chunks
        # A stack, low ids on top: little memory is touched while the tier is young.
        self._free = list(range(num_chunks - 1, -1, -1))
        self._chunks: dict[int, _Chunk] = {}
        self._by_key: OrderedDict[ChunkKey, int] = OrderedDict()
        """Storing and resident chunks but for failed ones, the least recently used first."""
        self.num_evicted_chunks = 0
        self.num_refused_chunks = 0
        """Stores for which there was no room: everything was in flight."""

    @property
    def num_used_chunks(self) -> int:
        """Return the number of chunks that hold something or are in flight."""
        return len(self._chunks)

    def find(self, group: int, block_hash: bytes, slot: int = 0) -> int | None:
        """Return the resident chunk with this last block, if it holds ``slot``."""
        chunk_id = self._by_key.get(ChunkKey(group, block_hash))
        if chunk_id is None:
            return None
        chunk = self._chunks[chunk_id]
        return chunk_id if chunk.is_resident and slot >= chunk.first_slot else None

    def begin_store(self, group: int, block_hash: bytes, first_slot: int = 0) -> int | None:
        """Return a chunk to write to until ``finish_store``; None when the content is there already
        or being stored, or when there is no room.

        A resident chunk that lacks slots which this one has is replaced once nobody loads it.
        """
        key = ChunkKey(group, block_hash)
        if key in self._by_key:
            present = self._chunks[self._by_key[key]]
            if first_slot >= present.first_slot or not present.is_idle:
                return None
            self._give_up(key)
        if not self._free:
            idle = (key for key, chunk_id in self._by_key.items() if self._chunks[chunk_id].is_idle)
            oldest = next(idle, None)
            if oldest is None:
                self.num_refused_chunks += 1
                return None
            self._give_up(oldest)
            self.num_evicted_chunks += 1
        chunk_id = self._by_key[key] = self._free.pop()
        self._chunks[chunk_id] = _Chunk(key, first_slot)
        return chunk_id

    def finish_store(self, chunk_id: int, *, ok: bool) -> None:
        """Record that the copy has ended: the chunk can be found, or is free."""
        chunk = self._chunks[chunk_id]
        assert not chunk.is_resident
        if ok:
            chunk.is_resident = True
            self._by_key.move_to_end(chunk.key)
        else:
            self._give_up(chunk.key)

    def begin_load(self, chunk_ids: Sequence[int]) -> None:
        """Pin resident chunks of one prefix, in its order, and count them as used."""
        # The end of a prefix is of no use without its beginning: that counts as used last.
        for chunk_id in reversed(chunk_ids):
            chunk = self._chunks[chunk_id]
            assert chunk.is_resident
            assert not chunk.is_failed
            chunk.pins += 1
            self._by_key.move_to_end(chunk.key)

    def finish_load(self, chunk_ids: Iterable[int], failed_chunk_ids: Iterable[int] = ()) -> None:
        """Unpin what ``begin_load`` pinned; failed chunks hold wrong bytes and are given up."""
        failed = set(failed_chunk_ids)
        for chunk_id in chunk_ids:
            chunk = self._chunks[chunk_id]
            assert chunk.pins > 0
            chunk.pins -= 1
            if chunk_id in failed and not chunk.is_failed:
                del self._by_key[chunk.key]
                chunk.is_failed = True
            # Other loads may still read what has failed: it is free after the last of them.
            if chunk.is_failed and not chunk.pins:
                self._release(chunk_id)

    def check_integrity(self, *, storing: Iterable[int] = (), loading: Iterable[int] = ()) -> None:
        """Prove that every chunk is free or used once, pinned as often as ``loading`` says, and
        found only when resident.

        Given are the chunk ids of all stores and loads in flight, an id once for each load. Raises
        AssertionError.
        """
        pins = dict.fromkeys(range(self.num_chunks), 0)
        for chunk_id in loading:
            pins[chunk_id] += 1
        assert sorted([*self._free, *self._chunks]) == list(range(self.num_chunks)), (
            "a chunk is lost or twice used"
        )
        in_store = [chunk_id for chunk_id, chunk in self._chunks.items() if not chunk.is_resident]
        assert sorted(in_store) == sorted(storing), "the stores in flight are not those of the tier"
        for chunk_id, chunk in self._chunks.items():
            assert chunk.pins == pins[chunk_id], "the pins are not those of the loads"
            assert chunk.is_failed or self._by_key[chunk.key] == chunk_id
            assert not chunk.is_failed or chunk.pins, "a failed chunk that nobody loads is not free"
        assert len(self._by_key) == sum(not chunk.is_failed for chunk in self._chunks.values())

    def _give_up(self, key: ChunkKey) -> None:
        self._release(self._by_key.pop(key))

    def _release(self, chunk_id: int) -> None:
        del self._chunks[chunk_id]
        self._free.append(chunk_id)
