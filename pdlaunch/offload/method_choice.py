"""Which copy methods to use for which page size, decided by measuring them at start.

Both directions share PCIe: a read asks upstream for what comes downstream, and stores fill the upstream way. So pairs of a load
and a store method are compared, by what they move alone and what they move together. A multiprocessor that copies does not
compute: of pairs that are nearly as good as the best one, that which takes the fewest is chosen.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pdlaunch.offload.copies import PageCopies
from pdlaunch.offload.copy_methods import CopyMethod, HostCopy, TorchCopy
from pdlaunch.offload.host_memory import HostMemory
from pdlaunch.offload.spec import DIRECTIONS, Direction
from pdlaunch.platform.cuda_driver import DriverError

logger = logging.getLogger(__name__)

NEARLY = 0.97
"""Share of the best score that counts as equal: more than the spread of a measurement."""
HOPEFUL = 0.75
"""Methods that are slower than this share of the fastest alone are not measured in pairs."""
TRIAL_BYTES = 256 * 1024**2

Candidates = Mapping[Direction, Sequence[CopyMethod]]
"""By direction, in the order of preference: what costs the fewest multiprocessors first."""


@dataclass(frozen=True, slots=True)
class PairRates:
    """A load and a store method for one page size; rates in bytes per second."""

    load: CopyMethod
    store: CopyMethod
    load_alone: float
    store_alone: float
    both: float
    """Sum of both directions at once."""

    @property
    def score(self) -> float:
        return self.load_alone + self.store_alone + self.both


class MethodTable:
    """The chosen methods. ``fallback`` is used for page sizes that were not measured or are not supported."""

    def __init__(self, fallback: CopyMethod) -> None:
        self._fallback = fallback
        self._chosen: dict[tuple[int, Direction], CopyMethod] = {}

    def set(self, page_bytes: int, direction: Direction, method: CopyMethod) -> None:
        self._chosen[page_bytes, direction] = method

    def choose(self, copies: PageCopies, direction: Direction) -> CopyMethod:
        """The method for these pages."""
        method = self._chosen.get((copies.page_bytes, direction), self._fallback)
        return method if method.supports(copies) else self._fallback


def host_methods() -> MethodTable:
    """For CPU tensors there is nothing to choose."""
    return MethodTable(HostCopy())


def cuda_candidates() -> Candidates:
    """What this machine offers."""
    loads: list[CopyMethod] = []
    stores: list[CopyMethod] = []
    try:
        from pdlaunch.offload.batch_copy import BatchCopy

        batch = BatchCopy()
        loads.append(batch)
        stores.append(batch)
    except DriverError as error:
        logger.info("no batch copies: %s", error)
    if importlib.util.find_spec("triton") is not None:
        from pdlaunch.offload.gather_kernel import LOAD_KERNELS, STORE_KERNELS, GatherKernel

        loads += [GatherKernel(*shape) for shape in LOAD_KERNELS]
        stores += [GatherKernel(*shape) for shape in STORE_KERNELS]
    return {"load": loads, "store": stores}


def pick_pair(pairs: Sequence[PairRates]) -> PairRates:
    """The first pair that is nearly as good as the best."""
    best = max(pair.score for pair in pairs)
    return next(pair for pair in pairs if pair.score >= NEARLY * best)


def measure_pairs(
    candidates: Candidates,
    alone: Callable[[CopyMethod, Direction], float],
    both: Callable[[CopyMethod, CopyMethod], float],
) -> list[PairRates]:
    """Pairs of methods that are not far behind alone, in the order of preference.

    ``alone`` and ``both`` (load, store) return bytes per second.
    """
    rates = {direction: {method: alone(method, direction) for method in candidates[direction]} for direction in DIRECTIONS}
    return [
        PairRates(load, store, load_alone, store_alone, both(load, store))
        for load, load_alone in _hopeful(rates["load"])
        for store, store_alone in _hopeful(rates["store"])
    ]


def _hopeful(rates: Mapping[CopyMethod, float]) -> list[tuple[CopyMethod, float]]:
    fastest = max(rates.values(), default=0.0)
    return [(method, rate) for method, rate in rates.items() if rate >= HOPEFUL * fastest]


def choose_cuda_methods(
    page_sizes: Iterable[int], host: HostMemory, device: torch.device, candidates: Candidates | None = None
) -> MethodTable:
    """Measure on this device with the (still empty) host memory, whose content is overwritten."""
    from pdlaunch.offload.measure import CudaTrial

    offered = candidates or cuda_candidates()
    table = MethodTable(TorchCopy())
    # Twice as much is allocated, beside weights and KV cache.
    trial_bytes = min(TRIAL_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    for page_bytes in sorted(set(page_sizes)):
        if host.num_chunks < 2:
            break
        trial = CudaTrial(page_bytes, host, device, trial_bytes)
        able = {direction: [method for method in offered[direction] if trial.supports(method)] for direction in DIRECTIONS}
        if pairs := measure_pairs(able, trial.alone, trial.both):
            pair = pick_pair(pairs)
            table.set(page_bytes, "load", pair.load)
            table.set(page_bytes, "store", pair.store)
            logger.info(
                "blocks of %d bytes: load by %s %.1f GB/s, store by %s %.1f GB/s, both at once %.1f GB/s",
                page_bytes,
                pair.load.name,
                pair.load_alone / 1e9,
                pair.store.name,
                pair.store_alone / 1e9,
                pair.both / 1e9,
            )
    return table
