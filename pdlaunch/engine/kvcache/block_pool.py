"""Owns every KV block of an engine; each move between owners is one method.

    free ──┬─ allocate ─▶ owned by r requests and l leases ─ the last owner leaves ─▶ cached or free
    cached ┘                │  ▲  ▲
      │ ▲                   │  │  └─ share: r + 1 (also cached ▶ owned)
      │ └ registered        │  └─ lease: r - 1, l + 1; release: r - 1; end_lease: l - 1
      │                     └─ register: can be found by its hash, is cached afterwards
      └ or free ─ allocate_for_pull ─▶ pulling ─┬─ finish_pull ─▶ owned by one request
                                                ├─ drop_pull ───▶ free
                                                └─ quarantine ──▶ quarantined ─ drain ─▶ free

A copy that reads a block holds it as well: ``hold`` beside its owners, ``unhold`` when it has
ended; as long as it is held, the block is not free. Pulling means: a transfer writes to it, be it
from another engine or from this host's memory.

Cached blocks are free blocks whose content can still be found; the one unused for longest is reused
first. Blocks know nothing of requests: their owners keep the ids and give each one back exactly
once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Counts the owners and holds the hashes of ``num_blocks`` blocks; ids are 0 <= id <
    num_blocks.
    """

    def __init__(self, num_blocks: int, num_groups: int) -> None:
        self.num_blocks = num_blocks
        # A stack, low ids on top: a young engine touches few pages of its cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        # All three by block id. A block has an owner while one of them is not zero.
        self._num_requests = [0] * num_blocks
        self._num_leases = [0] * num_blocks
        self._num_holds = [0] * num_blocks
        self._num_leased_blocks = 0
        self._pulling: set[int] = set()
        self._quarantined: set[int] = set()
        self._keys: list[tuple[int, bytes] | None] = [None] * num_blocks
        self._by_hash: list[dict[bytes, int]] = [{} for _ in range(num_groups)]

    @property
    def num_free_blocks(self) -> int:
        """Return how many blocks ``allocate`` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_leased_blocks(self) -> int:
        """Return how many blocks have at least one lease; requests may share them."""
        return self._num_leased_blocks

    @property
    def num_quarantined_blocks(self) -> int:
        return len(self._quarantined)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks for one request. The caller has looked at ``num_free_blocks``."""
        block_ids = self._take(num_blocks)
        for block_id in block_ids:
            self._num_requests[block_id] = 1
        return block_ids

    def allocate_for_pull(self, num_blocks: int) -> list[int]:
        """Take blocks that a transfer may write to until ``finish_pull``, ``drop_pull`` or
        ``quarantine`` names them.
        """
        block_ids = self._take(num_blocks)
        self._pulling.update(block_ids)
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Let one more request own these registered blocks."""
        for block_id in block_ids:
            assert self._keys[block_id] is not None
            # Registered and without an owner: it is cached, and counts as free until now.
            if self._is_unowned(block_id):
                del self._cached[block_id]
            self._num_requests[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Take these blocks from one request; of several free ones, the first is reused first."""
        for block_id in block_ids:
            assert self._num_requests[block_id] > 0
            self._num_requests[block_id] -= 1
            self._free_if_unowned(block_id)

    def lease(self, block_ids: Iterable[int]) -> None:
        """Turn what one request owned into a lease."""
        for block_id in block_ids:
            assert self._num_requests[block_id] > 0
            # Not by ``release``: a block without owner would be free before the lease has it.
            self._num_requests[block_id] -= 1
            self._num_leases[block_id] += 1
            self._num_leased_blocks += self._num_leases[block_id] == 1

    def end_lease(self, block_ids: Iterable[int]) -> None:
        """End one lease on these blocks."""
        for block_id in block_ids:
            assert self._num_leases[block_id] > 0
            self._num_leases[block_id] -= 1
            self._num_leased_blocks -= self._num_leases[block_id] == 0
            self._free_if_unowned(block_id)

    def hold(self, block_ids: Iterable[int]) -> None:
        """Keep the content of these owned blocks for a copy until ``unhold``, whatever their owners
        do.
        """
        for block_id in block_ids:
            assert not self._is_unowned(block_id)
            self._num_holds[block_id] += 1

    def unhold(self, block_ids: Iterable[int]) -> None:
        """End one copy that read these blocks."""
        for block_id in block_ids:
            assert self._num_holds[block_id] > 0
            self._num_holds[block_id] -= 1
            self._free_if_unowned(block_id)

    def has_only_held(self, block_ids: Iterable[int]) -> bool:
        """Return whether one of these blocks waits for nothing but the end of copies."""
        return any(
            self._num_holds[block_id]
            and not (self._num_requests[block_id] or self._num_leases[block_id])
            for block_id in block_ids
        )

    def finish_pull(self, block_ids: Iterable[int]) -> None:
        """Give the blocks of a transfer that has succeeded to one request."""
        for block_id in block_ids:
            self._pulling.remove(block_id)
            self._num_requests[block_id] = 1

    def drop_pull(self, block_ids: Iterable[int]) -> None:
        """Free the blocks of a transfer that has ended without an owner for them."""
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
        """Free quarantined blocks to which nothing can write any more."""
        for block_id in block_ids:
            self._quarantined.remove(block_id)
            self._free.append(block_id)

    def register(self, block_id: int, group: int, block_hash: bytes) -> None:
        """Let an owned block be found by its content.

        Where the cache has the content already, the block stays unregistered.
        """
        assert not self._is_unowned(block_id)
        # Two requests may have computed the same content at once: one copy is enough to be found.
        by_hash = self._by_hash[group]
        if self._keys[block_id] is None and block_hash not in by_hash:
            by_hash[block_hash] = block_id
            self._keys[block_id] = (group, block_hash)

    def find(self, group: int, block_hash: bytes) -> int | None:
        """Return the block that holds this content for ``group``; it stays where it is until
        ``share``.
        """
        return self._by_hash[group].get(block_hash)

    def forget_cached(self) -> None:
        """Forget all content, as the memory has lost it; blocks that can be found are all free."""
        while self._cached:
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
            self._free.append(block_id)
        assert not any(self._by_hash)

    def num_cached_among(self, block_ids: Iterable[int]) -> int:
        """Count how many of these blocks ``share`` would take out of the free ones."""
        return sum(block_id in self._cached for block_id in block_ids)

    def check_integrity(
        self,
        *,
        owned: Iterable[int] = (),
        leased: Iterable[int] = (),
        held: Iterable[int] = (),
        pulling: Iterable[int] = (),
        quarantined: Iterable[int] = (),
    ) -> None:
        """Prove that every block has one kind of owner and that hashes lead to their blocks.

        Given are the ids that all requests, leases, copies and transfers hold, an id once for each
        holder. Raises AssertionError.
        """
        num_requests, num_leases, num_holds = ([0] * self.num_blocks for _ in range(3))
        for block_id in owned:
            num_requests[block_id] += 1
        for block_id in leased:
            num_leases[block_id] += 1
        for block_id in held:
            num_holds[block_id] += 1
        assert num_requests == self._num_requests, (
            "the requests' blocks are not those of the pool's counts"
        )
        assert num_leases == self._num_leases, (
            "the leases' blocks are not those of the pool's counts"
        )
        assert num_holds == self._num_holds, "the copies' blocks are not those of the pool's counts"
        assert sorted(pulling) == sorted(self._pulling), (
            "the pulls' blocks are not those of the pool"
        )
        assert sorted(quarantined) == sorted(self._quarantined), (
            "the quarantined blocks are not those of the pool"
        )
        self._check_partition()
        self._check_hashes()

    def _check_partition(self) -> None:
        in_use = [block_id for block_id in range(self.num_blocks) if not self._is_unowned(block_id)]
        places = [*self._free, *self._cached, *in_use, *self._pulling, *self._quarantined]
        assert sorted(places) == list(range(self.num_blocks)), (
            "a block is lost or has two kinds of owners"
        )
        assert self._num_leased_blocks == sum(map(bool, self._num_leases))

    def _check_hashes(self) -> None:
        for block_id, key in enumerate(self._keys):
            if key is not None:
                assert self._by_hash[key[0]][key[1]] == block_id
                assert block_id in self._cached or not self._is_unowned(block_id), (
                    "a hash of a block that may be overwritten"
                )
            else:
                assert block_id not in self._cached
        assert sum(map(len, self._by_hash)) == sum(key is not None for key in self._keys)

    def _take(self, num_blocks: int) -> list[int]:
        assert num_blocks <= self.num_free_blocks
        # Cached blocks go last, the one unused for longest first, so that content stays findable.
        num_fresh = min(num_blocks, len(self._free))
        block_ids = [self._free.pop() for _ in range(num_fresh)]
        for _ in range(num_blocks - num_fresh):
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
            block_ids.append(block_id)
        return block_ids

    def _forget(self, block_id: int) -> None:
        key = self._keys[block_id]
        assert key is not None
        del self._by_hash[key[0]][key[1]]
        self._keys[block_id] = None

    def _is_unowned(self, block_id: int) -> bool:
        return not (
            self._num_requests[block_id] or self._num_leases[block_id] or self._num_holds[block_id]
        )

    def _free_if_unowned(self, block_id: int) -> None:
        if not self._is_unowned(block_id):
            return
        if self._keys[block_id] is None:
            self._free.append(block_id)
        else:
            self._cached[block_id] = None
