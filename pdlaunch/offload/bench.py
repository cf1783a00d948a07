"""What ``pdlaunch bench offload`` measures: block copies between device and host next to the contiguous limit of the same run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pdlaunch.errors import TransferError
from pdlaunch.offload.copies import PageCopies
from pdlaunch.offload.copy_methods import CopyMethod, HostCopy, TorchCopy
from pdlaunch.offload.handler import OffloadHandler
from pdlaunch.offload.host_memory import HostMemory, Progress
from pdlaunch.offload.measure import cuda_seconds, host_seconds, scattered_copies
from pdlaunch.offload.method_choice import MethodTable, cuda_candidates, measure_methods
from pdlaunch.offload.spec import CHUNK_ALIGNMENT_BYTES, DIRECTIONS, Direction, IntArray, TransferSpec

KIB = 1024
BLOCK_SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB)
DEFAULT_BYTES = 1024**3

_JOBS_PER_DIRECTION = 4
TRAFFIC_ROUNDS = 6
"""Enough transfers to last longer than the steps beside which they run."""


@dataclass(frozen=True, slots=True)
class ContiguousLimit:
    """One copy of everything, GB/s (10**9 bytes a second)."""

    h2d: float
    d2h: float
    both: float
    """Sum of both directions at once."""


@dataclass(frozen=True, slots=True)
class OffloadRow:
    """Scattered blocks of one size; rates in GB/s, by name of the method."""

    block_bytes: int
    h2d: dict[str, float]
    d2h: dict[str, float]
    chosen_h2d: str
    chosen_d2h: str
    both: float
    """Sum of both directions at once, through the handler with the chosen methods."""
    decode_slowdown: float | None
    """Share by which a decode-like step takes longer while both directions run; None without a GPU."""


@dataclass(frozen=True, slots=True)
class OffloadReport:
    """The table and what it has to be compared with."""

    device: str
    num_bytes: int
    pin_seconds: float
    limit: ContiguousLimit
    rows: tuple[OffloadRow, ...]


def bench_offload(
    *,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    device: str | None = None,
    num_bytes: int = DEFAULT_BYTES,
    progress: Progress = lambda _text, _share: None,
) -> OffloadReport:
    """Measure block copies of ``num_bytes`` in each direction. ``device``: ``cuda`` where there is one, unless given.

    Block sizes are multiples of 4 KiB. Takes about a second for each size on a GPU.
    """
    assert all(size % CHUNK_ALIGNMENT_BYTES == 0 for size in block_sizes)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    begin_s = time.perf_counter()
    host = HostMemory(2 * num_bytes // CHUNK_ALIGNMENT_BYTES, CHUNK_ALIGNMENT_BYTES, pin=target.type == "cuda", progress=progress)
    pin_seconds = time.perf_counter() - begin_s
    try:
        bench = _Bench(target, host, num_bytes)
        limit = bench.contiguous()
        rows = []
        for index, block_bytes in enumerate(block_sizes):
            progress(f"blocks of {block_bytes} bytes", index / len(block_sizes))
            rows.append(bench.row(block_bytes))
    finally:
        host.close()
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else "cpu"
    return OffloadReport(name, num_bytes, pin_seconds, limit, tuple(rows))


class _Bench:
    """Device and host memory of twice ``num_bytes``: one half is stored, the other loaded."""

    def __init__(self, device: torch.device, host: HostMemory, num_bytes: int) -> None:
        self._device = device
        self._host = host
        self._num_bytes = num_bytes
        self._memory = torch.randint(0, 256, (2 * num_bytes,), dtype=torch.uint8, device=device)
        self._is_cuda = device.type == "cuda"
        self._candidates: list[CopyMethod] = cuda_candidates() if self._is_cuda else [HostCopy()]

    def contiguous(self) -> ContiguousLimit:
        half, host = self._memory[: self._num_bytes], self._host.tensor[: self._num_bytes]
        h2d = self._seconds(lambda: half.copy_(host, non_blocking=True))
        d2h = self._seconds(lambda: host.copy_(half, non_blocking=True))
        pages = self._memory.view(2, self._num_bytes)
        both = self._both_directions(pages, self._num_bytes, jobs=1, table=MethodTable(TorchCopy()))
        return ContiguousLimit(self._rate(h2d), self._rate(d2h), both)

    def row(self, block_bytes: int) -> OffloadRow:
        rates: dict[Direction, dict[str, float]] = {direction: {} for direction in DIRECTIONS}

        def measure(method: CopyMethod, copies: PageCopies, direction: Direction) -> float:
            rate = copies.num_bytes / self._seconds(lambda: method.copy(copies, direction))
            rates[direction][method.name] = rate / 1e9
            return rate

        table = measure_methods(
            [block_bytes],
            self._candidates,
            lambda page_bytes: scattered_copies(page_bytes, self._host.tensor, self._device, self._num_bytes),
            measure,
        )
        names = table.names()
        pages = self._memory[: 2 * self._num_bytes // block_bytes * block_bytes].view(-1, block_bytes)
        return OffloadRow(
            block_bytes=block_bytes,
            h2d=rates["load"],
            d2h=rates["store"],
            chosen_h2d=names[block_bytes, "load"],
            chosen_d2h=names[block_bytes, "store"],
            both=self._both_directions(pages, block_bytes, jobs=_JOBS_PER_DIRECTION, table=table),
            decode_slowdown=self._decode_slowdown(pages, table) if self._is_cuda else None,
        )

    def _both_directions(self, pages: torch.Tensor, block_bytes: int, *, jobs: int, table: MethodTable) -> float:
        """Best of three; GB/s of both directions together."""
        traffic = _Traffic(pages, self._host, table)
        try:
            best_s = min(traffic.run(jobs) for _ in range(3))
        finally:
            traffic.close()
        return 2 * self._num_bytes // block_bytes * block_bytes / best_s / 1e9

    def _decode_slowdown(self, pages: torch.Tensor, table: MethodTable) -> float | None:
        step = DecodeLikeStep(self._device)
        alone_s = step.seconds()
        traffic = _Traffic(pages, self._host, table)
        try:
            for _ in range(TRAFFIC_ROUNDS):
                traffic.submit(_JOBS_PER_DIRECTION)
            beside_s = step.seconds()
            still_running = traffic.is_busy()
        finally:
            traffic.close()
        return beside_s / alone_s - 1 if still_running else None

    def _seconds(self, copy: Callable[[], object]) -> float:
        return cuda_seconds(copy) if self._is_cuda else host_seconds(copy)

    def _rate(self, seconds: float) -> float:
        return self._num_bytes / seconds / 1e9


class DecodeLikeStep:
    """What a decode step does to a GPU: reads many weight matrices once, for few tokens, in one CUDA graph."""

    def __init__(self, device: torch.device, *, num_layers: int = 24, num_tokens: int = 32) -> None:
        weights = [torch.randn(4096, 14336, dtype=torch.bfloat16, device=device) for _ in range(num_layers)]
        inputs = torch.randn(num_tokens, 4096, dtype=torch.bfloat16, device=device)
        for weight in weights[:3]:
            torch.mm(inputs, weight)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = [torch.mm(inputs, weight) for weight in weights]
        self._weights = weights

    def seconds(self, num_steps: int = 60) -> float:
        """Mean time of a step."""

        def replay() -> None:
            for _ in range(num_steps):
                self._graph.replay()

        return cuda_seconds(replay, repeats=1) / num_steps


class _Traffic:
    """Both directions through the handler: the first half of ``pages`` is stored, the second loaded, in random order."""

    def __init__(self, pages: torch.Tensor, host: HostMemory, table: MethodTable) -> None:
        self._finished = threading.Semaphore(0)
        self._handler = OffloadHandler([[pages]], host, 1, choose=table.choose, wake=self._finished.release)
        self._half = len(pages) // 2
        self._order = np.random.default_rng(0).permutation(self._half)
        self._num_submitted = 0
        self._num_pending = dict.fromkeys(DIRECTIONS, 0)

    def run(self, jobs: int) -> float:
        """Seconds for one round of both halves, cut into ``jobs`` transfers a direction."""
        begin_s = time.perf_counter()
        self.submit(jobs)
        while any(self._num_pending.values()):
            self._finished.acquire()
            self._collect()
        return time.perf_counter() - begin_s

    def submit(self, jobs: int) -> None:
        for part in np.array_split(self._order, jobs):
            self._submit("store", part)
            self._submit("load", part + self._half)

    def is_busy(self) -> bool:
        """Both directions are still under way."""
        self._collect()
        return all(self._num_pending.values())

    def close(self) -> None:
        self._handler.close(60.0)

    def _submit(self, direction: Direction, block_ids: IntArray) -> None:
        spec = TransferSpec(direction, block_ids, [len(block_ids)], [0], block_ids[::-1])
        self._handler.transfer_async(self._num_submitted, spec)
        self._num_submitted += 1
        self._num_pending[direction] += 1

    def _collect(self) -> None:
        for result in self._handler.get_finished():
            if not result.ok:
                raise TransferError(result.error)
            self._num_pending[result.direction] -= 1
