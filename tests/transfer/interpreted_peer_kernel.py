"""Runs the kernel over pieces of other memory than its anchor in Triton's interpreter; started by
``test_piece_copies``.

A process of its own: the interpreter is switched on by the environment before Triton is imported.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from pdlaunch.engine.memory.page_kernel import copy_pages
from pdlaunch.transfer.connectors.cuda_copies import relative_units
from pdlaunch.transfer.connectors.piece_copies import Pieces

SHAPES = ((1, 64, 1), (2, 256, 4), (3, 16, 4))
"""Programs, words of a tile, warps: pieces smaller than a tile, larger, and not a multiple of
it.
"""


def compare(random: np.random.Generator) -> None:
    size, num_slots = 16 * int(random.integers(1, 40)), int(random.integers(1, 9))
    anchor = torch.zeros(4, dtype=torch.int32)
    source = torch.randint(0, 256, (num_slots * size,), dtype=torch.uint8)
    expected, found = (
        torch.zeros(num_slots * size, dtype=torch.uint8),
        torch.zeros(num_slots * size, dtype=torch.uint8),
    )
    count = int(random.integers(1, num_slots + 1))
    to, of = (
        random.permutation(num_slots)[:count].astype(np.uint64) * np.uint64(size) for _ in range(2)
    )
    pieces = Pieces(to + np.uint64(found.data_ptr()), of + np.uint64(source.data_ptr()), size)
    units = relative_units(pieces, anchor.data_ptr(), pin=False)
    copy_pages(anchor, anchor, units, count, size, SHAPES[random.integers(len(SHAPES))])
    for here, there in zip(to.tolist(), of.tolist(), strict=True):
        ctypes.memmove(expected.data_ptr() + here, source.data_ptr() + there, size)
    assert torch.equal(found, expected), (size, count)


if __name__ == "__main__":
    for seed in range(8):
        compare(np.random.default_rng(seed))
