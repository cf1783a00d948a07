"""Measures block copies between device and host (``pdlaunch bench offload``), next to the
contiguous limit of the same run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pdlaunch.bench.offload.traffic import DecodeLikeStep, Traffic
from pdlaunch.engine.kvcache.host_chunks import CHUNK_ALIGNMENT_BYTES, choose_blocks_per_chunk
from pdlaunch.engine.offload.copy_methods import HostCopy, TorchCopy
from pdlaunch.engine.offload.host_memory import AllocationProgress, HostMemory
from pdlaunch.engine.offload.measure import CudaTrial, Trial
from pdlaunch.engine.offload.method_choice import (
    Candidates,
    MethodRates,
    MethodTable,
    cuda_candidates,
    measure_methods,
)
from pdlaunch.engine.offload.spec import DIRECTIONS, Direction
from pdlaunch.errors import ConfigError

KIB = 1024
BLOCK_SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB)
DEFAULT_BYTES = {"cuda": 1024**3, "cpu": 32 * 1024**2}
"""Bytes to copy by kind of device: enough to measure, and copied within seconds."""

_WAYS: tuple[tuple[Direction, ...], ...] = (("load",), ("store",), ("load", "store"))
"""Directions that are measured, in the order of ``Speeds``."""
_BYTES_BESIDE_DECODE = 1024**3
"""Bytes in each direction, before the steps begin and again meanwhile: together enough to last
longer than the steps do.
"""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Holds figures of H2D alone, D2H alone, and both at once."""

    h2d: float
    d2h: float
    both: float


@dataclass(frozen=True, slots=True)
class OffloadRow:
    """Holds the figures of scattered blocks of one size, in GB/s (10**9 bytes a second).

    That of both directions is their sum.
    """

    block_bytes: int
    chunk_bytes: int
    """Size of the blocks that lie together on the host: as many as the engine lets share a chunk.
    """
    rates: MethodRates
    """Rates of every method and pair that was measured, in bytes per second."""
    methods: Speeds
    """Speeds of the chosen methods, one call after another."""
    handler: Speeds
    """Speeds of the handler with the chosen methods."""
    decode_slowdown: Speeds | None
    """Share by which a decode-like step takes longer meanwhile; None where it could not be
    measured.
    """


@dataclass(frozen=True, slots=True)
class OffloadReport:
    """Holds the rows and what they have to be compared with."""

    device: str
    num_bytes: int
    """Size of each copy, in each direction."""
    limit: Speeds
    """Speeds of one copy of everything, in GB/s."""
    rows: tuple[OffloadRow, ...]


def bench_offload(
    *,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    device: str | None = None,
    num_bytes: int | None = None,
    progress: AllocationProgress = lambda _text, _share: None,
) -> OffloadReport:
    """Measure block copies of ``num_bytes`` in each direction. ``device``: ``cuda`` where there is
    one, unless given.

    Block sizes are multiples of 4 KiB. Takes host memory of twice ``num_bytes``, and two to three
    seconds a block size on a GPU. Raises ConfigError for sizes that cannot be measured and for a
    device that is not there.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if num_bytes is None:
        num_bytes = DEFAULT_BYTES[target.type]
    _check(target, block_sizes, num_bytes)
    bench = (
        _CudaBench(target, num_bytes) if target.type == "cuda" else _HostBench(target, num_bytes)
    )
    limit = bench.contiguous()
    rows = []
    for index, block_bytes in enumerate(block_sizes):
        progress(f"blocks of {block_bytes} bytes", index / len(block_sizes))
        rows.append(bench.row(block_bytes))
    return OffloadReport(bench.device_name, num_bytes, limit, tuple(rows))


def _check(device: torch.device, block_sizes: Sequence[int], num_bytes: int) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: torch finds no CUDA device here",
            field="device",
            value=str(device),
            fix="Take --device cpu.",
        )
    for size in block_sizes:
        if size < 1 or size % CHUNK_ALIGNMENT_BYTES:
            raise ConfigError(
                f"block_sizes: {size} bytes are no multiple of {CHUNK_ALIGNMENT_BYTES}",
                field="block_sizes",
                value=size,
                fix="Take --block-sizes such as 4KiB,64KiB.",
            )
    if num_bytes < max(block_sizes):
        raise ConfigError(
            f"memory: {num_bytes} bytes are less than one block of {max(block_sizes)}",
            field="memory",
            value=num_bytes,
            fix="Take a larger --memory or smaller --block-sizes.",
        )


class _Bench(ABC):
    """Measures on one kind of device.

    Host memory is allocated anew for each block size, in the chunks of an engine with such blocks.
    """

    device_name: str

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._device = device
        self._num_bytes = num_bytes

    @abstractmethod
    def trial(self, host: HostMemory, blocks_per_chunk: int) -> Trial:
        """Prepare copies of scattered blocks of one size, which fill the chunks."""

    @abstractmethod
    def candidates(self) -> Candidates:
        """Return the methods to compare."""

    @abstractmethod
    def decode_slowdown(self, traffic: Traffic) -> Speeds | None:
        """Measure what a step loses meanwhile."""

    def contiguous(self) -> Speeds:
        """Measure one block of everything."""
        host = self._host_memory(self._num_bytes)
        trial = self.trial(host, 1)
        copy = TorchCopy()
        h2d, d2h, both = (
            trial.alone(copy, "load"),
            trial.alone(copy, "store"),
            trial.both(copy, copy),
        )
        host.close()
        return Speeds(h2d / 1e9, d2h / 1e9, both / 1e9)

    def row(self, block_bytes: int) -> OffloadRow:
        blocks_per_chunk = min(
            choose_blocks_per_chunk(block_bytes, self._device.type), self._num_bytes // block_bytes
        )
        host = self._host_memory(blocks_per_chunk * block_bytes)
        trial = self.trial(host, blocks_per_chunk)
        rates = measure_methods(self.candidates(), trial.alone, trial.both)
        table = MethodTable(TorchCopy())
        table.set(block_bytes, rates)
        traffic = Traffic(trial.pages, host, table, blocks_per_chunk=blocks_per_chunk)
        try:
            h2d, d2h, both = (
                len(directions)
                * trial.num_bytes
                / min(traffic.run(directions) for _ in range(3))
                / 1e9
                for directions in _WAYS
            )
            slowdown = self.decode_slowdown(traffic)
        finally:
            traffic.close()
            host.close()
        return OffloadRow(
            block_bytes, host.chunk_bytes, rates, _speeds(rates), Speeds(h2d, d2h, both), slowdown
        )

    def _host_memory(self, chunk_bytes: int) -> HostMemory:
        num_chunks = 2 * (self._num_bytes // chunk_bytes)
        is_cuda = self._device.type == "cuda"
        return HostMemory(num_chunks, chunk_bytes, pin=is_cuda, progress=lambda _text, _share: None)


class _CudaBench(_Bench):
    def __init__(self, device: torch.device, num_bytes: int) -> None:
        super().__init__(device, num_bytes)
        self.device_name = torch.cuda.get_device_name(device)
        self._step = DecodeLikeStep(device)
        self._beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def trial(self, host: HostMemory, blocks_per_chunk: int) -> Trial:
        """Prepare copies of scattered blocks of one size, which fill the chunks."""
        page_bytes = host.chunk_bytes // blocks_per_chunk
        return CudaTrial(
            page_bytes, host, self._device, self._num_bytes, blocks_per_chunk=blocks_per_chunk
        )

    def candidates(self) -> Candidates:
        """Return the methods to compare."""
        return cuda_candidates()

    def decode_slowdown(self, traffic: Traffic) -> Speeds | None:
        """Measure what a step loses meanwhile."""
        shares = [self._slowdown(traffic, directions) for directions in _WAYS]
        measured = [share for share in shares if share is not None]
        return Speeds(*measured) if len(measured) == len(shares) else None

    def _slowdown(self, traffic: Traffic, directions: Sequence[Direction]) -> float | None:
        def submit() -> None:
            # The handler queues transfers behind the current stream, where the steps are.
            with torch.cuda.stream(self._beside):
                for _ in range(max(1, _BYTES_BESIDE_DECODE // self._num_bytes)):
                    traffic.submit(directions)

        alone_s = self._step.seconds()
        submit()
        beside_s = self._step.seconds(meanwhile=submit)
        still_running = traffic.is_busy(directions)
        traffic.wait()
        return beside_s / alone_s - 1 if still_running else None


class _HostBench(_Bench):
    device_name = "cpu"

    def trial(self, host: HostMemory, blocks_per_chunk: int) -> Trial:
        """Prepare copies of scattered blocks of one size, which fill the chunks."""
        page_bytes = host.chunk_bytes // blocks_per_chunk
        return Trial(
            page_bytes, host, self._device, self._num_bytes, blocks_per_chunk=blocks_per_chunk
        )

    def candidates(self) -> Candidates:
        """Return the methods to compare."""
        return {"load": [HostCopy()], "store": [HostCopy()]}

    def decode_slowdown(self, traffic: Traffic) -> None:
        """Measure nothing: no steps run beside copies on a CPU."""


def _speeds(rates: MethodRates) -> Speeds:
    load, store = (
        rates.alone[direction][rates.best_alone(direction)] / 1e9 for direction in DIRECTIONS[::-1]
    )
    return Speeds(load, store, rates.both[rates.best_pair()] / 1e9)


def report_figures(report: OffloadReport) -> dict[str, Any]:
    """Return a report as an object of JSON: GB/s, shares."""
    return {
        "device": report.device,
        "num_bytes": report.num_bytes,
        "limit": _figures(report.limit, "gb_per_s"),
        "rows": [_row_figures(row) for row in report.rows],
    }


def _row_figures(row: OffloadRow) -> dict[str, Any]:
    rates = row.rates
    load, store = rates.best_pair()
    return {
        "block_bytes": row.block_bytes,
        "chunk_bytes": row.chunk_bytes,
        "load_method": rates.best_alone("load").name,
        "store_method": rates.best_alone("store").name,
        "both_methods": f"{load.name} {store.name}",
        **_figures(row.methods, "gb_per_s"),
        **{f"handler_{name}": figure for name, figure in _figures(row.handler, "gb_per_s").items()},
        **(
            {}
            if row.decode_slowdown is None
            else _figures(row.decode_slowdown, "decode_slowdown_share", 3)
        ),
        "alone": {
            way: {method.name: round(rate / 1e9, 2) for method, rate in rates.alone[way].items()}
            for way in DIRECTIONS
        },
        "pairs": {
            f"{load.name} {store.name}": round(rate / 1e9, 2)
            for (load, store), rate in rates.both.items()
        },
    }


def _figures(speeds: Speeds, unit: str, digits: int = 2) -> dict[str, float]:
    return {
        f"{name}_{unit}": round(getattr(speeds, name), digits) for name in ("h2d", "d2h", "both")
    }
