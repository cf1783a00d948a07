"""Chooses the copy methods for each page size, by measuring them at start.

Both directions share PCIe: a read sends its requests upstream, behind the stores that fill that
way. A store as fast as the link leaves a load half of its speed, so a direction is copied
differently while the other one copies too: for that case pairs of a load and a store method are
compared. A multiprocessor that copies does not compute, so of the methods that are nearly as good
as the best, the one that occupies the fewest is chosen.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from pdlaunch.engine.offload.copies import PageCopies
from pdlaunch.engine.offload.copy_methods import BatchCopy, CopyMethod, HostCopy, TorchCopy
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.spec import DIRECTIONS, Direction
from pdlaunch.machine.cuda_driver import DriverError

logger = logging.getLogger(__name__)

NEARLY = 0.97
"""Share of the best rate that counts as equal to it: the spread of a measurement is smaller."""
HOPEFUL = 0.7
"""Methods that are slower than this share of the fastest alone are not measured in pairs."""
TRIAL_BYTES = 256 * 1024**2

Candidates = Mapping[Direction, Sequence[CopyMethod]]
"""Methods of each direction in the order of preference: those that occupy the fewest
multiprocessors first.
"""
Pair = tuple[CopyMethod, CopyMethod]
"""A load and a store method."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class MethodRates:
    """Rates that were measured for one page size, in the order of preference; bytes per second."""

    alone: Mapping[Direction, Mapping[CopyMethod, float]]
    both: Mapping[Pair, float]
    """Sum of both directions at once."""

    def best_alone(self, direction: Direction) -> CopyMethod:
        """Return the method for a direction while the other one rests."""
        return _first_of_the_best(self.alone[direction])

    def best_pair(self) -> Pair:
        """Return the methods for both directions at once."""
        return _first_of_the_best(self.both)


class MethodTable:
    """Holds the chosen methods. ``fallback`` is used for page sizes that were not measured or are
    not supported.
    """

    def __init__(self, fallback: CopyMethod) -> None:
        self._fallback = fallback
        self._chosen: dict[tuple[int, Direction, bool], CopyMethod] = {}

    def set(self, page_bytes: int, rates: MethodRates) -> None:
        """Decide for one page size."""
        pair = dict(zip(("load", "store"), rates.best_pair(), strict=True))
        for direction in DIRECTIONS:
            self._chosen[page_bytes, direction, False] = rates.best_alone(direction)
            self._chosen[page_bytes, direction, True] = pair[direction]

    def choose(self, copies: PageCopies, direction: Direction, both_ways: bool) -> CopyMethod:
        """Return the method for these pages. ``both_ways``: the other direction copies too."""
        method = self._chosen.get((copies.page_bytes, direction, both_ways), self._fallback)
        return method if method.supports(copies) else self._fallback


def host_methods() -> MethodTable:
    """Return the only method for CPU tensors."""
    return MethodTable(HostCopy())


def cuda_candidates() -> Candidates:
    """Return the methods that this machine offers."""
    loads: list[CopyMethod] = []
    stores: list[CopyMethod] = []
    try:
        batch = BatchCopy()
        loads.append(batch)
        stores.append(batch)
    except DriverError as error:
        logger.info("no batch copies: %s", error)
    if importlib.util.find_spec("triton") is not None:
        from pdlaunch.engine.offload.gather_kernel import LOAD_KERNELS, STORE_KERNELS, GatherKernel

        loads += [GatherKernel(*shape) for shape in LOAD_KERNELS]
        stores += [GatherKernel(*shape) for shape in STORE_KERNELS]
    return {"load": loads, "store": stores}


def measure_methods(
    candidates: Candidates,
    alone: Callable[[CopyMethod, Direction], float],
    both: Callable[[CopyMethod, CopyMethod], float],
) -> MethodRates:
    """Measure all candidates alone, and pairs of those that are not far behind.

    ``alone`` and ``both`` (load, store) return bytes per second.
    """
    rates = {
        direction: {method: alone(method, direction) for method in candidates[direction]}
        for direction in DIRECTIONS
    }
    pairs = {
        (load, store): both(load, store)
        for load in _hopeful(rates["load"])
        for store in _hopeful(rates["store"])
    }
    return MethodRates(rates, pairs)


def _first_of_the_best(rates: Mapping[_T, float]) -> _T:
    best = max(rates.values())
    return next(choice for choice, rate in rates.items() if rate >= NEARLY * best)


def _hopeful(rates: Mapping[CopyMethod, float]) -> list[CopyMethod]:
    fastest = max(rates.values(), default=0.0)
    return [method for method, rate in rates.items() if rate >= HOPEFUL * fastest]


def choose_cuda_methods(
    page_sizes: Iterable[int],
    host: HostMemory,
    device: torch.device,
    *,
    blocks_per_chunk: int = 1,
    candidates: Candidates | None = None,
) -> MethodTable:
    """Measure on this device with the (still empty) host memory, whose content is overwritten."""
    from pdlaunch.engine.offload.measure import CudaTrial

    offered = candidates or cuda_candidates()
    table = MethodTable(TorchCopy())
    # Twice as much is allocated, beside weights and KV cache.
    trial_bytes = min(TRIAL_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    for page_bytes in sorted(set(page_sizes)):
        # Each direction needs a chunk of its own.
        if host.num_chunks < 2:
            break
        trial = CudaTrial(page_bytes, host, device, trial_bytes, blocks_per_chunk=blocks_per_chunk)
        able = {
            direction: [method for method in offered[direction] if trial.supports(method)]
            for direction in DIRECTIONS
        }
        if all(able.values()):
            rates = measure_methods(able, trial.alone, trial.both)
            table.set(page_bytes, rates)
            logger.info("blocks of %d bytes: %s", page_bytes, _describe(rates))
    return table


def _describe(rates: MethodRates) -> str:
    load, store = rates.best_alone("load"), rates.best_alone("store")
    pair = rates.best_pair()
    return (
        f"load by {load.name} {rates.alone['load'][load] / 1e9:.1f} GB/s, store by {store.name} "
        f"{rates.alone['store'][store] / 1e9:.1f} GB/s, both at once by {pair[0].name} and "
        f"{pair[1].name} "
        f"{rates.both[pair] / 1e9:.1f} GB/s"
    )
