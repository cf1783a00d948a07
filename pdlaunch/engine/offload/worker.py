"""Runs the offload jobs of one rank, proves loaded blocks and reports the end of each job. The step
loop calls it and never waits.

::

    store   copy ──▶ checksums ──▶ recorded ──▶ JobFinished
    load    recorded? ──▶ copy ──▶ checksums equal to the recorded? ──▶ JobFinished

Checksums are xxh3_64 of each (block, KV head). On a CPU, the direction's thread hashes the host
blocks after a copy. On a GPU, a kernel hashes the device blocks.

Each direction has a thread. On a CPU, the thread copies. On CUDA, the caller enqueues copies on the
direction's stream, after the work of the current stream, and the thread waits for their end. The
copy engines (``cuMemcpyBatchAsync``) move 52 to 54 GB/s each way if pieces have at least 32 KiB
(H200, PCIe 5.0: 55). Blocks of all supported models are that large, so there is no copy kernel.
"""

import ctypes
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import xxhash

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.memory.batch_copies import BatchCopies
from pdlaunch.engine.memory.driver import map_pages, touch_pages
from pdlaunch.engine.offload.planner import DIRECTIONS, BlockKey, Direction, JobFinished, OffloadJob
from pdlaunch.errors import ConfigError, TransferError
from pdlaunch.machine.host import memory_bytes
from pdlaunch.machine.probe import DriverError
from pdlaunch.protocol.side_channel import RegionPlace
from pdlaunch.transfer.integrity.checksum import KVHasher
from pdlaunch.transfer.regions import Addresses, merge, pieces_of

logger = logging.getLogger(__name__)

PAGE_BYTES = 4096  # Page size of the machine; each host block begins on a page
# H200, one stream and three: 39 and 46 GB/s for blocks of 64 KiB, 49 and 52 GB/s for 256 KiB
NUM_BATCH_STREAMS = 3


def register_pages(address: int, num_bytes: int) -> int:
    """Page-lock memory for all devices. Return CUDA's error code, 0 for success."""
    return int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))  # type: ignore[no-untyped-call]


def unregister_pages(address: int) -> None:
    """Undo ``register_pages``."""
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


class HostMemory:
    """Allocates host blocks, each at the beginning of a page. To pin them, several threads touch
    memory in huge pages, and then CUDA registers it: 0.1 s for each GiB on an H200's host, where
    the driver's allocator took 0.37 s and scattered copies of 4 KiB were slower. Raises
    ConfigError.
    """

    def __init__(
        self,
        num_blocks: int,
        block_bytes: int,
        *,
        pin: bool,
        register: Callable[[int, int], int] = register_pages,
        unregister: Callable[[int], None] = unregister_pages,
    ) -> None:
        stride = bytes_on_host(block_bytes)
        self._num_bytes = num_bytes = num_blocks * stride
        if num_bytes > memory_bytes():
            raise self._refusal(f"this machine has {memory_bytes()}")
        try:
            region = map_pages(num_bytes)
        except OSError as error:
            raise self._refusal(f"allocating them failed: {error}") from error
        self.memory = torch.frombuffer(region, dtype=torch.uint8)
        self.place = RegionPlace(self.memory.data_ptr(), stride, block_bytes)
        # Unpins the memory. All copies must have ended.
        self.close: Callable[[], None] = lambda: None
        if pin:
            # Otherwise the kernel would provide the pages one by one during the registration.
            touch_pages(region)
            if code := register(self.place.address, num_bytes):
                raise self._refusal(f"pinning them failed with CUDA error {code}")
            self.close = partial(unregister, self.place.address)

    def block(self, host_id: int) -> torch.Tensor:
        start = host_id * self.place.stride_bytes
        return self.memory[start : start + self.place.head_bytes]

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(
            f"kv_offload.host_memory needs {self._num_bytes} bytes for each rank: {reason}",
            field="kv_offload.host_memory",
            value=self._num_bytes,
            fix="Set it lower: all ranks of a machine share its memory.",
        )


def bytes_on_host(block_bytes: int) -> int:
    """Return the host memory that a block takes: ``block_bytes``, rounded up to whole pages."""
    return -(-block_bytes // PAGE_BYTES) * PAGE_BYTES


# Takes destinations, sources and sizes. Copies at once, or enqueues copies on the current stream.
# Raises TransferError, RuntimeError.
Copy = Callable[[Addresses, Addresses, Addresses], None]


def copy_by_thread(destinations: Addresses, sources: Addresses, sizes: Addresses) -> None:
    """Copy on a CPU, without the interpreter lock."""
    columns = (column.tolist() for column in (destinations, sources, sizes))
    for destination, source, size in zip(*columns, strict=True):
        ctypes.memmove(destination, source, size)


def copy_by_engines() -> Copy:
    """Return a copy function for a GPU's copy engines. Raises ConfigError if the driver is old."""
    try:
        batches = BatchCopies(NUM_BATCH_STREAMS)
    except DriverError as error:
        raise ConfigError(
            f"kv_offload.host_memory cannot be used: {error}",
            field="kv_offload.host_memory",
            fix="Set it to 0, or install a driver of CUDA 12.8 or newer.",
        ) from None
    return lambda destinations, sources, sizes: batches.enqueue(
        destinations, sources, sizes, torch.cuda.current_stream()
    )


@dataclass(eq=False)
class CopyQueue:
    """Runs the copies of one direction in order. Its thread calls ``report`` at each end.

    ``blocks``: the KV cache, [num_blocks, block_bytes] uint8. ``prove``: called in the thread after
    a copy, returns the host blocks with wrong bytes. Only one thread may call the methods.
    """

    direction: Direction
    blocks: torch.Tensor
    host: HostMemory
    report: Callable[[JobFinished], None]
    copy: Copy = copy_by_thread
    prove: Callable[[OffloadJob], list[int]] = lambda _: []

    def __post_init__(self) -> None:
        blocks = self.blocks
        self._place = RegionPlace(blocks.data_ptr(), blocks.shape[1], blocks.shape[1])
        self._stream = torch.cuda.Stream(blocks.device) if blocks.is_cuda else None  # type: ignore[no-untyped-call]
        self._ends: queue.SimpleQueue[tuple[OffloadJob, Callable[[], None]] | None] = (
            queue.SimpleQueue()
        )
        name = f"offload-{self.direction}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: OffloadJob) -> None:
        """Queue a copy. Never raises: a failure is reported at the end."""
        end = partial(self._copy_all, job)
        self._ends.put((job, end if self._stream is None else self._enqueue(job, self._stream)))

    def close(self, timeout_s: float) -> bool:
        """End the thread after all queued copies; False: a copy still uses the host memory."""
        self._ends.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._ends.get()) is not None:
            (job, end), num_bytes, error = item, 0, ""
            wrong: list[int] = []
            try:
                end()
                num_bytes = len(job.block_ids) * self.blocks.shape[1]
                if wrong := self.prove(job):
                    error = f"checksums of host blocks {wrong} have changed since they were stored"
            except Exception as failure:
                # Report any error, because the blocks must not be used.
                error = f"{type(failure).__name__}: {failure}"
            self.report(JobFinished(job.job_id, not error, error, wrong, num_bytes))

    def _copy_all(self, job: OffloadJob) -> None:
        ours, theirs = (
            pieces_of([place], [(0,)], [block_ids], range(1))
            for place, block_ids in ((self._place, job.block_ids), (self.host.place, job.host_ids))
        )
        pair = (theirs, ours) if self.direction == "store" else (ours, theirs)
        self.copy(*merge(*pair))

    def _enqueue(self, job: OffloadJob, stream: torch.cuda.Stream) -> Callable[[], None]:
        """Enqueue the copies and return a function that waits for them."""
        # Blocking: the waiting thread sleeps and does not take a core from the step loop.
        end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        failure: Exception | None = None
        try:
            # The current stream may still have queued work that uses the blocks.
            stream.wait_stream(torch.cuda.current_stream(self.blocks.device))
            with torch.cuda.device(self.blocks.device), torch.cuda.stream(stream):
                self._copy_all(job)
                end.record(stream)
        except (RuntimeError, TransferError) as error:
            # Any error fails only this job, even a device error: it must not end the step loop.
            failure = error

        def wait() -> None:
            if failure is not None:
                stream.synchronize()  # some of the copies may have started
                raise failure
            end.synchronize()

        return wait


class OffloadWorker:
    """Owns the host memory of one rank, and copies blocks between it and ``kv_cache``, [num_blocks,
    num_kv_heads, num_layers, 2, block_size, head_dim], which outlives the worker. Only one thread
    may call the methods. ``device_hasher``: computes checksums on a GPU. ``wake`` may be called
    from any thread, if ``take_finished`` may have a job. Raises ConfigError.
    """

    def __init__(
        self,
        *,
        kv_cache: torch.Tensor,
        layout: KVCacheLayout,
        host_memory_bytes: int,
        device_hasher: KVHasher | None = None,
        wake: Callable[[], None],
    ) -> None:
        # All groups share one pool of host blocks. All ranks of an engine have the same number.
        self.num_blocks = host_memory_bytes // bytes_on_host(layout.block_bytes)
        if not self.num_blocks:
            least_bytes = bytes_on_host(layout.block_bytes)
            raise ConfigError(
                f"kv_offload.host_memory {host_memory_bytes} bytes is smaller than one block of "
                f"{least_bytes} bytes",
                field="kv_offload.host_memory",
                value=host_memory_bytes,
                fix=f"Give it at least {least_bytes} bytes for each rank.",
            )
        self._head_bytes = layout.head_bytes
        self._wake = wake
        blocks = kv_cache.view(torch.uint8).view(-1, layout.block_bytes)
        copy = copy_by_engines() if blocks.is_cuda else copy_by_thread
        self.host = HostMemory(self.num_blocks, layout.block_bytes, pin=blocks.is_cuda)
        self._copies = {
            direction: CopyQueue(direction, blocks, self.host, self._report, copy, self._prove)
            for direction in DIRECTIONS
        }
        self._device_hasher = device_hasher
        self._hasher_lock = threading.Lock()  # both directions use the hasher
        # Host id -> the block's key, and a checksum for each KV head.
        self._contents: dict[int, tuple[BlockKey, tuple[int, ...]]] = {}
        self._reports: queue.SimpleQueue[JobFinished] = queue.SimpleQueue()

    def submit(self, jobs: Sequence[OffloadJob]) -> None:
        """Start jobs, after the work of the current CUDA stream. The end of each is reported."""
        for job in jobs:
            if job.direction == "store":
                for host_id in job.host_ids:
                    # While the copy writes, the block has neither its old nor its new content.
                    self._contents.pop(host_id, None)
            unknown = [
                host_id
                for host_id, key in zip(job.host_ids, job.keys, strict=True)
                if job.direction == "load" and self._contents.get(host_id, (None,))[0] != key
            ]
            if unknown:
                error = f"host blocks {unknown} do not hold the expected content"
                self._report(JobFinished(job.job_id, False, error, unknown))
            else:
                self._copies[job.direction].submit(job)

    def take_finished(self) -> list[JobFinished]:
        finished: list[JobFinished] = []
        while not self._reports.empty():
            finished.append(self._reports.get())
        return finished

    def close(self, timeout_s: float = 10.0) -> None:
        """Wait for all queued copies, then unpin. After ``timeout_s``, leave the memory pinned."""
        ends = [copies.close(timeout_s) for copies in self._copies.values()]
        if all(ends):
            self.host.close()
        else:
            logger.warning("offload copies did not end within %g s", timeout_s)

    def _report(self, report: JobFinished) -> None:
        self._reports.put(report)
        self._wake()

    def _prove(self, job: OffloadJob) -> list[int]:
        """Keep the checksums of stored blocks, or return the loaded blocks that have others. Runs
        in the thread of the job's direction.
        """
        if self._device_hasher is None:
            # The bytes of each head are contiguous within a block.
            blocks = (self.host.block(each).view(-1, self._head_bytes) for each in job.host_ids)
            found = [tuple(map(xxhash.xxh3_64_intdigest, block.numpy())) for block in blocks]
        else:
            with self._hasher_lock:
                checksums = self._device_hasher.start([job.block_ids], slice(None))
            found = list(map(tuple, checksums.result().tolist()))
        contents = dict(zip(job.host_ids, zip(job.keys, found, strict=True), strict=True))
        if job.direction == "store":
            self._contents |= contents
            return []
        return [
            host_id for host_id, content in contents.items() if self._contents[host_id] != content
        ]
