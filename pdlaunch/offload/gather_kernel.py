"""A Triton kernel that copies scattered pages between the device's memory and pinned host memory, which it maps.

A few programs go through all pages, each with tens of KiB in flight: PCIe is filled from a small part of the multiprocessors, the
rest computes. Import this module only where triton is there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pdlaunch.offload.copies import PageCopies
from pdlaunch.offload.copy_methods import CopyMethod
from pdlaunch.offload.spec import Direction, IntArray

UNIT_BYTES = 16
"""Pages and their places are multiples of the widest load of a thread."""
WORDS_PER_UNIT = 4

TILE_WORDS = 8192
NUM_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def copy_pages(
    source: Any,
    destination: Any,
    source_units: Any,
    destination_units: Any,
    num_pages: Any,
    PAGE_WORDS: tl.constexpr,  # noqa: N803 - Triton's constants are in capitals
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
) -> None:
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
    """``num_programs`` programs copy; each occupies at most one multiprocessor."""

    def __init__(self, num_programs: int) -> None:
        self.name = f"kernel/{num_programs}"
        self._num_programs = num_programs

    def supports(self, copies: PageCopies) -> bool:
        offsets_fit = not (copies.host_offsets % UNIT_BYTES).any()
        addresses_fit = (copies.device.data_ptr() | copies.host.data_ptr()) % UNIT_BYTES == 0
        return copies.page_bytes % UNIT_BYTES == 0 and offsets_fit and addresses_fit

    def copy(self, copies: PageCopies, direction: Direction) -> None:
        target = copies.device.device
        device, host = copies.device.view(-1).view(torch.int32), copies.host.view(torch.int32)
        device_units = _on_device(copies.block_ids * (copies.page_bytes // UNIT_BYTES), target)
        host_units = _on_device(copies.host_offsets // UNIT_BYTES, target)
        page_words = copies.page_bytes // 4
        columns = min(triton.next_power_of_2(page_words), TILE_WORDS)
        stores = direction == "store"
        copy_pages[(self._num_programs,)](
            device if stores else host,
            host if stores else device,
            device_units if stores else host_units,
            host_units if stores else device_units,
            len(copies.block_ids),
            PAGE_WORDS=page_words,
            ROWS=TILE_WORDS // columns,
            COLUMNS=columns,
            num_warps=NUM_WARPS,
        )


def _on_device(values: IntArray, target: torch.device) -> torch.Tensor:
    """Copied on the current stream, from pinned memory that torch keeps until then."""
    tensor = torch.from_numpy(values)
    return tensor if target.type == "cpu" else tensor.pin_memory().to(target, non_blocking=True)
