"""The worker of one rank on a CPU: bytes go out and come back proven, or the load fails."""

from __future__ import annotations

import threading

import msgspec
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdlaunch.engine.kvcache.groups import KVCacheGroup, KVCacheLayout
from pdlaunch.engine.kvcache.manager import BlockTables
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from pdlaunch.engine.offload.planner import OffloadPlanner
from pdlaunch.engine.offload.tier import HeadSlice, HostTier
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.errors import ConfigError
from pdlaunch.transfer.integrity.checksum import KVHasher

HEADS = HeadSlice(2, 4)
NUM_BLOCKS = 16


def make_layout(windows: list[int | None] | None = None) -> KVCacheLayout:
    groups = tuple(
        KVCacheGroup((index,), window) for index, window in enumerate(windows or [None, 9])
    )
    return KVCacheLayout(groups, num_kv_heads=2, head_dim=4, block_size=4, dtype_bytes=2)


class Rank:
    """A worker and the KV cache that it serves."""

    def __init__(
        self,
        *,
        blocks_per_chunk: int = 1,
        verify: bool = True,
        num_chunks: int = 12,
        on_device: bool = False,
    ) -> None:
        """``on_device``: checksums are computed where the KV cache lies, as on a GPU."""
        torch.set_num_threads(1)
        self.layout = make_layout()
        self.kv_cache = torch.zeros((NUM_BLOCKS, *self.layout.block_shape()), dtype=torch.bfloat16)
        self.wakes = threading.Semaphore(0)
        self.worker = OffloadWorker(
            kv_cache=self.kv_cache,
            layout=self.layout,
            heads=HEADS,
            host_memory_bytes=num_chunks * 4096,
            blocks_per_chunk=blocks_per_chunk,
            verify=verify,
            device_hasher=KVHasher(self.kv_cache, self.layout) if on_device else None,
            progress=lambda *_: None,
            wake=self.wakes.release,
        )

    def fill(self, block_id: int, seed: int) -> torch.Tensor:
        """Write to a block what ``seed`` stands for, and return it."""
        content = torch.randn(
            self.layout.block_shape(), generator=torch.Generator().manual_seed(seed)
        ).bfloat16()
        self.kv_cache[block_id] = content
        return content

    def run(self, *jobs: OffloadJob) -> list[JobFinished]:
        self.worker.submit(jobs)
        return self.wait(len(jobs))

    def wait(self, count: int) -> list[JobFinished]:
        found: list[JobFinished] = []
        while len(found) < count:
            assert self.wakes.acquire(timeout=60)
            found += self.worker.take_finished()
        return found


def store_of(job_id: int = 1) -> OffloadJob:
    return OffloadJob(job_id, "store", [3, 4, 9], [2, 1], [0, 5], [2, 0, 7], [b"a", b"b", b"c"])


def load_of(job_id: int = 2, hashes: tuple[bytes, ...] = (b"a", b"b", b"c")) -> OffloadJob:
    return OffloadJob(job_id, "load", [10, 11, 12], [2, 1], [0, 5], [2, 0, 7], list(hashes))


on_either = pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])


@on_either
@pytest.mark.parametrize("verify", [True, False])
def test_blocks_come_back_as_they_were(verify: bool, on_device: bool) -> None:
    rank = Rank(verify=verify, on_device=on_device)
    contents = [rank.fill(block_id, block_id) for block_id in (3, 4, 9)]
    (stored,) = rank.run(store_of())
    assert stored.ok
    assert stored.num_bytes == 3 * rank.layout.block_bytes
    (loaded,) = rank.run(load_of())
    assert loaded.ok, loaded.error
    for block_id, content in zip((10, 11, 12), contents, strict=True):
        assert torch.equal(rank.kv_cache[block_id], content)
    assert rank.worker.num_jobs == 0
    rank.worker.close()


@on_either
def test_checksums_are_those_that_a_pull_compares(on_device: bool) -> None:
    rank = Rank(on_device=on_device)
    rank.fill(3, 1)
    rank.run(store_of())
    expected = KVHasher(rank.kv_cache, rank.layout).checksums([3], slice(None))
    assert rank.worker.checksums(2) == [tuple(expected[0])]
    assert rank.worker.checksums(5) is None
    rank.worker.close()


@on_either
def test_bytes_that_changed_on_the_host_are_found(on_device: bool) -> None:
    rank = Rank(on_device=on_device)
    rank.fill(4, 1)
    rank.run(store_of())
    rank.worker._host.chunk(0)[17] ^= 1
    (loaded,) = rank.run(load_of())
    assert (loaded.ok, loaded.failed_chunk_ids) == (False, [0])
    assert "host chunks [0] have other checksums" in loaded.error
    rank.worker.close()


def test_a_chunk_with_other_content_is_not_loaded() -> None:
    rank = Rank()
    rank.run(store_of())
    before = rank.kv_cache.clone()
    (loaded,) = rank.run(load_of(hashes=(b"a", b"other", b"c")))
    assert (loaded.ok, loaded.failed_chunk_ids) == (False, [0])
    assert torch.equal(rank.kv_cache, before)
    # The group is part of what a chunk holds.
    (swapped,) = rank.run(OffloadJob(3, "load", [10], [0, 1], [0, 5], [2], [b"a"]))
    assert (swapped.ok, swapped.failed_chunk_ids) == (False, [2])
    rank.worker.close()


@on_either
def test_a_load_from_inside_a_chunk_compares_only_what_it_reads(on_device: bool) -> None:
    rank = Rank(blocks_per_chunk=3, on_device=on_device)
    contents = [rank.fill(block_id, block_id) for block_id in (1, 2, 3, 4, 5)]
    (stored,) = rank.run(
        OffloadJob(1, "store", [1, 2, 3, 4, 5], [5, 0], [1, 0], [4, 2], [b"a", b"b"])
    )
    assert stored.ok
    rank.worker._host.chunk(4)[rank.layout.block_bytes] ^= 1
    (loaded,) = rank.run(OffloadJob(2, "load", [8, 9], [2, 0], [2, 0], [4, 2], [b"a", b"b"]))
    assert loaded.ok, loaded.error
    assert torch.equal(rank.kv_cache[8], contents[1])
    assert torch.equal(rank.kv_cache[9], contents[2])
    (missing,) = rank.run(OffloadJob(3, "load", [8, 9], [2, 0], [0, 0], [4], [b"a"]))
    assert (missing.ok, missing.failed_chunk_ids) == (False, [4])
    rank.worker.close()


def test_a_job_that_does_not_fit_is_told_and_harms_nothing() -> None:
    rank = Rank()
    (wrong,) = rank.run(OffloadJob(1, "store", [3], [2, 0], [0, 0], [1, 2], [b"a", b"b"]))
    assert not wrong.ok
    assert "group 0 needs 2 block_ids, 1 are left for it" in wrong.error
    (unequal,) = rank.run(OffloadJob(2, "store", [3], [1, 0], [0, 0], [1], []))
    assert "1 chunk_ids and 0 chunk_hashes" in unequal.error
    assert rank.run(store_of(3))[0].ok
    rank.worker.close()


def test_host_memory_that_is_too_small_or_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds no chunk of 4096 bytes") as error:
        Rank(num_chunks=0)
    assert error.value.field == "kv_offload.host_memory"
    with pytest.raises(ConfigError, match="this machine has"):
        HostMemory(2**40, 4096, pin=False, progress=lambda *_: None)


def test_jobs_and_reports_travel_in_messages() -> None:
    job, report = store_of(), JobFinished(1, False, "wrong", [3], 10, 0.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(job), type=OffloadJob) == job
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=JobFinished) == report


class EngineMachine(RuleBasedStateMachine):
    """Requests of a few documents are computed, stored, forgotten by the device and loaded back,
    with a small tier.

    A block's content is a function of its group and hash. Whatever a load says is right must be.
    """

    NUM_LOGICAL = 4

    @initialize(
        blocks_per_chunk=st.integers(1, 3), num_chunks=st.integers(2, 9), on_device=st.booleans()
    )
    def start(self, blocks_per_chunk: int, num_chunks: int, on_device: bool) -> None:
        self.rank = Rank(
            blocks_per_chunk=blocks_per_chunk, num_chunks=num_chunks, on_device=on_device
        )
        tier = HostTier(self.rank.worker.num_chunks, HEADS)
        self.planner = OffloadPlanner(
            self.rank.layout.groups, 4, tier, blocks_per_chunk=blocks_per_chunk
        )
        self.contents: dict[int, torch.Tensor] = {}

    def teardown(self) -> None:
        if hasattr(self, "rank"):
            self.rank.worker.close()

    @rule(document=st.integers(0, 3), start=st.integers(0, 3), corrupts=st.booleans())
    def compute_and_store(self, document: int, start: int, corrupts: bool) -> None:
        tables = BlockTables(2)
        tables.append([0, 1], [[0, 1, 2, 3], [4, 5, 6]])
        for group, ids in enumerate(tables.block_ids):
            for index, block_id in enumerate(ids, tables.first[group]):
                self.rank.fill(block_id, self._seed(group, document, index))
        jobs = self.planner.begin_stores(tables, self._hashes(document), start, self.NUM_LOGICAL)
        self.planner.check_integrity()
        for report in self.rank.run(*jobs):
            assert report.ok
            self.planner.finish(report)
        if corrupts and jobs:
            self.rank.worker._host.chunk(jobs[0].chunk_ids[0])[3] ^= 255

    @rule(document=st.integers(0, 3), max_blocks=st.integers(0, 4))
    def load(self, document: int, max_blocks: int) -> None:
        hit = self.planner.find(self._hashes(document), max_blocks, lambda _group, _hash: None)
        if hit is None:
            return
        block_ids = [
            list(range(8 + 4 * group, 8 + 4 * group + hit.num_blocks_to_load(group)))
            for group in range(2)
        ]
        (report,) = self.rank.run(self.planner.begin_load(hit, block_ids, self._hashes(document)))
        self.planner.finish(report)
        assert report.ok or report.failed_chunk_ids
        for group, ids in enumerate(block_ids if report.ok else []):
            for index, block_id in enumerate(ids, hit.device.end(group)):
                expected = self.rank.fill(7, self._seed(group, document, index))
                assert torch.equal(self.rank.kv_cache[block_id], expected)

    @precondition(lambda self: hasattr(self, "planner"))
    @invariant()
    def is_sound(self) -> None:
        self.planner.check_integrity()
        assert self.rank.worker.num_jobs == 0

    def _hashes(self, document: int) -> list[bytes]:
        return [bytes([document, index]) for index in range(self.NUM_LOGICAL)]

    def _seed(self, group: int, document: int, index: int) -> int:
        return 100 * group + 10 * document + index


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)
