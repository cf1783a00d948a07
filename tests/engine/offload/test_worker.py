"""The worker of one rank: bytes go out and come back proven, or the load fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdlaunch.engine.kvcache.groups import KVCacheGroup, KVCacheLayout
from pdlaunch.engine.kvcache.manager import BlockTables
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.jobs import Direction, JobFinished, OffloadJob
from pdlaunch.engine.offload.planner import OffloadPlanner
from pdlaunch.engine.offload.tier import HostTier
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.errors import ConfigError
from pdlaunch.transfer.integrity.checksum import KVHasher
from tests.engine.offload.test_copies import gpu

NUM_BLOCKS = 16
NUM_CHUNKS = 12


def make_layout(*, head_dim: int = 4, block_size: int = 4) -> KVCacheLayout:
    groups = tuple(KVCacheGroup((index,), window) for index, window in enumerate([None, 9]))
    return KVCacheLayout(
        groups, num_kv_heads=2, head_dim=head_dim, block_size=block_size, dtype_bytes=2
    )


class Rank:
    """A worker and the KV cache that it serves."""

    def __init__(
        self, where: str = "host", *, blocks_per_chunk: int = 1, num_chunks: int = NUM_CHUNKS
    ) -> None:
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
        chunk_bytes = -(-blocks_per_chunk * self.layout.block_bytes // 4096) * 4096
        self.worker = OffloadWorker(
            kv_cache=self.kv_cache,
            layout=self.layout,
            host_memory_bytes=num_chunks * chunk_bytes,
            blocks_per_chunk=blocks_per_chunk,
            device_hasher=None if where == "host" else KVHasher(self.kv_cache, self.layout),
            progress=lambda *_: None,
            wake=self.wakes.release,
        )

    def fill(self, block_id: int, seed: int) -> torch.Tensor:
        """Write to a block what ``seed`` stands for, and return it."""
        source = torch.Generator().manual_seed(seed)
        size = self.blocks.shape[1:]
        content = torch.randint(0, 256, size, dtype=torch.uint8, generator=source)
        self.blocks[block_id] = content
        return content

    def run(self, *jobs: OffloadJob) -> list[JobFinished]:
        self.worker.submit(jobs)
        found: list[JobFinished] = []
        while len(found) < len(jobs):
            assert self.wakes.acquire(timeout=60)
            found += self.worker.take_finished()
        return found

    def host_content(self) -> torch.Tensor:
        return torch.stack([self.worker.chunk(index) for index in range(self.worker.num_chunks)])


@contextmanager
def open_rank(where: str = "host", *, blocks_per_chunk: int = 1) -> Iterator[Rank]:
    rank = Rank(where, blocks_per_chunk=blocks_per_chunk)
    yield rank
    rank.worker.close()


def job_of(
    direction: Direction = "store",
    block_ids: tuple[int, ...] = (3, 4, 9),
    group_sizes: tuple[int, ...] = (2, 1),
    block_indices: tuple[int, ...] = (0, 5),
    chunk_ids: tuple[int, ...] = (2, 0, 7),
    chunk_hashes: tuple[bytes, ...] = (b"a", b"b", b"c"),
) -> OffloadJob:
    lists = (block_ids, group_sizes, block_indices, chunk_ids)
    return OffloadJob(1, direction, *([*each] for each in lists), [*chunk_hashes])


LOAD = job_of("load", (10, 11, 12))

anywhere = pytest.mark.parametrize("where", ["host", "device", gpu])


@st.composite
def stores(draw: st.DrawFn, blocks_per_chunk: int) -> OffloadJob:
    sizes = [draw(st.integers(0, 6)) for _ in range(2)]
    indices = [draw(st.integers(0, 3 * blocks_per_chunk)) for _ in range(2)]
    num_chunks = sum(
        len({block // blocks_per_chunk for block in range(first, first + size)})
        for size, first in zip(sizes, indices, strict=True)
    )
    blocks = draw(st.permutations(range(NUM_BLOCKS)))[: sum(sizes)]
    chunks = draw(st.permutations(range(NUM_CHUNKS)))[:num_chunks]
    hashes = [bytes([chunk]) for chunk in range(num_chunks)]
    return OffloadJob(1, "store", blocks, sizes, indices, chunks, hashes)


def model_copy(
    job: OffloadJob, blocks_per_chunk: int, blocks: torch.Tensor, chunks: torch.Tensor
) -> None:
    """Copy block by block: logical block i lies in slot i % blocks_per_chunk of its chunk."""
    block_ids, chunk_ids, size = iter(job.block_ids), iter(job.chunk_ids), blocks.shape[1]
    for count, first in zip(job.group_sizes, job.block_indices, strict=True):
        chunk_id = -1
        for logical in range(first, first + count):
            slot = logical % blocks_per_chunk
            if logical == first or slot == 0:
                chunk_id = next(chunk_ids)
            block = blocks[next(block_ids)]
            part = chunks[chunk_id, slot * size : (slot + 1) * size]
            if job.direction == "store":
                part.copy_(block)
            else:
                block.copy_(part)


@anywhere
@settings(deadline=None, max_examples=30)
@given(data=st.data(), blocks_per_chunk=st.integers(1, 5))
def test_random_jobs_move_the_bytes_of_the_model(
    where: str, data: st.DataObject, blocks_per_chunk: int
) -> None:
    store = data.draw(stores(blocks_per_chunk))
    targets = data.draw(st.permutations(range(NUM_BLOCKS)))[: len(store.block_ids)]
    with open_rank(where, blocks_per_chunk=blocks_per_chunk) as rank:
        rank.blocks.random_(0, 256)
        blocks, chunks = rank.blocks.cpu().clone(), rank.host_content()
        for job in (store, replace(store, job_id=2, direction="load", block_ids=targets)):
            model_copy(job, blocks_per_chunk, blocks, chunks)
            (report,) = rank.run(job)
            assert report.ok, report.error
            assert report.num_bytes == len(job.block_ids) * rank.layout.block_bytes
        assert torch.equal(rank.blocks.cpu(), blocks)
        assert torch.equal(rank.host_content(), chunks)


@anywhere
def test_bytes_that_changed_on_the_host_are_found(where: str) -> None:
    with open_rank(where) as rank:
        rank.fill(4, 1)
        rank.run(job_of())
        rank.worker.chunk(0)[17] ^= 1
        (loaded,) = rank.run(LOAD)
        assert (loaded.ok, loaded.failed_chunk_ids) == (False, [0])
        assert "host chunks [0] have other checksums" in loaded.error


def test_a_chunk_with_other_content_is_not_loaded() -> None:
    with open_rank() as rank:
        rank.run(job_of())
        before = rank.blocks.clone()
        (loaded,) = rank.run(replace(LOAD, chunk_hashes=[b"a", b"other", b"c"]))
        assert (loaded.ok, loaded.failed_chunk_ids) == (False, [0])
        assert torch.equal(rank.blocks, before)
        # The group is part of what a chunk holds.
        (swapped,) = rank.run(job_of("load", (10,), (0, 1), (0, 5), (2,), (b"a",)))
        assert (swapped.ok, swapped.failed_chunk_ids) == (False, [2])


@anywhere
def test_a_load_from_inside_a_chunk_compares_only_what_it_reads(where: str) -> None:
    with open_rank(where, blocks_per_chunk=3) as rank:
        contents = [rank.fill(block_id, block_id) for block_id in (1, 2, 3, 4, 5)]
        chunks = {"chunk_ids": (4, 2), "chunk_hashes": (b"a", b"b")}
        (stored,) = rank.run(job_of("store", (1, 2, 3, 4, 5), (5, 0), (1, 0), **chunks))  # type: ignore[arg-type]
        assert stored.ok
        rank.worker.chunk(4)[rank.layout.block_bytes] ^= 1
        (loaded,) = rank.run(job_of("load", (8, 9), (2, 0), (2, 0), **chunks))  # type: ignore[arg-type]
        assert loaded.ok, loaded.error
        assert torch.equal(rank.blocks[8].cpu(), contents[1])
        assert torch.equal(rank.blocks[9].cpu(), contents[2])
        (missing,) = rank.run(job_of("load", (8, 9), (2, 0), (0, 0), (4,), (b"a",)))
        assert (missing.ok, missing.failed_chunk_ids) == (False, [4])


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (job_of(block_ids=(3, 4)), "block_ids has 2 entries, group_sizes need 3"),
        (job_of(chunk_ids=(2, 0)), "chunk_ids has 2 entries, group_sizes and block_indices need 3"),
        (job_of(chunk_hashes=()), "chunk_hashes has 0 entries, chunk_ids need 3"),
        (job_of(group_sizes=(3,)), "group_sizes has 1 entries, the groups of the KV cache need 2"),
        (job_of(block_indices=()), "block_indices has 0 entries, the groups of the KV cache"),
        (job_of(group_sizes=(3, -2)), "group_sizes has -2, the least is 0"),
        (job_of(block_indices=(-1, 6)), "block_indices has -1, the least is 0"),
        (job_of(block_ids=(3, 16, 9)), "16 in block_ids is not an id: ids are below 16"),
        (job_of(block_ids=(3, -1, 9)), "-1 in block_ids is not an id"),
        (job_of(chunk_ids=(2, 0, 12)), "12 in chunk_ids is not an id: ids are below 12"),
        (job_of(block_ids=(3, 9, 9)), "9 stands 2 times in block_ids"),
        (job_of(chunk_ids=(2, 0, 2)), "2 stands 2 times in chunk_ids"),
    ],
)
def test_a_job_that_does_not_fit_is_told_and_harms_nothing(job: OffloadJob, message: str) -> None:
    with open_rank() as rank:
        before = rank.host_content()
        (wrong,) = rank.run(job)
        assert not wrong.ok
        assert message in wrong.error
        assert torch.equal(rank.host_content(), before)
        assert rank.run(job_of())[0].ok


def test_more_host_memory_than_the_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="this machine has"):
        HostMemory(2**40, 4096, pin=False, progress=lambda *_: None)


class EngineMachine(RuleBasedStateMachine):
    """Requests of a few documents are computed, stored, forgotten by the device and loaded back,
    with a small tier.

    A block's content is a function of its group and hash. Whatever a load says is right must be.
    """

    NUM_LOGICAL = 4

    @initialize(
        blocks_per_chunk=st.integers(1, 3),
        num_chunks=st.integers(2, 9),
        where=st.sampled_from(["host", "device"]),
    )
    def start(self, blocks_per_chunk: int, num_chunks: int, where: str) -> None:
        self.rank = Rank(where, blocks_per_chunk=blocks_per_chunk, num_chunks=num_chunks)
        tier = HostTier(self.rank.worker.num_chunks)
        self.planner = OffloadPlanner(
            self.rank.layout.groups, 4, tier, blocks_per_chunk=blocks_per_chunk
        )

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
            self.rank.worker.chunk(jobs[0].chunk_ids[0])[3] ^= 255

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
                assert torch.equal(self.rank.blocks[block_id], expected)

    @precondition(lambda self: hasattr(self, "planner"))
    @invariant()
    def is_sound(self) -> None:
        self.planner.check_integrity()
        assert self.planner.num_jobs == 0

    def _hashes(self, document: int) -> list[bytes]:
        return [bytes([document, index]) for index in range(self.NUM_LOGICAL)]

    def _seed(self, group: int, document: int, index: int) -> int:
        return 100 * group + 10 * document + index


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)
