"""Which copy method to use for which page size and direction, decided by measuring all of them at start.

A multiprocessor that copies does not compute, and the copy engine costs none: of the methods that are nearly as fast as the
fastest, the one that takes the fewest multiprocessors is chosen.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from pdlaunch.offload.copies import PageCopies
from pdlaunch.offload.copy_methods import CopyMethod, HostCopy, TorchCopy
from pdlaunch.offload.spec import DIRECTIONS, Direction
from pdlaunch.platform.cuda_driver import DriverError

logger = logging.getLogger(__name__)

KERNEL_PROGRAMS = (8, 16, 32)
"""Multiprocessors that the kernel may take."""
NEARLY = 0.97
"""Share of the fastest rate that counts as equal: more than the spread of a measurement."""

Rates = Mapping[CopyMethod, float]
"""By method, bytes per second; methods in the order of preference."""


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

    def names(self) -> dict[tuple[int, Direction], str]:
        """By page size and direction: what was chosen."""
        return {key: method.name for key, method in self._chosen.items()}


def host_methods() -> MethodTable:
    """For CPU tensors there is nothing to choose."""
    return MethodTable(HostCopy())


def cuda_candidates() -> list[CopyMethod]:
    """What this machine offers, in the order of preference: what costs the fewest multiprocessors first."""
    candidates: list[CopyMethod] = []
    try:
        from pdlaunch.offload.batch_copy import BatchCopy

        candidates.append(BatchCopy())
    except DriverError as error:
        logger.info("no batch copies: %s", error)
    if importlib.util.find_spec("triton") is not None:
        from pdlaunch.offload.gather_kernel import GatherKernel

        candidates += [GatherKernel(num_programs) for num_programs in KERNEL_PROGRAMS]
    return candidates


def pick(rates: Rates) -> CopyMethod:
    """The first method that is nearly as fast as the fastest."""
    fastest = max(rates.values())
    return next(method for method, rate in rates.items() if rate >= NEARLY * fastest)


def measure_methods(
    page_sizes: Iterable[int],
    candidates: Sequence[CopyMethod],
    make_copies: Callable[[int], PageCopies],
    measure: Callable[[CopyMethod, PageCopies, Direction], float],
) -> MethodTable:
    """Measure all candidates for each page size. ``measure`` returns bytes per second."""
    table = MethodTable(TorchCopy())
    for page_bytes in sorted(set(page_sizes)):
        copies = make_copies(page_bytes)
        able = [method for method in candidates if method.supports(copies)]
        for direction in DIRECTIONS:
            rates = {method: measure(method, copies, direction) for method in able}
            if rates:
                method = pick(rates)
                table.set(page_bytes, direction, method)
                logger.info("%s of %d bytes by %s at %.1f GB/s", direction, page_bytes, method.name, rates[method] / 1e9)
    return table


def choose_cuda_methods(page_sizes: Iterable[int], host: torch.Tensor, device: torch.device) -> MethodTable:
    """Measure on this device with the (still empty) pinned host memory, whose content is overwritten."""
    from pdlaunch.offload.measure import cuda_seconds, scattered_copies

    def make_copies(page_bytes: int) -> PageCopies:
        return scattered_copies(page_bytes, host, device)

    def measure(method: CopyMethod, copies: PageCopies, direction: Direction) -> float:
        return copies.num_bytes / cuda_seconds(lambda: method.copy(copies, direction))

    return measure_methods(page_sizes, cuda_candidates(), make_copies, measure)
