"""Runs the kernels of checksums and copies in Triton's interpreter.

``test_checksum`` starts it as a program: the environment must switch the interpreter on before
Triton is imported.
"""

import mmap
import os

import numpy as np
import torch
import xxhash

from pdlaunch.transfer.connectors.copy_kernel import copy_pieces, fits_kernel
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


def check_checksums(random: np.random.Generator) -> None:
    for size in (*EDGES, *(16 * random.integers(16, 3000, 6))):
        compare(int(size), random)
    compare_far_away()


def check_copies(random: np.random.Generator) -> None:
    for lengths in ([16], [4096] * 19, [32 * 1024, 48, 32 * 1024, 33 * 1024 + 16]):
        copy(lengths, random)
    assert not fits_kernel(*np.array([[16], [16], [8]], dtype=np.uint64))


if __name__ == "__main__":
    check_checksums(np.random.default_rng(0))
    check_copies(np.random.default_rng(0))
