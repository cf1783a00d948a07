"""Runs the checksum kernel in Triton's interpreter and compares it with xxHash.

``test_checksum`` starts it as a process, because the environment must switch the interpreter on
before Triton is imported.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import torch
import xxhash

from pdlaunch.transfer.integrity.checksum_kernel import UNIT_BYTES, constants, hash_pages, supports

CPU = torch.device("cpu")
# Lengths at and beside the ends of stripes, blocks and tiles, and the shortest length.
EDGES = (256, 1008, 1024, 1040, 1088, 8192, 8208, 9216, 9232, 16384, 65536)


def compare(region_bytes: int, random: np.random.Generator) -> None:
    num_blocks, num_heads = (int(number) for number in random.integers(1, 5, 2))
    memory = torch.from_numpy(
        random.integers(0, 256, (num_blocks, num_heads, region_bytes), dtype=np.uint8)
    )
    assert supports(memory)
    block_ids = random.permutation(num_blocks)[: random.integers(1, num_blocks + 1)]
    first_head = int(random.integers(num_heads))
    heads = range(first_head, int(random.integers(first_head + 1, num_heads + 1)))
    results = torch.zeros((len(block_ids), len(heads)), dtype=torch.int64)
    units = torch.from_numpy(block_ids) * (num_heads * region_bytes // UNIT_BYTES)
    hash_pages(memory, units, region_bytes, first_head, results, constants(CPU))
    expected = [
        [xxhash.xxh3_64_intdigest(memory[block, head].numpy()) for head in heads]
        for block in block_ids
    ]
    assert results.numpy().view(np.uint64).tolist() == expected, (
        region_bytes,
        num_blocks,
        num_heads,
        heads,
    )


def compare_far_away() -> None:
    """Check a region that begins after 2^31 words. Untouched pages of the file need no memory."""
    num_blocks = 2**20 + 9
    file = os.memfd_create("far away")
    os.ftruncate(file, num_blocks * 2 * 8192)
    memory = torch.frombuffer(mmap.mmap(file, 0), dtype=torch.uint8).view(num_blocks, 2, 8192)
    region = memory[-1, 1]
    region.random_(0, 256)
    results = torch.zeros((1, 1), dtype=torch.int64)
    units = torch.tensor([(num_blocks - 1) * 2 * 8192 // UNIT_BYTES])
    hash_pages(memory, units, 8192, 1, results, constants(CPU))
    assert int(results) % 2**64 == xxhash.xxh3_64_intdigest(region.numpy())


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    for size in (*EDGES, *(16 * generator.integers(16, 3000, 6))):
        compare(int(size), generator)
    compare_far_away()
