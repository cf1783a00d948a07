"""The worker of one rank: bytes go out and come back proven, or the load fails."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from pdlaunch.engine.kvcache.groups import KVCacheGroup, KVCacheLayout
from pdlaunch.engine.offload.planner import (
    BlockKey,
    JobFinished,
    OffloadJob,
)
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.errors import ConfigError
from pdlaunch.transfer.integrity.checksum import KVHasher
from pdlaunch.transfer.regions import native_regions
from tests.engine.offload.test_copies import gpu

NUM_BLOCKS = 16


def make_layout(*, head_dim: int = 4, block_size: int = 4) -> KVCacheLayout:
    groups = tuple(KVCacheGroup((index,), window) for index, window in enumerate([None, 9]))
    return KVCacheLayout(
        groups, num_kv_heads=2, head_dim=head_dim, block_size=block_size, dtype_bytes=2
    )


class Rank:
    def __init__(self, where: str, num_host_blocks: int = 12) -> None:
        """``where`` checksums are computed: on the ``host``, where the KV cache lies (``device``,
        on the CPU here), or on a GPU (``cuda``), whose kernel needs larger blocks.
        """
        torch.set_num_threads(1)
        is_cuda = where == "cuda"
        self.layout = make_layout(head_dim=64, block_size=16) if is_cuda else make_layout()
        self.kv_cache = torch.zeros(
            (NUM_BLOCKS, *self.layout.block_shape()),
            dtype=torch.bfloat16,
            device="cuda" if is_cuda else "cpu",
        )
        self.blocks = self.kv_cache.view(torch.uint8).view(NUM_BLOCKS, -1)
        self.wakes = threading.Semaphore(0)
        self.worker = OffloadWorker(
            kv_cache=self.kv_cache,
            layout=self.layout,
            host_memory_bytes=num_host_blocks * -(-self.layout.block_bytes // 4096) * 4096,
            device_hasher=None
            if where == "host"
            else KVHasher(native_regions(self.kv_cache, self.layout)),
            wake=self.wakes.release,
        )

    def fill(self, block_id: int, seed: int) -> torch.Tensor:
        source = torch.Generator().manual_seed(seed)
        size = self.blocks.shape[1:]
        self.blocks[block_id] = torch.randint(0, 256, size, dtype=torch.uint8, generator=source)
        return self.blocks[block_id].clone()

    def run(self, *jobs: OffloadJob) -> list[JobFinished]:
        self.worker.submit(jobs)
        found: list[JobFinished] = []
        while len(found) < len(jobs):
            assert self.wakes.acquire(timeout=60)
            found += self.worker.take_finished()
        return found


@contextmanager
def open_rank(where: str = "host") -> Iterator[Rank]:
    rank = Rank(where)
    yield rank
    rank.worker.close()


STORE = OffloadJob(1, "store", [3, 4, 9], [2, 0, 7], [BlockKey(0, b"a"), (0, b"b"), (1, b"c")])  # type: ignore[list-item]
LOAD = replace(STORE, job_id=2, direction="load", block_ids=[10, 11, 12])


@pytest.mark.parametrize("where", ["host", "device", gpu])
def test_bytes_come_back_and_those_that_changed_on_the_host_are_found(where: str) -> None:
    with open_rank(where) as rank:
        contents = torch.stack([rank.fill(block_id, block_id) for block_id in STORE.block_ids])
        assert rank.run(STORE)[0].ok
        (loaded,) = rank.run(LOAD)
        assert loaded.ok, loaded.error
        assert loaded.num_bytes == 3 * rank.layout.block_bytes
        assert torch.equal(rank.blocks[LOAD.block_ids], contents)
        rank.worker.host.block(0)[-1] ^= 1
        (loaded,) = rank.run(LOAD)
        assert (loaded.ok, loaded.failed_host_ids) == (False, [0])
        assert "checksums of host blocks [0] have changed" in loaded.error


def test_a_block_with_other_content_is_not_loaded() -> None:
    with open_rank() as rank:
        rank.run(STORE)
        before = rank.blocks.clone()
        # The group is part of what a block holds.
        (loaded,) = rank.run(replace(LOAD, keys=[STORE.keys[0], (0, b"other"), (0, b"c")]))  # type: ignore[list-item]
        assert (loaded.ok, loaded.failed_host_ids) == (False, [0, 7])
        assert torch.equal(rank.blocks, before)


def test_host_memory_for_less_than_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="is smaller than one block of 4096 bytes") as caught:
        Rank("host", num_host_blocks=0)
    assert caught.value.field == "kv_offload.host_memory"
