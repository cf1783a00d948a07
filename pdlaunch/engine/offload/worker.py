"""The host tier of one rank executes jobs, proves what it loads, and reports. The step loop calls
it and never waits.

::

    store   copy ──▶ checksums ──▶ recorded ──▶ JobFinished
    load    recorded? ──▶ copy, checksums ──▶ equal to those recorded? ──▶ JobFinished

Checksums are xxh3_64 of each (block, KV head). On a CPU the host's bytes are hashed while the copy
reads them; a GPU hashes its own blocks: those that were stored, and those that a load has brought.

Copies KV blocks between the KV cache and host memory, a queue for each direction.

Each direction has a thread. On a CPU that thread copies; on CUDA the caller enqueues on a stream of
its own, behind what the current stream holds, and the thread waits.

The copy engines (``cuMemcpyBatchAsync``) move 52 to 54 GB/s each way from pages of 32 KiB on (one
H200, PCIe 5.0: 55), and take no multiprocessor from the model. A block of all layers is that large
in every model that is served; so there is no other method but torch's own copies, for drivers
without the call.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import xxhash

from pdlaunch.engine.kvcache.groups import KVCacheLayout, aligned_chunk_bytes
from pdlaunch.engine.memory.batch_copies import BatchCopies
from pdlaunch.engine.models.attention import ReportProgress
from pdlaunch.engine.offload.host_memory import HostMemory, IntArray
from pdlaunch.engine.offload.jobs import (
    DIRECTIONS,
    ChunkKey,
    ChunkPart,
    Direction,
    JobFinished,
    JobLimits,
    OffloadJob,
)
from pdlaunch.errors import ConfigError, TransferError, TransferSpecError
from pdlaunch.machine.cuda_driver import DriverError
from pdlaunch.machine.host import usable_cpus
from pdlaunch.transfer.integrity.checksum import Checksums, KVHasher

logger = logging.getLogger(__name__)

NUM_BATCH_STREAMS = 3
"""One stream and three on an H200: blocks of 64 KiB 39 and 46 GB/s, of 256 KiB 49 and 52 GB/s."""


@dataclass(frozen=True, slots=True)
class BlockPlaces:
    """Names blocks of the KV cache and their slots in host chunks. All are [num_blocks]."""

    block_ids: IntArray
    chunk_ids: IntArray
    slots: IntArray


@dataclass(frozen=True, slots=True)
class Runs:
    """Copies of maximal length: neighbours on both sides are one. All are [num_runs]."""

    device_offsets: IntArray  # bytes from the start of the KV cache
    host_pieces: IntArray
    host_offsets: IntArray  # bytes from the start of the piece
    sizes: IntArray


def merge_runs(places: BlockPlaces, block_bytes: int, host: HostMemory) -> Runs:
    """Return the fewest copies that move the same bytes, in the given order of blocks."""
    device = places.block_ids * block_bytes
    pieces, chunk_offsets = host.places(places.chunk_ids)
    offsets = chunk_offsets + places.slots * block_bytes
    # Runs end where blocks are no neighbours on one side, or where host memory goes on elsewhere.
    breaks = np.diff(pieces) != 0
    breaks |= (np.diff(device) != block_bytes) | (np.diff(offsets) != block_bytes)
    starts = np.flatnonzero(np.concatenate(([True], breaks)))[: len(device)]
    num_blocks = np.diff(np.append(starts, len(device)))
    return Runs(device[starts], pieces[starts], offsets[starts], num_blocks * block_bytes)


Copy = Callable[[torch.Tensor, HostMemory, Runs, Direction], None]
"""Copies all runs, or enqueues them on the current stream. The tensor: [num_blocks, block_bytes]
uint8. Raises TransferError, RuntimeError.
"""


def copy_runs(blocks: torch.Tensor, host: HostMemory, runs: Runs, direction: Direction) -> None:
    """Copy each run by itself (on CUDA 12 GB/s at 64 KiB)."""
    device_bytes = blocks.view(-1)
    columns = (runs.device_offsets, runs.host_pieces, runs.host_offsets, runs.sizes)
    for device_offset, piece, host_offset, size in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        device = device_bytes[device_offset : device_offset + size]
        source, target = device, host.pieces[piece][host_offset : host_offset + size]
        if direction == "load":
            source, target = target, source
        if device.is_cuda:
            target.copy_(source, non_blocking=True)
        else:
            # numpy releases the GIL meanwhile, and takes no core but this thread's.
            np.copyto(target.numpy(), source.numpy())


def batch_copy() -> Copy:
    """Return the copy by the copy engines. Raises DriverError below CUDA 12.8."""
    batches = BatchCopies(NUM_BATCH_STREAMS)

    def copy(blocks: torch.Tensor, host: HostMemory, runs: Runs, direction: Direction) -> None:
        ours = (runs.device_offsets + blocks.data_ptr()).view(np.uint64)
        theirs = (runs.host_offsets + host.piece_addresses[runs.host_pieces]).view(np.uint64)
        targets, sources = (theirs, ours) if direction == "store" else (ours, theirs)
        stream = torch.cuda.current_stream(blocks.device)
        batches.enqueue(targets, sources, runs.sizes.view(np.uint64), stream)

    return copy


def fastest_copy(device: torch.device) -> Copy:
    """Return how to copy between this device and host memory."""
    if device.type == "cuda":
        try:
            return batch_copy()
        except DriverError as error:
            logger.warning("copies of the host tier are slow: %s", error)
    return copy_runs


class CopyQueue:
    """Runs the copies of one direction in order, and reports each end from its thread.

    ``blocks``: the KV cache, [num_blocks, block_bytes] uint8. For one calling thread.
    """

    def __init__(
        self,
        direction: Direction,
        blocks: torch.Tensor,
        host: HostMemory,
        report: Callable[[JobFinished], None],
        copy: Copy | None = None,
    ) -> None:
        self._direction = direction
        self._blocks = blocks
        self._host = host
        self._report = report
        self._copy = copy or fastest_copy(blocks.device)
        self._stream = torch.cuda.Stream(blocks.device) if blocks.is_cuda else None  # type: ignore[no-untyped-call]
        self._ends: queue.SimpleQueue[tuple[int, int, Callable[[], float]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name=f"offload-{direction}", daemon=True)
        self._thread.start()

    def submit(self, job_id: int, places: BlockPlaces) -> None:
        """Queue a copy. Never raises: success and failure are both reported at the end."""
        if self._stream is None:
            end: Callable[[], float] = partial(self._copy_now, places)
        else:
            end = self._enqueue(places, self._stream)
        self._ends.put((job_id, len(places.block_ids) * self._blocks.shape[1], end))

    def close(self, timeout_s: float) -> bool:
        """End the thread after what is queued; False: a copy still runs, host memory must stay."""
        self._ends.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._ends.get()) is not None:
            job_id, num_bytes, end = item
            try:
                report = JobFinished(job_id, True, num_bytes=num_bytes, seconds=end())
            except Exception as error:
                # Whatever it is, the blocks must not be used, and their owner must hear of it.
                report = JobFinished(job_id, False, f"{type(error).__name__}: {error}")
            self._report(report)

    def _copy_all(self, places: BlockPlaces) -> None:
        runs = merge_runs(places, self._blocks.shape[1], self._host)
        self._copy(self._blocks, self._host, runs, self._direction)

    def _copy_now(self, places: BlockPlaces) -> float:
        """Copy the blocks and return the duration in seconds."""
        began_at = time.perf_counter()
        self._copy_all(places)
        return time.perf_counter() - began_at

    def _enqueue(self, places: BlockPlaces, stream: torch.cuda.Stream) -> Callable[[], float]:
        """Enqueue the copies; return a function that waits for them and returns their seconds."""
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # Blocking: the thread that waits sleeps, and takes no core from the step loop.
        end = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        failure: Exception | None = None
        try:
            # What the blocks were last used for may still be queued there.
            stream.wait_stream(torch.cuda.current_stream(self._blocks.device))
            with torch.cuda.device(self._blocks.device), torch.cuda.stream(stream):
                begin.record(stream)
                self._copy_all(places)
                end.record(stream)
        except (RuntimeError, TransferError) as error:
            # An error of the device, too, is this job's: it must not end the step loop.
            failure = error

        def wait() -> float:
            if failure is not None:
                stream.synchronize()  # a part of the copies may be on its way
                raise failure
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000

        return wait


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
