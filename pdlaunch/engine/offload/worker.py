"""The host tier of one rank executes jobs, proves what it loads, and reports. The step loop calls
it and never waits.

::

    store   copy ──▶ checksums ──▶ recorded ──▶ JobFinished
    load    recorded? ──▶ copy, checksums ──▶ equal to those recorded? ──▶ JobFinished
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.offload.contents import (
    ChunkContent,
    ChunkHasher,
    DeviceChunkHasher,
    Digests,
    Slots,
)
from pdlaunch.engine.offload.copy_streams import TransferResult
from pdlaunch.engine.offload.handler import OffloadHandler, chunk_layout
from pdlaunch.engine.offload.host_memory import AllocationProgress, HostMemory
from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from pdlaunch.engine.offload.method_choice import MethodTable, choose_cuda_methods, host_methods
from pdlaunch.engine.offload.tier import ChunkKey, HeadSlice
from pdlaunch.errors import ConfigError, TransferSpecError
from pdlaunch.machine.host import usable_cpus
from pdlaunch.transfer.integrity.checksum import KVHasher

logger = logging.getLogger(__name__)

MOST_HASH_THREADS = 8


@dataclass(slots=True)
class _Pending:
    """Tracks a job under way: ended when the copy has and all checksums are there."""

    job: OffloadJob
    slots: list[Slots]
    copied: TransferResult | None = None
    hashing: list[Future[list[Digests]]] = field(default_factory=list)

    @property
    def is_ended(self) -> bool:
        return self.copied is not None and all(future.done() for future in self.hashing)

    def digests(self) -> list[Digests] | None:
        """Return the digests by chunk; None when nothing is verified."""
        return (
            [digests for future in self.hashing for digests in future.result()]
            if self.hashing
            else None
        )


class OffloadWorker:
    """Owns the host memory of one rank and the copies between it and the rank's KV cache. All
    methods are for one thread.

    ``kv_cache``: [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous,
    shared by all groups; outlives the worker. ``heads``: the model's KV heads that this rank holds.
    ``num_hash_threads`` compute checksums; half of the cores, at most 8, unless given (measured:
    512 MiB take 44 ms on 2 threads and 18 ms on 6, the copy 10 ms). ``device_hasher`` computes them
    instead. ``wake`` is called from other threads when ``take_finished`` may have something. Raises
    ConfigError when ``host_memory_bytes`` hold no chunk, or cannot be had.
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
        self._heads = heads
        self._blocks_per_chunk = blocks_per_chunk
        self._wake = wake
        self._host = HostMemory(
            self.num_chunks, chunk_bytes, pin=kv_cache.device.type == "cuda", progress=progress
        )
        methods = _choose_methods(
            layout.block_bytes, blocks_per_chunk, self._host, kv_cache.device, progress
        )
        self._handler = OffloadHandler(
            groups, self._host, blocks_per_chunk, choose=methods.choose, wake=wake
        )
        num_threads = num_hash_threads or max(1, min(MOST_HASH_THREADS, len(usable_cpus()) // 2))
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="offload-hash")
        self._hasher = (
            ChunkHasher(
                self._host, layout.block_bytes, layout.head_bytes, self._threads, num_threads
            )
            if verify
            else None
        )
        self._block_hasher = (
            DeviceChunkHasher(device_hasher, self._threads)
            if verify and device_hasher is not None
            else None
        )
        self._contents: dict[int, ChunkContent] = {}
        self._pending: dict[int, _Pending] = {}
        self._refused: list[JobFinished] = []

    @property
    def num_jobs(self) -> int:
        """Return the number of jobs whose end ``take_finished`` has not reported yet."""
        return len(self._pending) + len(self._refused)

    def submit(self, jobs: Sequence[OffloadJob]) -> None:
        """Start jobs behind what the current CUDA stream holds. Whatever is wrong with one, its end
        is told.
        """
        for job in jobs:
            try:
                self._start(job)
            except TransferSpecError as error:
                logger.exception("%s %d does not fit the KV cache", job.direction, job.job_id)
                self._refuse(job, str(error), [])

    def take_finished(self) -> list[JobFinished]:
        """Return the jobs that have ended since the last call, each once."""
        for result in self._handler.get_finished():
            self._on_copied(self._pending[result.job_id], result)
        ended = [pending for pending in self._pending.values() if pending.is_ended]
        for pending in ended:
            del self._pending[pending.job.job_id]
        refused, self._refused = self._refused, []
        return refused + [self._finish(pending) for pending in ended]

    def checksums(self, chunk_id: int) -> Digests | None:
        """Return the checksums that a chunk's blocks were stored with, from its first filled slot
        on; None where there are none.
        """
        content = self._contents.get(chunk_id)
        return None if content is None else content.digests

    def chunk(self, chunk_id: int) -> torch.Tensor:
        """Return a chunk's memory, [chunk_bytes] uint8, ``block_bytes`` a block; for tests only."""
        return self._host.chunk(chunk_id)

    def close(self, timeout_s: float = 10.0) -> None:
        """Let what is queued end, then unpin; memory stays pinned when that takes longer."""
        ended = self._handler.close(timeout_s)
        self._threads.shutdown(wait=ended, cancel_futures=True)
        if ended:
            self._host.close()
        else:
            logger.warning("offload copies did not end within %g s", timeout_s)

    # Starting

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
        # A load: on a CPU the host's bytes are hashed while the copy reads them. A GPU hashes what
        # has arrived, so that waits for the copy (``_on_copied``).
        elif self._block_hasher is None:
            self._hash(pending)

    def _slots(self, job: OffloadJob) -> Iterator[Slots]:
        """Yield the job's chunks in order. Raises TransferSpecError when there are more or fewer of
        them than hashes.
        """
        chunks = iter(zip(job.chunk_ids, job.chunk_hashes, strict=False))
        if len(job.chunk_ids) != len(job.chunk_hashes):
            raise TransferSpecError(
                f"the job has {len(job.chunk_ids)} chunk_ids and {len(job.chunk_hashes)} "
                "chunk_hashes"
            )
        size = self._blocks_per_chunk
        for group, (num_blocks, first) in enumerate(
            zip(job.group_sizes, job.block_indices, strict=False)
        ):
            end = first + num_blocks
            for chunk in range(first // size, -(-end // size) if num_blocks else 0):
                chunk_id, chunk_hash = next(chunks, (-1, b""))
                start, stop = max(first, chunk * size), min(end, (chunk + 1) * size)
                yield Slots(
                    ChunkKey(group, chunk_hash, self._heads),
                    chunk_id,
                    start - chunk * size,
                    stop - chunk * size,
                )

    def _holds(self, slots: Slots) -> bool:
        content = self._contents.get(slots.chunk_id)
        return (
            content is not None and content.key == slots.key and content.first_slot <= slots.start
        )

    def _refuse(self, job: OffloadJob, error: str, failed_chunk_ids: list[int]) -> None:
        self._refused.append(JobFinished(job.job_id, False, error, failed_chunk_ids))
        self._wake()

    # Ending

    def _on_copied(self, pending: _Pending, result: TransferResult) -> None:
        pending.copied = result
        if result.ok and (pending.job.direction == "store" or self._block_hasher is not None):
            self._hash(pending)

    def _hash(self, pending: _Pending) -> None:
        if self._hasher is None or not pending.slots:
            return
        if self._block_hasher is not None:
            pending.hashing = self._block_hasher.submit(pending.slots, pending.job.block_ids)
        else:
            pending.hashing = self._hasher.submit(pending.slots)
        for future in pending.hashing:
            future.add_done_callback(lambda _future: self._wake())

    def _finish(self, pending: _Pending) -> JobFinished:
        job, copied, digests = pending.job, pending.copied, pending.digests()
        assert copied is not None
        if not copied.ok:
            return JobFinished(job.job_id, False, copied.error)
        wrong: list[int] = []
        if job.direction == "store":
            self._record(pending.slots, digests)
        elif digests is not None:
            wrong = self._wrong_chunks(pending.slots, digests)
        error = (
            f"the checksums of host chunks {wrong} are not those of the blocks that were stored "
            "there"
            if wrong
            else ""
        )
        return JobFinished(job.job_id, not wrong, error, wrong, copied.num_bytes, copied.seconds)

    def _record(self, slots: Sequence[Slots], digests: Sequence[Digests] | None) -> None:
        for index, item in enumerate(slots):
            self._contents[item.chunk_id] = ChunkContent(
                item.key, item.start, None if digests is None else digests[index]
            )

    def _wrong_chunks(self, slots: Sequence[Slots], digests: Sequence[Digests]) -> list[int]:
        wrong = []
        for item, found in zip(slots, digests, strict=True):
            stored = self._contents[item.chunk_id].digests_between(item.start, item.stop)
            if stored != found:
                wrong.append(item.chunk_id)
        return wrong


def _count_chunks(host_memory_bytes: int, chunk_bytes: int) -> int:
    num_chunks = host_memory_bytes // chunk_bytes
    if num_chunks < 1:
        raise ConfigError(
            (
                f"kv_offload.host_memory {host_memory_bytes} bytes holds no chunk of {chunk_bytes} "
                "bytes"
            ),
            field="kv_offload.host_memory",
            value=host_memory_bytes,
            fix=f"Give it at least {chunk_bytes} bytes for each rank.",
        )
    return num_chunks


def _choose_methods(
    page_bytes: int,
    blocks_per_chunk: int,
    host: HostMemory,
    device: torch.device,
    progress: AllocationProgress,
) -> MethodTable:
    if device.type != "cuda":
        return host_methods()
    progress("measuring copies between device and host", None)
    return choose_cuda_methods([page_bytes], host, device, blocks_per_chunk=blocks_per_chunk)
