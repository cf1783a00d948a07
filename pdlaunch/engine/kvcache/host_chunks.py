"""Sizes the chunks of the host tier; planned before a start, and kept by whoever copies."""

from __future__ import annotations

CHUNK_ALIGNMENT_BYTES = 4096
"""Chunks begin on pages of the machine; pages in them keep the alignment they have in the block."""

LONG_RUN_BYTES = 256 * 1024
"""Bytes that copy engines should find in one piece on the host. Measured on an H200, D2H: 64 KiB 49
GB/s, these 53, 1 MiB 54.
"""
MOST_BLOCKS_PER_CHUNK = 16
"""A prefix is found by whole chunks: the longer they are, the less of a prompt is found. Kernels
win nothing from longer ones.
"""


def choose_blocks_per_chunk(block_bytes: int, device_type: str) -> int:
    """Return how many blocks of a rank share a host chunk beside a device of this type.

    All ranks of an engine have equal blocks, and so equal chunks.
    """
    if device_type != "cuda":
        return 1
    return max(1, min(MOST_BLOCKS_PER_CHUNK, LONG_RUN_BYTES // block_bytes))


def aligned_chunk_bytes(used_bytes: int) -> int:
    """Return the bytes that a chunk takes in host memory, its unused end included."""
    return -(-used_bytes // CHUNK_ALIGNMENT_BYTES) * CHUNK_ALIGNMENT_BYTES
