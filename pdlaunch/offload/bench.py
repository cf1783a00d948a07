"""What ``pdlaunch bench offload`` measures: block copies between device and host next to the contiguous limit of the same run."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from pdlaunch.errors import TransferError
from pdlaunch.offload.copies import Pages
from pdlaunch.offload.copy_methods import HostCopy, TorchCopy
from pdlaunch.offload.handler import OffloadHandler
from pdlaunch.offload.host_memory import HostMemory, Progress
from pdlaunch.offload.measure import CudaTrial, HostTrial, Trial
from pdlaunch.offload.method_choice import Candidates, MethodTable, PairRates, cuda_candidates, measure_pairs, pick_pair
from pdlaunch.offload.spec import CHUNK_ALIGNMENT_BYTES, DIRECTIONS, Direction, IntArray, TransferSpec

KIB = 1024
BLOCK_SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB)
DEFAULT_BYTES = 1024**3

_JOBS_PER_DIRECTION = 4
_ROUNDS_BESIDE_DECODE = 8
"""Enough to last longer than the steps beside which they run."""


@dataclass(frozen=True, slots=True)
class ContiguousLimit:
    """One copy of everything, GB/s (10**9 bytes a second)."""

    h2d: float
    d2h: float
    both: float
    """Sum of both directions at once."""


@dataclass(frozen=True, slots=True)
class PairRow:
    """One pair of methods at one block size; GB/s."""

    load: str
    store: str
    h2d: float
    d2h: float
    both: float


@dataclass(frozen=True, slots=True)
class OffloadRow:
    """Scattered blocks of one size."""

    block_bytes: int
    pairs: tuple[PairRow, ...]
    """Every pair of methods that was measured."""
    chosen: PairRow
    handler_both: float
    """GB/s of both directions at once, through the handler with the chosen methods."""
    decode_slowdown: float | None
    """Share by which a decode-like step takes longer while both directions run; None where it could not be measured."""


@dataclass(frozen=True, slots=True)
class OffloadReport:
    """The table and what it has to be compared with."""

    device: str
    num_bytes: int
    """Of each copy, in each direction."""
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

    Block sizes are multiples of 4 KiB. Takes host memory of twice ``num_bytes``, and two to three seconds a block size on a GPU.
    """
    assert all(size % CHUNK_ALIGNMENT_BYTES == 0 for size in block_sizes)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = _CudaBench(target, num_bytes) if target.type == "cuda" else _HostBench(target, num_bytes)
    limit = bench.contiguous()
    rows = []
    for index, block_bytes in enumerate(block_sizes):
        progress(f"blocks of {block_bytes} bytes", index / len(block_sizes))
        rows.append(bench.row(block_bytes))
    return OffloadReport(bench.device_name, num_bytes, limit, tuple(rows))


class _Bench(ABC):
    """Host memory is allocated anew for each block size, as chunks of one block."""

    device_name: str

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._device = device
        self._num_bytes = num_bytes

    @abstractmethod
    def trial(self, host: HostMemory) -> Trial:
        """Scattered blocks of one size."""

    @abstractmethod
    def candidates(self) -> Candidates:
        """Methods to compare."""

    @abstractmethod
    def decode_slowdown(self, traffic: _Traffic) -> float | None:
        """What a step loses while both directions run."""

    def contiguous(self) -> ContiguousLimit:
        """One block of everything."""
        host = self._host_memory(self._num_bytes)
        trial = self.trial(host)
        copy = TorchCopy()
        h2d, d2h, both = trial.alone(copy, "load"), trial.alone(copy, "store"), trial.both(copy, copy)
        host.close()
        return ContiguousLimit(h2d / 1e9, d2h / 1e9, both / 1e9)

    def row(self, block_bytes: int) -> OffloadRow:
        host = self._host_memory(block_bytes)
        trial = self.trial(host)
        pairs = measure_pairs(self.candidates(), trial.alone, trial.both)
        chosen = pick_pair(pairs)
        table = MethodTable(TorchCopy())
        table.set(block_bytes, "load", chosen.load)
        table.set(block_bytes, "store", chosen.store)
        traffic = _Traffic(trial.pages, host, table)
        try:
            best_s = min(traffic.run(_JOBS_PER_DIRECTION) for _ in range(3))
            slowdown = self.decode_slowdown(traffic)
        finally:
            traffic.close()
            host.close()
        handler_both = trial.pages.numel() / best_s / 1e9
        return OffloadRow(block_bytes, tuple(map(_pair_row, pairs)), _pair_row(chosen), handler_both, slowdown)

    def _host_memory(self, block_bytes: int) -> HostMemory:
        num_chunks = 2 * (self._num_bytes // block_bytes)
        is_cuda = self._device.type == "cuda"
        return HostMemory(num_chunks, block_bytes, pin=is_cuda, progress=lambda _text, _share: None)


class _CudaBench(_Bench):
    def __init__(self, device: torch.device, num_bytes: int) -> None:
        super().__init__(device, num_bytes)
        self.device_name = torch.cuda.get_device_name(device)
        self._step = DecodeLikeStep(device)

    def trial(self, host: HostMemory) -> Trial:
        return CudaTrial(host.chunk_bytes, host, self._device, self._num_bytes)

    def candidates(self) -> Candidates:
        return cuda_candidates()

    def decode_slowdown(self, traffic: _Traffic) -> float | None:
        alone_s = self._step.seconds()
        for _ in range(_ROUNDS_BESIDE_DECODE):
            traffic.submit(_JOBS_PER_DIRECTION)
        beside_s = self._step.seconds()
        still_running = traffic.is_busy()
        traffic.wait()
        return beside_s / alone_s - 1 if still_running else None


class _HostBench(_Bench):
    device_name = "cpu"

    def trial(self, host: HostMemory) -> Trial:
        return HostTrial(host.chunk_bytes, host, self._device, self._num_bytes)

    def candidates(self) -> Candidates:
        return {"load": [HostCopy()], "store": [HostCopy()]}

    def decode_slowdown(self, traffic: _Traffic) -> None:
        return None


def _pair_row(pair: PairRates) -> PairRow:
    return PairRow(pair.load.name, pair.store.name, pair.load_alone / 1e9, pair.store_alone / 1e9, pair.both / 1e9)


class DecodeLikeStep:
    """What a decode step does to a GPU: reads many weight matrices once, for few tokens, in one CUDA graph."""

    def __init__(self, device: torch.device, *, num_layers: int = 24, num_tokens: int = 32) -> None:
        weights = [torch.randn(4096, 14336, dtype=torch.bfloat16, device=device) for _ in range(num_layers)]
        inputs = torch.randn(num_tokens, 4096, dtype=torch.bfloat16, device=device)
        torch.mm(inputs, weights[0])
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = [torch.mm(inputs, weight) for weight in weights]
        self._weights = weights
        self._graph.replay()

    def seconds(self, num_steps: int = 40) -> float:
        """Median time of a step, one after another on the current stream."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for event in events[1:]:
            self._graph.replay()
            event.record()
        events[-1].synchronize()
        times = sorted(float(begin.elapsed_time(end)) / 1000 for begin, end in pairwise(events))
        return times[num_steps // 2]


class _Traffic:
    """Both directions through the handler: the first half of ``pages`` is loaded, the second stored, in random order."""

    def __init__(self, pages: Pages, host: HostMemory, table: MethodTable) -> None:
        self._finished = threading.Semaphore(0)
        self._handler = OffloadHandler([[pages]], host, 1, choose=table.choose, wake=self._finished.release)
        self._half = len(pages) // 2
        self._order = np.random.default_rng(0).permutation(self._half)
        self._chunks = np.random.default_rng(1).permutation(self._half)
        self._num_submitted = 0
        self._num_pending = dict.fromkeys(DIRECTIONS, 0)

    def run(self, jobs: int) -> float:
        """Seconds for one round of both halves, cut into ``jobs`` transfers a direction."""
        begin_s = time.perf_counter()
        self.submit(jobs)
        self.wait()
        return time.perf_counter() - begin_s

    def submit(self, jobs: int) -> None:
        """Queue one round."""
        parts = zip(np.array_split(self._order, jobs), np.array_split(self._chunks, jobs), strict=True)
        for block_ids, chunk_ids in parts:
            self._submit("load", block_ids, chunk_ids)
            self._submit("store", block_ids + self._half, chunk_ids + self._half)

    def wait(self) -> None:
        """Until nothing is under way."""
        while any(self._num_pending.values()):
            self._finished.acquire()
            self._collect()

    def is_busy(self) -> bool:
        """Both directions are still under way."""
        self._collect()
        return all(self._num_pending.values())

    def close(self) -> None:
        """End the handler."""
        self._handler.close(60.0)

    def _submit(self, direction: Direction, block_ids: IntArray, chunk_ids: IntArray) -> None:
        spec = TransferSpec(direction, block_ids, [len(block_ids)], [0], chunk_ids)
        self._handler.transfer_async(self._num_submitted, spec)
        self._num_submitted += 1
        self._num_pending[direction] += 1

    def _collect(self) -> None:
        for result in self._handler.get_finished():
            if not result.ok:
                raise TransferError(result.error)
            self._num_pending[result.direction] -= 1
