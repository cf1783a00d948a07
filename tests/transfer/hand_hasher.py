"""A hasher as on a GPU: checksums are there some time after they were asked for, when the test says
so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.transfer.integrity.checksum import ChecksumArray, Checksums, HashBatch, KVHasher


class HandChecksums:
    def __init__(
        self, compute: Callable[[], ChecksumArray], after: torch.cuda.Event | None
    ) -> None:
        self._compute = compute
        self.after = after
        self.is_ready = False
        if after is None:
            assert self.values.size, "of what is there now"

    @cached_property
    def values(self) -> ChecksumArray:
        return self._compute()

    def ready(self) -> bool:
        return self.is_ready

    def result(self) -> ChecksumArray:
        assert self.is_ready, "nobody may wait here"
        return self.values


class HandBatch:
    def __init__(self, batch: HashBatch, started: list[HandChecksums]) -> None:
        self._batch = batch
        self._started = started

    def start(self, blocks: slice, after: torch.cuda.Event | None = None) -> Checksums:
        """Those ``after`` something are of what is there when they are asked for."""
        self._started.append(HandChecksums(lambda: self._batch.start(blocks).result(), after))
        return self._started[-1]


class HandHasher(KVHasher):
    def __init__(self, kv_cache: torch.Tensor, layout: KVCacheLayout) -> None:
        super().__init__(kv_cache, layout)
        self.started: list[HandChecksums] = []

    def prepare(self, block_ids: Sequence[int], heads: slice) -> HashBatch:
        return HandBatch(super().prepare(block_ids, heads), self.started)

    def finish(self) -> None:
        for checksums in self.started:
            checksums.is_ready = True


def stated_checksums(
    kv_cache: torch.Tensor, layout: KVCacheLayout, block_ids: Sequence[int]
) -> bytes:
    """As a holder states them."""
    return KVHasher(kv_cache, layout).start(block_ids, slice(None)).result().astype("<u8").tobytes()
