"""Times copies of scattered pages, to choose among the copy methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pdlaunch.engine.offload.copies import PageCopies, Pages
from pdlaunch.engine.offload.copy_methods import CopyMethod
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.spec import Direction, IntArray

JOB_BYTES = 64 * 1024**2
"""Bytes that one call copies. The next call is prepared meanwhile, so that only the first one's
preparation is measured.
"""
_SEED = 6


def scattered_copies(pages: Pages, host: HostMemory, chunk_ids: IntArray) -> list[PageCopies]:
    """Return copies of all ``pages``, in random order, to or from these chunks, with an equal
    number of pages in each chunk; each job has whole chunks.
    """
    num_jobs = min(max(1, pages.numel() // JOB_BYTES), len(chunk_ids))
    blocks_per_chunk = len(pages) // len(chunk_ids)
    orders = np.random.default_rng(_SEED).permutation(len(pages)).reshape(-1, blocks_per_chunk)
    offsets = np.arange(blocks_per_chunk, dtype=np.int64) * pages.shape[1]
    return [
        PageCopies(
            pages,
            order.ravel(),
            host,
            np.repeat(chunks, blocks_per_chunk),
            np.tile(offsets, len(chunks)),
        )
        for order, chunks in zip(
            np.array_split(orders, num_jobs), np.array_split(chunk_ids, num_jobs), strict=True
        )
    ]


class Trial:
    """Times copies of scattered pages of one size between fresh memory of ``device`` and chunks all
    over host memory, half of them for each direction.

    ``blocks_per_chunk`` pages, one after another, fill a chunk.
    """

    def __init__(
        self,
        page_bytes: int,
        host: HostMemory,
        device: torch.device,
        num_bytes: int,
        *,
        blocks_per_chunk: int = 1,
    ) -> None:
        num_chunks = max(1, min(num_bytes // (blocks_per_chunk * page_bytes), host.num_chunks // 2))
        num_pages = num_chunks * blocks_per_chunk
        self.pages = torch.randint(
            0, 256, (2 * num_pages, page_bytes), dtype=torch.uint8, device=device
        )
        chunk_ids = np.random.default_rng(_SEED).permutation(host.num_chunks)
        self._copies: dict[Direction, Sequence[PageCopies]] = {
            "load": scattered_copies(self.pages[:num_pages], host, chunk_ids[:num_chunks]),
            "store": scattered_copies(
                self.pages[num_pages:], host, chunk_ids[num_chunks : 2 * num_chunks]
            ),
        }
        self.num_bytes = num_pages * page_bytes
        """Bytes that are copied in each direction."""

    def supports(self, method: CopyMethod) -> bool:
        """Say whether a method can copy these pages in both directions."""
        return all(method.supports(copies) for jobs in self._copies.values() for copies in jobs)

    def alone(self, method: CopyMethod, direction: Direction) -> float:
        """Return the bytes per second of one direction."""
        return self.num_bytes / host_seconds(lambda: self._copy(method, direction))

    def both(self, load: CopyMethod, store: CopyMethod) -> float:
        """Return the bytes per second of both directions, from the beginning of the first to the
        end of the last.
        """
        return 2 * self.num_bytes / host_seconds(lambda: self._copy_both(load, store))

    def _copy(self, method: CopyMethod, direction: Direction) -> None:
        """Copy everything, and return when it has been copied."""
        for copies in self._copies[direction]:
            method.copy(copies, direction)

    def _copy_both(self, load: CopyMethod, store: CopyMethod) -> None:
        with ThreadPoolExecutor(2) as pool:
            loading = pool.submit(self._copy, load, "load")
            pool.submit(self._copy, store, "store").result()
            loading.result()


class CudaTrial(Trial):
    """Times copies between a GPU and pinned memory."""

    def __init__(
        self,
        page_bytes: int,
        host: HostMemory,
        device: torch.device,
        num_bytes: int,
        *,
        blocks_per_chunk: int = 1,
    ) -> None:
        super().__init__(page_bytes, host, device, num_bytes, blocks_per_chunk=blocks_per_chunk)
        self._streams: dict[Direction, torch.cuda.Stream] = {
            direction: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for direction in self._copies
        }
        torch.cuda.synchronize(device)

    def _copy(self, method: CopyMethod, direction: Direction) -> None:
        with torch.cuda.stream(self._streams[direction]):
            super()._copy(method, direction)
        self._streams[direction].synchronize()

    def _copy_both(self, load: CopyMethod, store: CopyMethod) -> None:
        """Enqueue both directions by turns from one thread, as the handler's caller does."""
        jobs = zip(self._copies["load"], self._copies["store"], strict=True)
        for load_copies, store_copies in jobs:
            with torch.cuda.stream(self._streams["load"]):
                load.copy(load_copies, "load")
            with torch.cuda.stream(self._streams["store"]):
                store.copy(store_copies, "store")
        for stream in self._streams.values():
            stream.synchronize()


def cuda_seconds(enqueue: Callable[[], object], *, repeats: int = 5) -> float:
    """Return the median time from begin to end of what ``enqueue`` puts on the current stream,
    submitting included; it is warmed up once.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    times: list[float] = []
    with torch.cuda.stream(stream):
        for _ in range(repeats + 1):
            stream.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record(stream)
            enqueue()
            end.record(stream)
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1000)
    return sorted(times[1:])[repeats // 2]


def host_seconds(copy: Callable[[], object], *, repeats: int = 3) -> float:
    """Return the median time of a copy that blocks; it is warmed up once."""
    times = []
    for _ in range(repeats + 1):
        began_at = time.perf_counter()
        copy()
        times.append(time.perf_counter() - began_at)
    return sorted(times[1:])[repeats // 2]
