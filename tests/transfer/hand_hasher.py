"""A hasher as on a GPU: checksums are there some time after they were asked for, when the test says
so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.transfer.integrity.checksum import ChecksumArray, Checksums, KVHasher


class HandChecksums(Checksums):
    """Those ``after`` something are of what is there when they are asked for."""

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


class HandHasher(KVHasher):
    def __init__(self, kv_cache: torch.Tensor, layout: KVCacheLayout) -> None:
        super().__init__(kv_cache, layout)
        self.started: list[HandChecksums] = []

    def start(
        self, block_ids: Sequence[int], heads: slice, after: torch.cuda.Event | None = None
    ) -> Checksums:
        start = super().start
        self.started.append(HandChecksums(lambda: start(block_ids, heads).result(), after))
        return self.started[-1]

    def finish(self) -> None:
        for checksums in self.started:
            checksums.is_ready = True


def stated_checksums(
    kv_cache: torch.Tensor, layout: KVCacheLayout, block_ids: Sequence[int]
) -> bytes:
    """As a holder states them."""
    return KVHasher(kv_cache, layout).start(block_ids, slice(None)).result().astype("<u8").tobytes()
