"""Timing of copies."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pdlaunch.offload.copies import PageCopies, Pages
from pdlaunch.offload.copy_methods import CopyMethod
from pdlaunch.offload.host_memory import HostMemory
from pdlaunch.offload.spec import Direction

_SEED = 6
MOST_PAGES = 65536
"""More would only take longer."""


def scattered_copies(pages: Pages, host: HostMemory, first_chunk: int) -> PageCopies:
    """All of ``pages`` to or from the beginnings of as many chunks, in random order on both sides."""
    random = np.random.default_rng(_SEED)
    order = random.permutation(len(pages))
    chunk_ids = first_chunk + random.permutation(len(pages))
    return PageCopies(pages, order, host, chunk_ids, np.zeros_like(chunk_ids))


class Trial(ABC):
    """Scattered pages of one size: fresh device memory, and the first chunks of host memory, half for each direction."""

    def __init__(self, page_bytes: int, host: HostMemory, device: torch.device, num_bytes: int) -> None:
        num_pages = max(1, min(num_bytes // page_bytes, host.num_chunks // 2, MOST_PAGES))
        self.pages = torch.randint(0, 256, (2 * num_pages, page_bytes), dtype=torch.uint8, device=device)
        self._copies: dict[Direction, PageCopies] = {
            "load": scattered_copies(self.pages[:num_pages], host, 0),
            "store": scattered_copies(self.pages[num_pages:], host, num_pages),
        }
        self._num_bytes = num_pages * page_bytes

    def supports(self, method: CopyMethod) -> bool:
        """In both directions."""
        return all(method.supports(copies) for copies in self._copies.values())

    def alone(self, method: CopyMethod, direction: Direction) -> float:
        """Bytes per second."""
        return self._num_bytes / self._seconds(lambda: method.copy(self._copies[direction], direction))

    def both(self, load: CopyMethod, store: CopyMethod) -> float:
        """Bytes per second of both directions, from the beginning of the first to the end of the last."""
        return 2 * self._num_bytes / self._seconds_of_both(load, store)

    @abstractmethod
    def _seconds(self, copy: Callable[[], None]) -> float: ...

    @abstractmethod
    def _seconds_of_both(self, load: CopyMethod, store: CopyMethod) -> float: ...


class CudaTrial(Trial):
    """Between a GPU and pinned memory."""

    def __init__(self, page_bytes: int, host: HostMemory, device: torch.device, num_bytes: int) -> None:
        super().__init__(page_bytes, host, device, num_bytes)
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def _seconds(self, copy: Callable[[], None]) -> float:
        return cuda_seconds(copy)

    def _seconds_of_both(self, load: CopyMethod, store: CopyMethod) -> float:
        def copy() -> None:
            with torch.cuda.stream(self._streams[0]):
                load.copy(self._copies["load"], "load")
            with torch.cuda.stream(self._streams[1]):
                store.copy(self._copies["store"], "store")
            torch.cuda.synchronize()

        torch.cuda.synchronize()
        return host_seconds(copy)


class HostTrial(Trial):
    """Between two CPU tensors."""

    def _seconds(self, copy: Callable[[], None]) -> float:
        return host_seconds(copy)

    def _seconds_of_both(self, load: CopyMethod, store: CopyMethod) -> float:
        with ThreadPoolExecutor(2) as pool:

            def copy() -> None:
                loading = pool.submit(load.copy, self._copies["load"], "load")
                pool.submit(store.copy, self._copies["store"], "store").result()
                loading.result()

            return host_seconds(copy)


def cuda_seconds(enqueue: Callable[[], object], *, repeats: int = 5) -> float:
    """Median time from begin to end of what ``enqueue`` puts on the current stream, submitting included; warmed up once."""
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
    """Median time of a copy that blocks; warmed up once."""
    times = []
    for _ in range(repeats + 1):
        begin_s = time.perf_counter()
        copy()
        times.append(time.perf_counter() - begin_s)
    return sorted(times[1:])[repeats // 2]
