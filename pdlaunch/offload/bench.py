"""What ``pdlaunch bench offload`` measures: block copies between device and host next to the contiguous limit of the same run."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pdlaunch.errors import ConfigError
from pdlaunch.offload.bench_traffic import DecodeLikeStep, Traffic
from pdlaunch.offload.copy_methods import HostCopy, TorchCopy
from pdlaunch.offload.host_memory import HostMemory, Progress
from pdlaunch.offload.measure import CudaTrial, HostTrial, Trial
from pdlaunch.offload.method_choice import Candidates, MethodTable, PairRates, cuda_candidates, measure_pairs, pick_pair
from pdlaunch.offload.spec import CHUNK_ALIGNMENT_BYTES

KIB = 1024
BLOCK_SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB)
DEFAULT_BYTES = {"cuda": 1024**3, "cpu": 32 * 1024**2}
"""By kind of device: enough to measure, seconds to wait."""

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
    num_bytes: int | None = None,
    progress: Progress = lambda _text, _share: None,
) -> OffloadReport:
    """Measure block copies of ``num_bytes`` in each direction. ``device``: ``cuda`` where there is one, unless given.

    Block sizes are multiples of 4 KiB. Takes host memory of twice ``num_bytes``, and two to three seconds a block size on a GPU.
    Raises ConfigError for sizes that cannot be measured and for a device that is not there.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if num_bytes is None:
        num_bytes = DEFAULT_BYTES[target.type]
    _check(target, block_sizes, num_bytes)
    bench = _CudaBench(target, num_bytes) if target.type == "cuda" else _HostBench(target, num_bytes)
    limit = bench.contiguous()
    rows = []
    for index, block_bytes in enumerate(block_sizes):
        progress(f"blocks of {block_bytes} bytes", index / len(block_sizes))
        rows.append(bench.row(block_bytes))
    return OffloadReport(bench.device_name, num_bytes, limit, tuple(rows))


def _check(device: torch.device, block_sizes: Sequence[int], num_bytes: int) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: torch finds no CUDA device here", field="device", value=str(device), fix="Take --device cpu.")
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
    def decode_slowdown(self, traffic: Traffic) -> float | None:
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
        traffic = Traffic(trial.pages, host, table)
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

    def decode_slowdown(self, traffic: Traffic) -> float | None:
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

    def decode_slowdown(self, traffic: Traffic) -> None:
        return None


def _pair_row(pair: PairRates) -> PairRow:
    return PairRow(pair.load.name, pair.store.name, pair.load_alone / 1e9, pair.store_alone / 1e9, pair.both / 1e9)


def main() -> None:
    """``python -m pdlaunch.offload.bench JSON``: the arguments of ``bench_offload`` as an object; prints its report as JSON."""
    # Each direction has one thread of the handler; the limit gets no more.
    torch.set_num_threads(1)
    try:
        report = bench_offload(**json.loads(sys.argv[1]))
    except ConfigError as error:
        sys.exit(f"error: {error}\nfix: {error.fix}")
    rows = [
        _pair_figures(row.chosen)
        | {
            "block_bytes": row.block_bytes,
            "handler_both_gb_per_s": round(row.handler_both, 2),
            "decode_slowdown_share": None if row.decode_slowdown is None else round(row.decode_slowdown, 3),
            "pairs": [_pair_figures(pair) for pair in row.pairs],
        }
        for row in report.rows
    ]
    head = {"device": report.device, "num_bytes": report.num_bytes, "limit": _figures(report.limit)}
    sys.stdout.write(json.dumps(head | {"rows": rows}) + "\n")


def _pair_figures(pair: PairRow) -> dict[str, Any]:
    return {"load_method": pair.load, "store_method": pair.store} | _figures(pair)


def _figures(rates: ContiguousLimit | PairRow) -> dict[str, float]:
    return {f"{name}_gb_per_s": round(getattr(rates, name), 2) for name in ("h2d", "d2h", "both")}


if __name__ == "__main__":
    main()
