"""Copies KV blocks between the tensors of the KV cache and host memory.

``transfer_async`` and ``get_finished`` return at once. A block or chunk that a transfer names
belongs to it until its result is out: nobody else writes to what is read, or touches what is
written. Each direction has a thread. Between CPU tensors that thread copies; on CUDA the caller
enqueues on a stream of its own, behind what the current stream holds, and the thread waits.

The copy engines (``cuMemcpyBatchAsync``) move 52 to 54 GB/s each way from pages of 32 KiB on (one
H200, PCIe 5.0: 55), and take no multiprocessor from the model. A block of all layers is that large
in every model that is served; so there is no other method but torch's own copies, for drivers
without the call.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pdlaunch.engine.memory.batch_copies import BatchCopies
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.spec import (
    DIRECTIONS,
    ChunkLayout,
    Direction,
    GroupShape,
    GroupSpan,
    IntArray,
    TransferSpec,
)
from pdlaunch.errors import TransferError
from pdlaunch.machine.cuda_driver import DriverError

logger = logging.getLogger(__name__)

Pages = torch.Tensor  # [num_blocks, page_bytes] uint8: one tensor of a group, a row a block

NUM_BATCH_STREAMS = 3
"""One stream and three on an H200: blocks of 64 KiB 39 and 46 GB/s, of 256 KiB 49 and 52 GB/s."""


@dataclass(frozen=True, slots=True)
class PageCopies:
    """Pages of one tensor and their places in host memory. All arrays are [num_pages]."""

    device: Pages
    block_ids: IntArray  # rows of ``device``, no row twice
    host: HostMemory
    chunk_ids: IntArray
    chunk_offsets: IntArray  # the first byte of each page in its chunk

    @property
    def num_bytes(self) -> int:
        return len(self.block_ids) * self.device.shape[1]


@dataclass(frozen=True, slots=True)
class Runs:
    """Copies of maximal length: pages that are neighbours on both sides are one. All [num_runs]."""

    device_offsets: IntArray  # bytes from the start of the tensor
    host_pieces: IntArray
    host_offsets: IntArray  # bytes from the start of the piece
    sizes: IntArray


def as_pages(tensor: torch.Tensor) -> Pages:
    """Return the bytes of a contiguous tensor whose first dimension is the block."""
    assert tensor.is_contiguous()
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)


def chunk_layout(groups: Sequence[Sequence[torch.Tensor]], blocks_per_chunk: int) -> ChunkLayout:
    """Return how blocks of these groups lie in chunks; the tensors of a group hold the same
    blocks.
    """
    assert blocks_per_chunk > 0
    shapes = []
    for group in groups:
        pages = [as_pages(tensor) for tensor in group]
        assert len({each.shape[0] for each in pages}) == 1
        shapes.append(GroupShape(pages[0].shape[0], tuple(each.shape[1] for each in pages)))
    return ChunkLayout(tuple(shapes), blocks_per_chunk)


def plan_copies(
    spans: Sequence[GroupSpan],
    layout: ChunkLayout,
    groups: Sequence[Sequence[Pages]],
    host: HostMemory,
) -> list[PageCopies]:
    """Return one entry for each group and tensor."""
    copies = []
    for span in spans:
        chunk_ids, offsets = layout.places(span)
        # one block in a chunk   | page of tensor 0 | page of tensor 1 | ..
        #                        └ offsets          └ offsets + page bytes
        for pages in groups[span.group]:
            copies.append(PageCopies(pages, span.block_ids, host, chunk_ids, offsets))
            offsets = offsets + pages.shape[1]
    return copies


def merge_runs(copies: PageCopies) -> Runs:
    """Return the fewest copies that move the same bytes, in the given order of pages."""
    page_bytes = copies.device.shape[1]
    device = copies.block_ids * page_bytes
    pieces = copies.host.piece_of(copies.chunk_ids)
    host = copies.host.offsets(copies.chunk_ids) + copies.chunk_offsets
    # Runs end where pages are no neighbours on one side, or where host memory goes on elsewhere.
    breaks = (
        (np.diff(device) != page_bytes) | (np.diff(host) != page_bytes) | (np.diff(pieces) != 0)
    )
    starts = np.flatnonzero(np.concatenate(([True], breaks)))
    num_pages = np.diff(np.append(starts, len(device)))
    return Runs(device[starts], pieces[starts], host[starts], num_pages * page_bytes)


Copy = Callable[[PageCopies, Direction], None]
"""Copies all pages, or enqueues them on the current stream. Raises TransferError, RuntimeError."""


def copy_on_host(copies: PageCopies, direction: Direction) -> None:
    """Copy between CPU tensors; numpy releases the GIL meanwhile."""
    for device, host in _run_tensors(copies):
        source, target = (device, host) if direction == "store" else (host, device)
        np.copyto(target.numpy(), source.numpy())


def copy_by_torch(copies: PageCopies, direction: Direction) -> None:
    """Enqueue one torch copy for each run (12 GB/s at 64 KiB)."""
    for device, host in _run_tensors(copies):
        source, target = (device, host) if direction == "store" else (host, device)
        target.copy_(source, non_blocking=True)


def batch_copy() -> Copy:
    """Return the copy by the copy engines. Raises DriverError below CUDA 12.8."""
    batches = BatchCopies(NUM_BATCH_STREAMS)

    def copy(copies: PageCopies, direction: Direction) -> None:
        runs = merge_runs(copies)
        device = (runs.device_offsets + copies.device.data_ptr()).view(np.uint64)
        host = (runs.host_offsets + copies.host.piece_addresses[runs.host_pieces]).view(np.uint64)
        targets, sources = (host, device) if direction == "store" else (device, host)
        stream = torch.cuda.current_stream(copies.device.device)
        batches.enqueue(targets, sources, runs.sizes.view(np.uint64), stream)

    return copy


def fastest_copy(device: torch.device) -> Copy:
    """Return how to copy between this device and host memory."""
    if device.type != "cuda":
        return copy_on_host
    try:
        return batch_copy()
    except DriverError as error:
        logger.warning("copies of the host tier are slow: %s", error)
        return copy_by_torch


def _run_tensors(copies: PageCopies) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the device and host bytes of each run."""
    device, runs = copies.device.view(-1), merge_runs(copies)
    columns = (runs.device_offsets, runs.host_pieces, runs.host_offsets, runs.sizes)
    for at_device, piece, at_host, size in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        yield (
            device[at_device : at_device + size],
            copies.host.pieces[piece][at_host : at_host + size],
        )


@dataclass(frozen=True, slots=True)
class TransferResult:
    """One transfer has ended; its memory is not touched any more."""

    job_id: int
    direction: Direction
    ok: bool
    num_bytes: int
    seconds: float  # duration of the copy alone, without waiting for others
    error: str = ""


class OffloadHandler:
    """Moves blocks between the tensors of the KV cache groups and host memory.

    ``groups``: by group its tensors, each [num_blocks, ...] contiguous, all on one device; groups
    may share tensors. ``host``: chunks as ``chunk_layout(groups, blocks_per_chunk)`` lays them out.
    ``wake`` is called, from another thread, after each result. For one calling thread.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[torch.Tensor]],
        host: HostMemory,
        blocks_per_chunk: int,
        *,
        copy: Copy | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._layout = chunk_layout(groups, blocks_per_chunk)
        self._groups = [[as_pages(tensor) for tensor in group] for group in groups]
        assert host.chunk_bytes == self._layout.chunk_bytes
        self._host = host
        self._wake = wake
        self._results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        device = groups[0][0].device
        self._streams = {
            direction: _CopyStream(direction, copy or fastest_copy(device), self._report, device)
            for direction in DIRECTIONS
        }

    def transfer_async(self, job_id: int, spec: TransferSpec) -> None:
        """Queue a transfer behind those of its direction.

        Raises TransferSpecError, and copies nothing, when the spec does not fit the KV cache. Later
        failures are results of ``get_finished``. A transfer of no blocks finishes too.
        """
        spans = self._layout.split(spec, self._host.num_chunks)
        copies = plan_copies(spans, self._layout, self._groups, self._host)
        self._streams[spec.direction].submit(job_id, copies)

    def get_finished(self) -> list[TransferResult]:
        """Return the transfers that have ended since the last call, each once."""
        finished = []
        with contextlib.suppress(queue.Empty):
            while True:
                finished.append(self._results.get_nowait())
        return finished

    def close(self, timeout_s: float = 10.0) -> bool:
        """End both directions after what is queued; False: a copy still runs, so host memory must
        stay.
        """
        ended = [stream.close(timeout_s) for stream in self._streams.values()]
        return all(ended)

    def _report(self, result: TransferResult) -> None:
        self._results.put(result)
        self._wake()


class _CopyStream:
    """Runs the transfers of one direction in order, and reports each end from its thread."""

    def __init__(
        self,
        direction: Direction,
        copy: Copy,
        report: Callable[[TransferResult], None],
        device: torch.device,
    ) -> None:
        self._direction = direction
        self._copy = copy
        self._report = report
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ends: queue.SimpleQueue[tuple[int, int, Callable[[], float]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name=f"offload-{direction}", daemon=True)
        self._thread.start()

    def submit(self, job_id: int, copies: Sequence[PageCopies]) -> None:
        num_bytes = sum(pages.num_bytes for pages in copies)
        start = self._start_on_host if self._stream is None else self._start_on_cuda
        self._ends.put((job_id, num_bytes, start(copies)))

    def close(self, timeout_s: float) -> bool:
        """End the thread after the queued transfers; return False when that takes longer."""
        self._ends.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._ends.get()) is not None:
            job_id, num_bytes, end = item
            try:
                result = TransferResult(job_id, self._direction, True, num_bytes, end())
            except Exception as error:
                # Whatever it is, the blocks must not be used, and their owner must hear of it.
                text = f"{type(error).__name__}: {error}"
                result = TransferResult(job_id, self._direction, False, 0, 0.0, text)
            self._report(result)

    def _start_on_host(self, copies: Sequence[PageCopies]) -> Callable[[], float]:
        """Return a function that copies and returns the seconds that it took."""

        def copy() -> float:
            began_at = time.perf_counter()
            for pages in copies:
                self._copy(pages, self._direction)
            return time.perf_counter() - began_at

        return copy

    def _start_on_cuda(self, copies: Sequence[PageCopies]) -> Callable[[], float]:
        """Enqueue the copies; return a function that waits for them and returns their seconds."""
        stream = self._stream
        assert stream is not None
        # What the blocks were last used for may still be queued there.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # Blocking: the thread that waits sleeps, and takes no core from the step loop.
        end = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        failure: Exception | None = None
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            begin.record(stream)
            try:
                for pages in copies:
                    self._copy(pages, self._direction)
            except (RuntimeError, TransferError) as error:
                failure = error
            end.record(stream)

        def wait() -> float:
            # After a failure too: a part of the copies may be on its way.
            end.synchronize()
            if failure is not None:
                raise failure
            return float(begin.elapsed_time(end)) / 1000

        return wait
