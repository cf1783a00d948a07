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
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import xxhash

from pdlaunch.engine.kvcache.groups import KVCacheLayout, aligned_chunk_bytes
from pdlaunch.engine.models.attention import ReportProgress
from pdlaunch.engine.offload.copies import BlockPlaces, CopyQueue
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.jobs import (
    DIRECTIONS,
    ChunkKey,
    ChunkPart,
    JobFinished,
    JobLimits,
    OffloadJob,
)
from pdlaunch.errors import ConfigError, TransferSpecError
from pdlaunch.machine.host import usable_cpus
from pdlaunch.transfer.integrity.checksum import Checksums, KVHasher

logger = logging.getLogger(__name__)

MOST_HASH_THREADS = 8
"""Of half of the cores. 512 MiB take 44 ms on 2 threads and 18 ms on 6; the copy takes 10 ms."""

Digests = list[tuple[int, ...]]  # by block, one checksum for each KV head of the rank


@dataclass(frozen=True, slots=True)
class _Content:
    """What one chunk holds."""

    key: ChunkKey
    first_slot: int  # slots before it hold nothing
    digests: Digests  # of the slots from ``first_slot`` on


@dataclass(slots=True)
class _Pending:
    """A job under way: ended when the copy has and all checksums are there."""

    job: OffloadJob
    parts: list[ChunkPart]
    copied: JobFinished | None = None
    hashing: list[Future[list[Digests]]] = field(default_factory=list)
    """Their results, one after another, are the digests of all parts in order."""


class OffloadWorker:
    """Owns the host memory of one rank, and the copies between it and the rank's KV cache. All
    methods are for one thread.

    ``kv_cache``: [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous,
    shared by all groups; outlives the worker. ``device_hasher`` computes checksums where the cache
    lies on a GPU. ``wake`` is called, perhaps from other threads, when ``take_finished`` may have
    something. Raises ConfigError when ``host_memory_bytes`` hold no chunk, or cannot be had.
    """

    def __init__(
        self,
        *,
        kv_cache: torch.Tensor,
        layout: KVCacheLayout,
        host_memory_bytes: int,
        blocks_per_chunk: int = 1,
        device_hasher: KVHasher | None = None,
        progress: ReportProgress,
        wake: Callable[[], None],
    ) -> None:
        # A chunk holds its blocks one after another; all groups share one pool of chunks.
        chunk_bytes = aligned_chunk_bytes(blocks_per_chunk * layout.block_bytes)
        self.num_chunks = host_memory_bytes // chunk_bytes  # the same on every rank of an engine
        if not self.num_chunks:
            raise ConfigError(
                f"kv_offload.host_memory {host_memory_bytes} bytes holds no chunk of {chunk_bytes} "
                "bytes",
                field="kv_offload.host_memory",
                value=host_memory_bytes,
                fix=f"Give it at least {chunk_bytes} bytes for each rank.",
            )
        self.block_bytes = layout.block_bytes
        self._head_bytes = layout.head_bytes
        self._limits = JobLimits(
            len(layout.groups), len(kv_cache), self.num_chunks, blocks_per_chunk
        )
        self._wake = wake
        blocks = kv_cache.view(torch.uint8).view(-1, layout.block_bytes)
        self._host = HostMemory(self.num_chunks, chunk_bytes, pin=blocks.is_cuda, progress=progress)
        self._copies = {
            direction: CopyQueue(direction, blocks, self._host, self._report)
            for direction in DIRECTIONS
        }
        self._num_threads = max(1, min(MOST_HASH_THREADS, len(usable_cpus()) // 2))
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="offload-hash")
        self._device_hasher = device_hasher
        self._contents: dict[int, _Content] = {}
        self._pending: dict[int, _Pending] = {}
        self._reports: queue.SimpleQueue[JobFinished] = queue.SimpleQueue()
        """Ends of copies, and jobs that were refused."""

    def submit(self, jobs: Sequence[OffloadJob]) -> None:
        """Start jobs behind what the current CUDA stream holds; every one is reported."""
        for job in jobs:
            try:
                self._start(job)
            except TransferSpecError as error:
                logger.exception("%s %d does not fit the KV cache", job.direction, job.job_id)
                self._report(JobFinished(job.job_id, False, str(error)))

    def take_finished(self) -> list[JobFinished]:
        """Return the jobs that have ended since the last call, each once."""
        finished: list[JobFinished] = []
        while not self._reports.empty():
            report = self._reports.get()
            pending = self._pending.get(report.job_id)
            if pending is None:  # it was refused
                finished.append(report)
                continue
            pending.copied = report
            if report.ok and not pending.hashing:
                self._hash(pending)
        for pending in list(self._pending.values()):
            if pending.copied is not None and all(future.done() for future in pending.hashing):
                del self._pending[pending.job.job_id]
                finished.append(self._finish(pending, pending.copied))
        return finished

    def chunk(self, chunk_id: int) -> torch.Tensor:
        """Return a chunk's memory: [chunk_bytes] uint8."""
        return self._host.chunk(chunk_id)

    def close(self, timeout_s: float = 10.0) -> None:
        """Let what is queued end, then unpin; memory stays pinned when that takes longer."""
        ends = [copies.close(timeout_s) for copies in self._copies.values()]
        ended = all(ends)
        self._threads.shutdown(wait=ended, cancel_futures=True)
        if ended:
            self._host.close()
        else:
            logger.warning("offload copies did not end within %g s", timeout_s)

    def _report(self, report: JobFinished) -> None:
        self._reports.put(report)
        self._wake()

    def _start(self, job: OffloadJob) -> None:
        parts = self._limits.parts(job)
        unknown = [
            part.chunk_id for part in parts if job.direction == "load" and not self._holds(part)
        ]
        if unknown:
            error = f"host chunks {unknown} do not hold what was asked for"
            self._report(JobFinished(job.job_id, False, error, unknown))
            return
        pending = self._pending[job.job_id] = _Pending(job, parts)
        if job.direction == "store":
            for part in parts:
                # While the copy writes, the chunk holds neither its old content nor the new one.
                self._contents.pop(part.chunk_id, None)
        self._copies[job.direction].submit(job.job_id, _places(job, parts))
        if job.direction == "load" and self._device_hasher is None:
            self._hash(pending)

    def _holds(self, part: ChunkPart) -> bool:
        content = self._contents.get(part.chunk_id)
        return content is not None and content.key == part.key and content.first_slot <= part.start

    def _hash(self, pending: _Pending) -> None:
        parts = pending.parts
        if not parts:
            return
        if self._device_hasher is not None:
            checksums = self._device_hasher.start(pending.job.block_ids, slice(None))
            pending.hashing = [self._threads.submit(_by_part, parts, checksums)]
        else:
            size = -(-len(parts) // self._num_threads)
            pending.hashing = [
                self._threads.submit(self._hash_host, parts[start : start + size])
                for start in range(0, len(parts), size)
            ]
        for future in pending.hashing:
            future.add_done_callback(lambda _future: self._wake())

    def _hash_host(self, parts: Sequence[ChunkPart]) -> list[Digests]:
        """Hash blocks in host memory, on another thread."""
        found = []
        for part in parts:
            blocks = self._host.chunk(part.chunk_id).numpy()
            blocks = blocks[part.start * self.block_bytes : part.stop * self.block_bytes]
            # A block's bytes of each head follow each other.
            heads = blocks.reshape(part.stop - part.start, -1, self._head_bytes)
            found.append(
                [tuple(xxhash.xxh3_64_intdigest(head) for head in block) for block in heads]
            )
        return found

    def _finish(self, pending: _Pending, copied: JobFinished) -> JobFinished:
        if not copied.ok:
            return copied
        digests = [each for future in pending.hashing for each in future.result()]
        wrong: list[int] = []
        for part, found in zip(pending.parts, digests, strict=True):
            if pending.job.direction == "store":
                self._contents[part.chunk_id] = _Content(part.key, part.start, found)
                continue
            content = self._contents[part.chunk_id]
            first = content.first_slot
            if content.digests[part.start - first : part.stop - first] != found:
                wrong.append(part.chunk_id)
        if not wrong:
            return copied
        error = f"host chunks {wrong} have other checksums than when they were stored"
        return replace(copied, ok=False, error=error, failed_chunk_ids=wrong)


def _places(job: OffloadJob, parts: Sequence[ChunkPart]) -> BlockPlaces:
    """Return where each block of the job lies in the parts, which hold them in order."""
    columns = np.array([(part.chunk_id, part.start, part.stop) for part in parts], dtype=np.int64)
    chunk_ids, starts, stops = columns.reshape(-1, 3).T
    counts = stops - starts
    # Slots of parts 2..4, 0..4, 0..1:   2 3 | 0 1 2 3 | 0  =  0 1 2 .. minus what lies before.
    slots = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
    block_ids = np.array(job.block_ids, dtype=np.int64)
    return BlockPlaces(block_ids, np.repeat(chunk_ids, counts), slots)


def _by_part(parts: Sequence[ChunkPart], checksums: Checksums) -> list[Digests]:
    """Wait for the device, and return its checksums by part."""
    rows = iter(checksums.result().tolist())
    return [[tuple(next(rows)) for _ in range(part.start, part.stop)] for part in parts]
