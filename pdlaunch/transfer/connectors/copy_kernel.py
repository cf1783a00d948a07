"""Copies scattered pieces with a kernel, between memories that this device can address: its own, or
a peer's memory that is mapped here.

Import this module only if triton is installed.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from pdlaunch.transfer.regions import Addresses

UNIT_BYTES = 16  # the widest load of a thread; sizes and addresses must be multiples of it
# 32 programs with 32 KiB each: 1 MiB in flight, about NVLink's bandwidth times delay at 400 GB/s.
# Each program occupies one multiprocessor.
_NUM_PROGRAMS, _TILE_WORDS, _NUM_WARPS = 32, 8192, 8


# No Python types: Triton evaluates annotations. Compiled once for all values of num_pieces.
@triton.jit(do_not_specialize=["num_pieces"])  # type: ignore[untyped-decorator]
def _copy_pieces(  # type: ignore[no-untyped-def]  # noqa: ANN202
    anchor,  # noqa: ANN001
    units,  # noqa: ANN001
    num_columns,  # noqa: ANN001
    num_pieces,  # noqa: ANN001
    piece_units,  # noqa: ANN001
    ROWS: tl.constexpr,  # noqa: N803 - Triton's constants are in capitals
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Copy piece i from ``units[i]`` to ``units[num_columns + i]``, distances from ``anchor`` in
    units of 16 bytes. A tile has ROWS pieces by COLUMNS words; n programs copy every nth tile each.
    """
    piece_words = piece_units * 4
    tiles_per_piece = (piece_words + COLUMNS - 1) // COLUMNS
    num_tiles = ((num_pieces + ROWS - 1) // ROWS) * tiles_per_piece
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        pieces = (tile // tiles_per_piece) * ROWS + tl.arange(0, ROWS)
        words = (tile % tiles_per_piece) * COLUMNS + tl.arange(0, COLUMNS)
        is_piece = pieces < num_pieces
        is_word = is_piece[:, None] & (words < piece_words)[None, :]
        # The multiplication here shows the compiler that every row is aligned to UNIT_BYTES.
        sources = tl.load(units + pieces, mask=is_piece, other=0) * 4
        places = tl.load(units + num_columns + pieces, mask=is_piece, other=0) * 4
        content = tl.load(anchor + sources[:, None] + words[None, :], mask=is_word)
        tl.store(anchor + places[:, None] + words[None, :], content, mask=is_word)


def fits_kernel(destinations: Addresses, sources: Addresses, sizes: Addresses) -> bool:
    """Return True if the kernel can copy pieces of these addresses and sizes."""
    return not bool(((destinations | sources | sizes) & np.uint64(UNIT_BYTES - 1)).any())


def copy_pieces(
    anchor: torch.Tensor, destinations: Addresses, sources: Addresses, sizes: Addresses
) -> None:
    """Enqueue the copies on the current stream, one launch for each size. ``anchor``: any int32
    tensor on the device. ``fits_kernel`` must have returned True.
    """
    is_even = bool((sizes == sizes[0]).all())  # saves np.unique, which takes 1 ms
    for size in [int(sizes[0])] if is_even else np.unique(sizes).tolist():
        chosen = sizes == size
        num_pieces = int(chosen.sum())
        # Triton would compile again for another alignment of the second row.
        num_columns = -(-num_pieces // UNIT_BYTES) * UNIT_BYTES
        units = torch.zeros(2 * num_columns, dtype=torch.int64, pin_memory=anchor.is_cuda)
        for start, addresses in ((0, sources), (num_columns, destinations)):
            distances = addresses[chosen].astype(np.int64) - anchor.data_ptr()
            units.numpy()[start : start + num_pieces] = distances // UNIT_BYTES
        columns = min(triton.next_power_of_2(size // 4), _TILE_WORDS)
        _copy_pieces[(_NUM_PROGRAMS,)](
            anchor,
            units.to(anchor.device, non_blocking=True),
            num_columns,
            num_pieces,
            size // UNIT_BYTES,
            ROWS=_TILE_WORDS // columns,
            COLUMNS=columns,
            num_warps=_NUM_WARPS,
        )
