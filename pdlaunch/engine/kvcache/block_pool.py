"""Owns every KV block of an engine; each move between states is one method.

    free ──┬─ allocate ────────▶ owned ── release by the last owner ──▶ cached, or free
    cached ┤                     │  ▲ ▲
           │         share: one more owner (also cached ▶ owned)
           │                     register: can be found by its hash, is cached afterwards
           └─ allocate_for_pull ─▶ pulling ─┬─ finish_pull ─▶ owned
                                            ├─ drop_pull ───▶ free
                                            └─ quarantine ──▶ quarantined ─ drain ─▶ free

Owners are requests, leases, and copies to host memory that read a block. Pulling means that a
transfer writes to the block, from another engine or from this host's memory.

Cached blocks are free blocks whose content can still be found; the one unused for longest is reused
first. Owners keep the ids of their blocks and give each back exactly once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Counts the owners and holds the hashes of ``num_blocks`` blocks: 0 <= id < num_blocks."""

    def __init__(self, num_blocks: int, num_groups: int) -> None:
        self.num_blocks = num_blocks
        # A stack, low ids on top: a young engine touches few pages of its cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_owners = [0] * num_blocks
        self._pulling: set[int] = set()
        self._quarantined: set[int] = set()
        self._keys: list[tuple[int, bytes] | None] = [None] * num_blocks
        self._by_hash: list[dict[bytes, int]] = [{} for _ in range(num_groups)]

    @property
    def num_free_blocks(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def num_quarantined_blocks(self) -> int:
        return len(self._quarantined)

    def num_owners(self, block_id: int) -> int:
        return self._num_owners[block_id]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks for one owner. The caller has looked at ``num_free_blocks``."""
        block_ids = self._take(num_blocks)
        for block_id in block_ids:
            self._num_owners[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            if not self._num_owners[block_id]:
                del self._cached[block_id]
            self._num_owners[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Take these blocks from one owner; of several free ones, the first is reused first."""
        for block_id in block_ids:
            assert self._num_owners[block_id] > 0
            self._num_owners[block_id] -= 1
            if self._num_owners[block_id]:
                continue
            if self._keys[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached[block_id] = None

    def allocate_for_pull(self, num_blocks: int) -> list[int]:
        """Take blocks that a transfer may write to until one of the next three names them."""
        block_ids = self._take(num_blocks)
        self._pulling.update(block_ids)
        return block_ids

    def finish_pull(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            self._pulling.remove(block_id)
            self._num_owners[block_id] = 1

    def drop_pull(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            # Free, not cached: nobody knows what a transfer that failed has left in it.
            self._pulling.remove(block_id)
            self._free.append(block_id)

    def quarantine(self, block_ids: Iterable[int]) -> None:
        """Set the blocks of an abandoned transfer, which may still write, aside until ``drain``."""
        for block_id in block_ids:
            self._pulling.remove(block_id)
            self._quarantined.add(block_id)

    def drain(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            self._quarantined.remove(block_id)
            self._free.append(block_id)

    def register(self, block_id: int, group: int, block_hash: bytes) -> None:
        """Let an owned block be found by its content, unless another one is found by it already."""
        assert self._num_owners[block_id] > 0
        # Two requests may have computed the same content at once: one copy is enough to be found.
        by_hash = self._by_hash[group]
        if self._keys[block_id] is None and block_hash not in by_hash:
            by_hash[block_hash] = block_id
            self._keys[block_id] = (group, block_hash)

    def find(self, group: int, block_hash: bytes) -> int | None:
        return self._by_hash[group].get(block_hash)

    def forget_cached(self) -> None:
        """Forget all content, as the memory has lost it; blocks that can be found are all free."""
        while self._cached:
            self._free.append(self._take_cached())
        assert not any(self._by_hash)

    def num_cached_among(self, block_ids: Iterable[int]) -> int:
        """Count how many of these blocks ``share`` would take out of the free ones."""
        return sum(block_id in self._cached for block_id in block_ids)

    def check_integrity(
        self,
        *,
        owned: Iterable[int] = (),
        pulling: Iterable[int] = (),
        quarantined: Iterable[int] = (),
    ) -> None:
        """Prove that each block is in one state and that hashes lead to their blocks.

        Given are the ids that all owners and transfers hold, an id once for each of them. Raises
        AssertionError.
        """
        num_owners = [0] * self.num_blocks
        for block_id in owned:
            num_owners[block_id] += 1
        assert num_owners == self._num_owners, "the owners' blocks are not those of the pool"
        assert sorted(pulling) == sorted(self._pulling), "the pulls' blocks are not the pool's"
        assert sorted(quarantined) == sorted(self._quarantined), (
            "the quarantined blocks are not those of the pool"
        )
        in_use = [block_id for block_id, number in enumerate(num_owners) if number]
        places = [*self._free, *self._cached, *in_use, *self._pulling, *self._quarantined]
        assert sorted(places) == list(range(self.num_blocks)), "a block is lost or in two states"
        for block_id, key in enumerate(self._keys):
            if key is None:
                assert block_id not in self._cached
            else:
                assert self._by_hash[key[0]][key[1]] == block_id
                assert block_id in self._cached or num_owners[block_id], (
                    "a hash of a block that may be overwritten"
                )
        assert sum(map(len, self._by_hash)) == sum(key is not None for key in self._keys)

    def _take(self, num_blocks: int) -> list[int]:
        assert num_blocks <= self.num_free_blocks
        # Cached blocks go last, the one unused for longest first, so that content stays findable.
        num_fresh = min(num_blocks, len(self._free))
        return [self._free.pop() for _ in range(num_fresh)] + [
            self._take_cached() for _ in range(num_blocks - num_fresh)
        ]

    def _take_cached(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        key = self._keys[block_id]
        assert key is not None
        del self._by_hash[key[0]][key[1]]
        self._keys[block_id] = None
        return block_id
