"""The host tier of one rank executes jobs, proves what it loads, and reports. The step loop calls
it and never waits.

::

    store   copy ──▶ checksums ──▶ recorded ──▶ JobFinished
    load    recorded? ──▶ copy, checksums ──▶ equal to those recorded? ──▶ JobFinished

Checksums are xxh3_64 of each (block, KV head). On a CPU the host's bytes are hashed while the copy
reads them; a GPU hashes its own blocks: those that were stored, and those that a load has brought.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.offload.copies import OffloadHandler, TransferResult, chunk_layout
from pdlaunch.engine.offload.host_memory import AllocationProgress, HostMemory
from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from pdlaunch.engine.offload.tier import ChunkKey, HeadSlice
from pdlaunch.errors import ConfigError, TransferSpecError
from pdlaunch.machine.host import usable_cpus
from pdlaunch.transfer.integrity.checksum import Checksums, KVHasher

logger = logging.getLogger(__name__)

MOST_HASH_THREADS = 8
"""Of half of the cores. 512 MiB take 44 ms on 2 threads and 18 ms on 6; the copy takes 10 ms."""

Digests = list[tuple[int, ...]]  # by block, one checksum for each KV head of the rank


@dataclass(frozen=True, slots=True)
class Slots:
    """The blocks of one chunk that a transfer touches: slots [start, stop)."""

    key: ChunkKey
    chunk_id: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Content:
    """What one chunk holds."""

    key: ChunkKey
    first_slot: int  # slots before it hold nothing
    digests: Digests | None  # of the slots from ``first_slot`` on; None when nothing is verified


@dataclass(slots=True)
class _Pending:
    """A job under way: ended when the copy has and all checksums are there."""

    job: OffloadJob
    slots: list[Slots]
    copied: TransferResult | None = None
    hashing: list[Future[list[Digests]]] = field(default_factory=list)

    @property
    def is_ended(self) -> bool:
        return self.copied is not None and all(future.done() for future in self.hashing)

    def digests(self) -> list[Digests] | None:
        """Return the digests by chunk; None when nothing is verified."""
        found = [digests for future in self.hashing for digests in future.result()]
        return found if self.hashing else None


class OffloadWorker:
    """Owns the host memory of one rank, and the copies between it and the rank's KV cache. All
    methods are for one thread.

    ``kv_cache``: [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous,
    shared by all groups; outlives the worker. ``heads``: the model's KV heads that this rank holds.
    ``device_hasher`` computes checksums where the cache lies on a GPU. ``wake`` is called from
    other threads when ``take_finished`` may have something. Raises ConfigError when
    ``host_memory_bytes`` hold no chunk, or cannot be had.
    """

    def __init__(
        self,
        *,
        kv_cache: torch.Tensor,
        layout: KVCacheLayout,
        heads: HeadSlice,
        host_memory_bytes: int,
        blocks_per_chunk: int = 1,
        verify: bool = True,
        num_hash_threads: int | None = None,
        device_hasher: KVHasher | None = None,
        progress: AllocationProgress,
        wake: Callable[[], None],
    ) -> None:
        groups = [[kv_cache]] * len(layout.groups)
        chunk_bytes = chunk_layout(groups, blocks_per_chunk).chunk_bytes
        self.num_chunks = _count_chunks(host_memory_bytes, chunk_bytes)
        """Every rank of an engine has as many; the tier gets the least of all."""
        self.block_bytes = layout.block_bytes
        self._head_bytes = layout.head_bytes
        self._heads = heads
        self._blocks_per_chunk = blocks_per_chunk
        self._wake = wake
        self._host = HostMemory(
            self.num_chunks, chunk_bytes, pin=kv_cache.device.type == "cuda", progress=progress
        )
        self._handler = OffloadHandler(groups, self._host, blocks_per_chunk, wake=wake)
        self._num_threads = num_hash_threads or max(
            1, min(MOST_HASH_THREADS, len(usable_cpus()) // 2)
        )
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="offload-hash")
        self._verify = verify
        self._device_hasher = device_hasher
        self._contents: dict[int, _Content] = {}
        self._pending: dict[int, _Pending] = {}
        self._refused: list[JobFinished] = []

    @property
    def num_jobs(self) -> int:
        """Return the number of jobs whose end ``take_finished`` has not reported yet."""
        return len(self._pending) + len(self._refused)

    def submit(self, jobs: Sequence[OffloadJob]) -> None:
        """Start jobs behind what the current CUDA stream holds; every one is reported."""
        for job in jobs:
            try:
                self._start(job)
            except TransferSpecError as error:
                logger.exception("%s %d does not fit the KV cache", job.direction, job.job_id)
                self._refuse(job, str(error), [])

    def take_finished(self) -> list[JobFinished]:
        """Return the jobs that have ended since the last call, each once."""
        for result in self._handler.get_finished():
            pending = self._pending[result.job_id]
            pending.copied = result
            hashes_now = pending.job.direction == "store" or self._device_hasher is not None
            if result.ok and hashes_now:
                self._hash(pending)
        ended = [pending for pending in self._pending.values() if pending.is_ended]
        for pending in ended:
            del self._pending[pending.job.job_id]
        refused, self._refused = self._refused, []
        return refused + [self._finish(pending) for pending in ended]

    def checksums(self, chunk_id: int) -> Digests | None:
        """Return the checksums of a chunk's filled slots; None where there are none."""
        content = self._contents.get(chunk_id)
        return None if content is None else content.digests

    def chunk(self, chunk_id: int) -> torch.Tensor:
        """Return a chunk's memory: [chunk_bytes] uint8."""
        return self._host.chunk(chunk_id)

    def close(self, timeout_s: float = 10.0) -> None:
        """Let what is queued end, then unpin; memory stays pinned when that takes longer."""
        ended = self._handler.close(timeout_s)
        self._threads.shutdown(wait=ended, cancel_futures=True)
        if ended:
            self._host.close()
        else:
            logger.warning("offload copies did not end within %g s", timeout_s)

    def _start(self, job: OffloadJob) -> None:
        slots = list(self._slots(job))
        if job.direction == "load":
            unknown = [item.chunk_id for item in slots if not self._holds(item)]
            if unknown:
                self._refuse(job, f"host chunks {unknown} do not hold what was asked for", unknown)
                return
        self._handler.transfer_async(job.job_id, job.spec)
        pending = self._pending[job.job_id] = _Pending(job, slots)
        if job.direction == "store":
            for item in slots:
                # While the copy writes, the chunk holds neither its old content nor the new one.
                self._contents.pop(item.chunk_id, None)
        elif self._device_hasher is None:
            self._hash(pending)

    def _slots(self, job: OffloadJob) -> Iterator[Slots]:
        """Yield the job's chunks in order. Raises TransferSpecError unless each has a hash."""
        if len(job.chunk_ids) != len(job.chunk_hashes):
            raise TransferSpecError(
                f"the job has {len(job.chunk_ids)} chunk_ids and {len(job.chunk_hashes)} "
                "chunk_hashes"
            )
        chunks = iter(zip(job.chunk_ids, job.chunk_hashes, strict=True))
        size = self._blocks_per_chunk
        # Lengths that differ are the handler's to refuse.
        for group, (num_blocks, first) in enumerate(
            zip(job.group_sizes, job.block_indices, strict=False)
        ):
            end = first + num_blocks
            for chunk in range(first // size, -(-end // size) if num_blocks else 0):
                chunk_id, chunk_hash = next(chunks, (-1, b""))
                start, stop = max(first, chunk * size), min(end, (chunk + 1) * size)
                key = ChunkKey(group, chunk_hash, self._heads)
                yield Slots(key, chunk_id, start - chunk * size, stop - chunk * size)

    def _holds(self, slots: Slots) -> bool:
        content = self._contents.get(slots.chunk_id)
        return (
            content is not None and content.key == slots.key and content.first_slot <= slots.start
        )

    def _refuse(self, job: OffloadJob, error: str, failed_chunk_ids: list[int]) -> None:
        self._refused.append(JobFinished(job.job_id, False, error, failed_chunk_ids))
        self._wake()

    def _hash(self, pending: _Pending) -> None:
        if not self._verify or not pending.slots:
            return
        if self._device_hasher is not None:
            checksums = self._device_hasher.start(pending.job.block_ids, slice(None))
            pending.hashing = [self._threads.submit(_by_chunk, pending.slots, checksums)]
        else:
            # Shared out in order, so that the futures one after another give all chunks in order.
            num_parts = min(self._num_threads, len(pending.slots))
            parts = np.array_split(np.arange(len(pending.slots)), num_parts)
            pending.hashing = [
                self._threads.submit(self._hash_host, [pending.slots[index] for index in part])
                for part in parts
            ]
        for future in pending.hashing:
            future.add_done_callback(lambda _future: self._wake())

    def _hash_host(self, slots: Sequence[Slots]) -> list[Digests]:
        """Hash blocks in host memory, on another thread."""
        size = self.block_bytes
        found = []
        for item in slots:
            memory = self._host.chunk(item.chunk_id).numpy()
            blocks = memory[item.start * size : item.stop * size]
            # A block's bytes of each head follow each other.
            heads = blocks.reshape(item.stop - item.start, -1, self._head_bytes)
            found.append(
                [tuple(xxhash.xxh3_64_intdigest(head) for head in block) for block in heads]
            )
        return found

    def _finish(self, pending: _Pending) -> JobFinished:
        job, copied, digests = pending.job, pending.copied, pending.digests()
        assert copied is not None
        if not copied.ok:
            return JobFinished(job.job_id, False, copied.error)
        wrong: list[int] = []
        for index, item in enumerate(pending.slots):
            own = None if digests is None else digests[index]
            if job.direction == "store":
                self._contents[item.chunk_id] = _Content(item.key, item.start, own)
            elif own is not None:
                content = self._contents[item.chunk_id]
                first = content.first_slot
                stored = content.digests and content.digests[item.start - first : item.stop - first]
                if stored != own:
                    wrong.append(item.chunk_id)
        error = f"host chunks {wrong} have other checksums than when they were stored"
        return JobFinished(
            job.job_id, not wrong, error if wrong else "", wrong, copied.num_bytes, copied.seconds
        )


def _by_chunk(slots: Sequence[Slots], checksums: Checksums) -> list[Digests]:
    """Wait for the device, and return its checksums by chunk."""
    rows = iter(checksums.result().tolist())
    return [[tuple(next(rows)) for _ in range(item.start, item.stop)] for item in slots]


def _count_chunks(host_memory_bytes: int, chunk_bytes: int) -> int:
    num_chunks = host_memory_bytes // chunk_bytes
    if num_chunks < 1:
        raise ConfigError(
            f"kv_offload.host_memory {host_memory_bytes} bytes holds no chunk of {chunk_bytes} "
            "bytes",
            field="kv_offload.host_memory",
            value=host_memory_bytes,
            fix=f"Give it at least {chunk_bytes} bytes for each rank.",
        )
    return num_chunks
