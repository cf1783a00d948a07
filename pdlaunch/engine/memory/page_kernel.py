"""A Triton kernel copies scattered pages of equal size between memories that this device reaches:
its own, pinned host memory, or a peer's that is mapped here. A few programs go through all pages,
each with tens of KiB in flight.

Import this module only where triton is there.
"""

from __future__ import annotations

# Triton reads annotations of kernels: only its own may stand there. Its constants are in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import torch
import triton
import triton.language as tl

UNIT_BYTES = 16  # pages and their places are multiples of the widest load of a thread

KernelShape = tuple[int, int, int]  # programs, words of a tile, warps of a program


# It must not compile anew for another number of pages.
@triton.jit(do_not_specialize=["num_pages"])
def _copy_pages(
    source,
    destination,
    source_units,
    destination_units,
    num_pages,
    page_units,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copy page i from ``source_units[i]`` to ``destination_units[i]``, counted in 16 bytes.

    Memory is [..] int32. A tile is ROWS pages by COLUMNS words; program p of n takes the tiles p, p
    + n, p + 2n ...
    """
    # Not a constant: ptxas would begin with a part of the content before it asks for all places,
    # and wait for these several times. Measured on an H200 with pages of 4 KiB in tiles of 32 KiB:
    # 33 instead of 51 GB/s.
    page_words = page_units * 4
    tiles_per_page = (page_words + COLUMNS - 1) // COLUMNS
    num_tiles = ((num_pages + ROWS - 1) // ROWS) * tiles_per_page
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        pages = (tile // tiles_per_page) * ROWS + tl.arange(0, ROWS)
        words = (tile % tiles_per_page) * COLUMNS + tl.arange(0, COLUMNS)
        is_page = pages < num_pages
        is_word = is_page[:, None] & (words < page_words)[None, :]
        # Multiplying by the unit here shows the compiler that every row is aligned to it.
        starts = tl.load(source_units + pages, mask=is_page, other=0) * 4
        ends = tl.load(destination_units + pages, mask=is_page, other=0) * 4
        content = tl.load(source + starts[:, None] + words[None, :], mask=is_word)
        tl.store(destination + ends[:, None] + words[None, :], content, mask=is_word)


def copy_pages(
    source: torch.Tensor,
    destination: torch.Tensor,
    units: torch.Tensor,
    num_pages: int,
    page_bytes: int,
    shape: KernelShape,
) -> None:
    """Enqueue on the current stream: page i from ``units[0, i]`` of ``source`` to ``units[1, i]``
    of ``destination``.

    Memories are [..] int32, one of them on the device; units of 16 bytes from their starts, which
    may lie before or behind the tensor: [2, num_columns] int64 on the device,
    ``padded_columns(num_pages)``.
    """
    num_programs, tile_words, num_warps = shape
    columns = min(triton.next_power_of_2(page_bytes // 4), tile_words)
    _copy_pages[(num_programs,)](
        source,
        destination,
        units[0],
        units[1],
        num_pages,
        page_bytes // UNIT_BYTES,
        ROWS=tile_words // columns,
        COLUMNS=columns,
        num_warps=num_warps,
    )


def padded_columns(num_pages: int) -> int:
    """Return the number of columns that aligns both rows alike in every transfer: another alignment
    would be another compilation.
    """
    return -(-num_pages // UNIT_BYTES) * UNIT_BYTES
