"""Copies KV blocks between the KV cache and host memory, a queue for each direction.

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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from pdlaunch.engine.memory.batch_copies import BatchCopies
from pdlaunch.engine.offload.host_memory import HostMemory, IntArray
from pdlaunch.engine.offload.jobs import Direction, JobFinished
from pdlaunch.errors import TransferError
from pdlaunch.machine.cuda_driver import DriverError

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
        """Queue a copy. Raises nothing: its end is reported, whatever becomes of it."""
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
        """Copy, and return the seconds that it took."""
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
