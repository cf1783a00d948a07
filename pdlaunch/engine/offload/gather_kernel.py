"""A kernel copies scattered pages between device memory and pinned host memory, which the device
maps.

A few multiprocessors fill PCIe; the rest compute. Import this module only where triton is
installed.
"""

from __future__ import annotations

import numpy as np
import torch

from pdlaunch.engine.memory.page_kernel import UNIT_BYTES, KernelShape, copy_pages, padded_columns
from pdlaunch.engine.offload.copies import PageCopies
from pdlaunch.engine.offload.copy_methods import CopyMethod
from pdlaunch.engine.offload.spec import Direction

LOAD_KERNELS: tuple[KernelShape, ...] = ((5, 8192, 8), (10, 4096, 4))
"""Kernels for loads, those with the fewest programs first. 160 KiB in flight fill the link of an
H200; with 256 KiB decoding loses 7 % instead of 5 %.
"""
STORE_KERNELS: tuple[KernelShape, ...] = (
    (2, 8192, 8),
    (3, 4096, 4),
    (4, 2048, 4),
    (4, 4096, 4),
    (8, 2048, 4),
)
"""Kernels for stores. A store as fast as the link delays loads, which ask for their bytes over the
same way up, and one with much in flight delays everybody: a decode step took twice as long beside
256 KiB of writes. So these are the least that fills the link and some that stay a little below it;
which is best depends on page size and host. Figures: docs/performance.md.
"""


class GatherKernel(CopyMethod):
    """Copies pages: ``num_programs`` programs copy; each occupies at most one multiprocessor and
    has ``tile_words`` words in flight.
    """

    def __init__(self, num_programs: int, tile_words: int, num_warps: int) -> None:
        self.name = f"kernel/{num_programs}x{tile_words // 256}KiB"
        self._shape = num_programs, tile_words, num_warps

    def supports(self, copies: PageCopies) -> bool:
        if copies.page_bytes % UNIT_BYTES or copies.device.data_ptr() % UNIT_BYTES:
            return False
        # Chunks begin on pages of the machine.
        return not np.bitwise_or.reduce(copies.chunk_offsets) % UNIT_BYTES

    def copy(self, copies: PageCopies, direction: Direction) -> None:
        target = copies.device.device
        device, host = (
            copies.device.view(-1).view(torch.int32),
            copies.host.pieces[0].view(torch.int32),
        )
        num_pages = len(copies.block_ids)
        units = torch.empty(
            (2, padded_columns(num_pages)), dtype=torch.int64, pin_memory=target.type == "cuda"
        )
        source_units, destination_units = units.numpy()[:, :num_pages]
        at_host, at_device = (
            (destination_units, source_units)
            if direction == "store"
            else (source_units, destination_units)
        )
        np.multiply(copies.block_ids, copies.page_bytes // UNIT_BYTES, out=at_device)
        # Pieces of host memory are told apart by their distance from the first: it may be negative.
        np.floor_divide(copies.host_addresses() - host.data_ptr(), UNIT_BYTES, out=at_host)
        source, destination = (device, host) if direction == "store" else (host, device)
        # Torch keeps pinned memory until the copy on this stream has read it.
        copy_pages(
            source,
            destination,
            units.to(target, non_blocking=True),
            num_pages,
            copies.page_bytes,
            self._shape,
        )
