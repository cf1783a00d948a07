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
from typing import NamedTuple

HIGH_WATER = 0.98
LOW_WATER = 0.95


class HeadSlice(NamedTuple):
    """Names the KV heads of the model that chunks hold: [first, stop)."""

    first: int
    stop: int


class ChunkKey(NamedTuple):
    """Names the content of a chunk."""

    group: int
    block_hash: bytes
    """The hash of the chunk's last block, which covers model, salt and all tokens so far."""
    heads: HeadSlice


@dataclass(slots=True)
class _Chunk:
    key: ChunkKey
    first_slot: int
    """Slots before it hold nothing: the blocks had left the window when the chunk was stored."""
    is_resident: bool = False
    pins: int = 0
    is_failed: bool = False


class HostTier:
    """Decides over ``num_chunks`` chunks of host memory; ids are 0 <= id < num_chunks.

    ``heads``: what its chunks hold of each block. Above ``high_water`` (a share of all chunks) a
    store makes room down to ``low_water``, so that bursts find free chunks while others are in
    flight. The least recently used chunk leaves first.
    """

    def __init__(
        self,
        num_chunks: int,
        heads: HeadSlice,
        *,
        high_water: float = HIGH_WATER,
        low_water: float = LOW_WATER,
    ) -> None:
        assert num_chunks > 0
        assert 0 < low_water <= high_water <= 1
        self.num_chunks = num_chunks
        self._heads = heads
        self._least_used_first: OrderedDict[ChunkKey, None] = OrderedDict()
        self._high_chunks = max(1, int(num_chunks * high_water))
        self._low_chunks = int(num_chunks * low_water)
        # A stack, low ids on top: little memory is touched while the tier is young.
        self._free = list(range(num_chunks - 1, -1, -1))
        self._chunks: dict[int, _Chunk] = {}
        self._by_key: dict[ChunkKey, int] = {}
        self.num_evicted_chunks = 0
        self.num_refused_chunks = 0
        """Stores for which there was no room: everything was in flight."""

    @property
    def num_used_chunks(self) -> int:
        """Return the number of chunks that hold something or are in flight."""
        return len(self._chunks)

    def find(self, group: int, block_hash: bytes, slot: int = 0) -> int | None:
        """Return the resident chunk with this last block if it holds ``slot``; nothing pins it
        before ``begin_load``.
        """
        chunk_id = self._by_key.get(ChunkKey(group, block_hash, self._heads))
        if chunk_id is None:
            return None
        chunk = self._chunks[chunk_id]
        return chunk_id if chunk.is_resident and slot >= chunk.first_slot else None

    def begin_store(self, group: int, block_hash: bytes, first_slot: int = 0) -> int | None:
        """Return a chunk to write to until ``finish_store``; None when the content is there already
        or being stored, or when there is no room.

        A resident chunk that lacks slots which this one has is replaced once nobody loads it.
        """
        key = ChunkKey(group, block_hash, self._heads)
        if not self._may_store(key, first_slot):
            return None
        if not self._free or len(self._chunks) >= self._high_chunks:
            self._make_room()
        if not self._free:
            self.num_refused_chunks += 1
            return None
        chunk_id = self._free.pop()
        self._chunks[chunk_id] = _Chunk(key, first_slot)
        self._by_key[key] = chunk_id
        return chunk_id

    def finish_store(self, chunk_id: int, *, ok: bool) -> None:
        """Record that the copy has ended: the chunk can be found, or is free."""
        chunk = self._chunks[chunk_id]
        assert not chunk.is_resident
        if ok:
            chunk.is_resident = True
            self._least_used_first[chunk.key] = None
        else:
            del self._by_key[chunk.key]
            self._release(chunk_id)

    def begin_load(self, chunk_ids: Sequence[int]) -> None:
        """Pin resident chunks of one prefix, in its order, and count them as used."""
        # The end of a prefix is of no use without its beginning: that counts as used last.
        for chunk_id in reversed(chunk_ids):
            chunk = self._chunks[chunk_id]
            assert chunk.is_resident
            assert not chunk.is_failed
            chunk.pins += 1
            self._least_used_first.move_to_end(chunk.key)

    def finish_load(self, chunk_ids: Iterable[int], failed_chunk_ids: Iterable[int] = ()) -> None:
        """Unpin what ``begin_load`` pinned; failed chunks hold wrong bytes and are given up."""
        failed = set(failed_chunk_ids)
        for chunk_id in chunk_ids:
            chunk = self._chunks[chunk_id]
            assert chunk.pins > 0
            chunk.pins -= 1
            if chunk_id in failed and not chunk.is_failed:
                self._forget(chunk)
                chunk.is_failed = True
            if chunk.is_failed and not chunk.pins:
                self._release(chunk_id)

    def clear(self) -> int:
        """Give up all chunks that are not in flight, and return how many those are."""
        chunk_ids = [
            chunk_id
            for chunk_id, chunk in self._chunks.items()
            if chunk.is_resident and not chunk.pins
        ]
        for chunk_id in chunk_ids:
            self._forget(self._chunks[chunk_id])
            self._release(chunk_id)
        return len(chunk_ids)

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
        findable = {
            chunk.key
            for chunk in self._chunks.values()
            if chunk.is_resident and not chunk.is_failed
        }
        assert len(self._by_key) == len(findable) + len(in_store)
        assert sorted(self._least_used_first) == sorted(findable)

    def _may_store(self, key: ChunkKey, first_slot: int) -> bool:
        chunk_id = self._by_key.get(key)
        if chunk_id is None:
            return True
        chunk = self._chunks[chunk_id]
        # The chunk has all that the new one would have, or a copy writes or reads it.
        if first_slot >= chunk.first_slot or not chunk.is_resident or chunk.pins:
            return False
        self._forget(chunk)
        self._release(chunk_id)
        return True

    def _make_room(self) -> None:
        while len(self._chunks) > self._low_chunks or not self._free:
            chunks = (self._chunks[self._by_key[key]] for key in self._least_used_first)
            chunk = next((chunk for chunk in chunks if not chunk.pins), None)
            if chunk is None:
                return
            chunk_id = self._by_key[chunk.key]
            self._forget(chunk)
            self._release(chunk_id)
            self.num_evicted_chunks += 1

    def _forget(self, chunk: _Chunk) -> None:
        del self._least_used_first[chunk.key]
        del self._by_key[chunk.key]

    def _release(self, chunk_id: int) -> None:
        del self._chunks[chunk_id]
        self._free.append(chunk_id)
