"""Runs the copy kernel in Triton's interpreter.

``test_p2p`` starts it as a process: the environment enables the interpreter before Triton's import.
"""

from __future__ import annotations

import numpy as np
import torch

from pdlaunch.transfer.connectors.copy_kernel import copy_pieces, fits_kernel

SLOT_BYTES = 40_000  # the largest piece is larger than a tile


def copy(sizes: list[int], random: np.random.Generator) -> None:
    num_slots = len(sizes) + 3
    source = torch.from_numpy(random.integers(0, 256, (num_slots, SLOT_BYTES), dtype=np.uint8))
    target = torch.zeros_like(source)
    anchor = torch.zeros(4, dtype=torch.int32)
    to, of = (random.permutation(num_slots)[: len(sizes)] for _ in range(2))
    columns = [
        slots.astype(np.uint64) * np.uint64(SLOT_BYTES) + np.uint64(memory.data_ptr())
        for slots, memory in ((to, target), (of, source))
    ]
    lengths = np.array(sizes, dtype=np.uint64)
    assert fits_kernel(*columns, lengths)
    copy_pieces(anchor, *columns, lengths)
    expected = torch.zeros_like(source)
    for here, there, size in zip(to, of, sizes, strict=True):
        expected[here, :size] = source[there, :size]
    assert torch.equal(target, expected), sizes


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    for lengths in ([16], [4096] * 19, [32 * 1024, 48, 32 * 1024, 33 * 1024 + 16]):
        copy(lengths, generator)
    assert not fits_kernel(*np.array([[16], [16], [8]], dtype=np.uint64))
