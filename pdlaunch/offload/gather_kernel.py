"""A Triton kernel that copies scattered pages between the device's memory and pinned host memory, which it maps.

A few programs go through all pages, each with tens of KiB in flight: PCIe is filled from a small part of the multiprocessors, the
rest computes. Import this module only where triton is there.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from pdlaunch.offload.copies import PageCopies
from pdlaunch.offload.copy_methods import CopyMethod
from pdlaunch.offload.spec import Direction

UNIT_BYTES = 16
"""Pages and their places are multiples of the widest load of a thread."""
WORDS_PER_UNIT = 4


KernelShape = tuple[int, int, int]
"""Programs, words of a tile, warps of a program."""

LOAD_KERNELS: tuple[KernelShape, ...] = ((2, 32768, 8), (4, 16384, 8))
STORE_KERNELS: tuple[KernelShape, ...] = ((2, 8192, 8), (3, 4096, 4))
"""By programs, fewest first. Stores that keep more in flight starve loads."""


# Triton reads annotations: only its own may stand here. It must not compile anew for another number of pages.
@triton.jit(do_not_specialize=["num_pages"])  # type: ignore[untyped-decorator]
def copy_pages(  # type: ignore[no-untyped-def]  # noqa: ANN201
    source,  # noqa: ANN001
    destination,  # noqa: ANN001
    source_units,  # noqa: ANN001
    destination_units,  # noqa: ANN001
    num_pages,  # noqa: ANN001
    PAGE_WORDS: tl.constexpr,  # noqa: N803 - Triton's constants are in capitals
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Copy page i from ``source_units[i]`` to ``destination_units[i]``, counted in 16 bytes.

    Memory is [..] int32. A tile is ROWS pages by COLUMNS words; program p of n takes the tiles p, p + n, p + 2n ...
    """
    tiles_per_page: tl.constexpr = (PAGE_WORDS + COLUMNS - 1) // COLUMNS
    num_tiles = ((num_pages + ROWS - 1) // ROWS) * tiles_per_page
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        pages = (tile // tiles_per_page) * ROWS + tl.arange(0, ROWS)
        words = (tile % tiles_per_page) * COLUMNS + tl.arange(0, COLUMNS)
        is_page = pages < num_pages
        is_word = is_page[:, None] & (words < PAGE_WORDS)[None, :]
        # Multiplying by the unit here shows the compiler that every row is aligned to it.
        starts = tl.load(source_units + pages, mask=is_page, other=0) * 4
        ends = tl.load(destination_units + pages, mask=is_page, other=0) * 4
        content = tl.load(source + starts[:, None] + words[None, :], mask=is_word)
        tl.store(destination + ends[:, None] + words[None, :], content, mask=is_word)


class GatherKernel(CopyMethod):
    """``num_programs`` programs copy; each occupies at most one multiprocessor and has ``tile_words`` words in flight."""

    def __init__(self, num_programs: int, tile_words: int, num_warps: int) -> None:
        self.name = f"kernel/{num_programs}x{tile_words // 256}KiB"
        self._num_programs = num_programs
        self._tile_words = tile_words
        self._num_warps = num_warps

    def supports(self, copies: PageCopies) -> bool:
        if copies.page_bytes % UNIT_BYTES or copies.device.data_ptr() % UNIT_BYTES:
            return False
        # Chunks begin on pages of the machine.
        return not (copies.chunk_offsets % UNIT_BYTES).any()

    def copy(self, copies: PageCopies, direction: Direction) -> None:
        target = copies.device.device
        device, host = copies.device.view(-1).view(torch.int32), copies.host.pieces[0].view(torch.int32)
        num_pages = len(copies.block_ids)
        # Padded, so that both rows are aligned alike in every transfer: another alignment is another compilation.
        num_columns = -(-num_pages // UNIT_BYTES) * UNIT_BYTES
        units = torch.empty((2, num_columns), dtype=torch.int64, pin_memory=target.type == "cuda")
        values = units.numpy()[:, :num_pages]
        np.multiply(copies.block_ids, copies.page_bytes // UNIT_BYTES, out=values[0])
        # Pieces of host memory are told apart by their distance from the first: it may be negative.
        np.floor_divide(copies.host_addresses() - host.data_ptr(), UNIT_BYTES, out=values[1])
        # Torch keeps pinned memory until the copy on this stream has read it.
        device_units, host_units = units.to(target, non_blocking=True)
        page_words = copies.page_bytes // 4
        columns = min(triton.next_power_of_2(page_words), self._tile_words)
        stores = direction == "store"
        copy_pages[(self._num_programs,)](
            device if stores else host,
            host if stores else device,
            device_units if stores else host_units,
            host_units if stores else device_units,
            num_pages,
            PAGE_WORDS=page_words,
            ROWS=self._tile_words // columns,
            COLUMNS=columns,
            num_warps=self._num_warps,
        )
