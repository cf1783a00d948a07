"""Runs the copy kernel in Triton's interpreter and compares it with plain copies; started by
``test_gather_kernel``.

A process of its own: the interpreter is switched on by the environment before Triton is imported.
"""

from __future__ import annotations

import numpy as np
import torch

from pdlaunch.engine.offload.copies import PageCopies, as_pages
from pdlaunch.engine.offload.copy_methods import HostCopy
from pdlaunch.engine.offload.gather_kernel import GatherKernel
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.spec import DIRECTIONS
from tests.engine.offload.transfer_model import host_content

SHAPES = ((1, 64, 1), (2, 256, 4), (3, 16, 4))
"""Programs, words of a tile, warps: pages smaller than a tile, larger, and not a multiple of it."""


def compare(random: np.random.Generator) -> None:
    page_bytes = 16 * int(random.integers(1, 40))
    num_blocks, num_chunks = int(random.integers(1, 9)), 9
    chunk_bytes = 4096
    tensors = [torch.randint(0, 256, (num_blocks, page_bytes), dtype=torch.uint8)] * 2
    hosts = [
        HostMemory(
            num_chunks, chunk_bytes, pin=False, progress=lambda *_: None, piece_bytes=2 * 4096
        )
        for _ in range(2)
    ]
    for piece, other in zip(hosts[0].pieces, hosts[1].pieces, strict=True):
        piece.random_(0, 256)
        other.copy_(piece)
    num_pages = int(random.integers(1, num_blocks + 1))
    blocks = random.permutation(num_blocks)[:num_pages]
    chunks = random.permutation(num_chunks)[:num_pages]
    offsets = 16 * random.integers(0, (chunk_bytes - page_bytes) // 16, num_pages)
    kernel = GatherKernel(*SHAPES[random.integers(len(SHAPES))])
    for direction in DIRECTIONS:
        tensors = [tensor.clone() for tensor in tensors]
        copies = [
            PageCopies(as_pages(tensor), blocks, host, chunks, offsets)
            for tensor, host in zip(tensors, hosts, strict=True)
        ]
        assert kernel.supports(copies[0])
        kernel.copy(copies[0], direction)
        HostCopy().copy(copies[1], direction)
        assert torch.equal(tensors[0], tensors[1]), (direction, page_bytes, kernel.name)
        assert torch.equal(host_content(hosts[0]), host_content(hosts[1])), (
            direction,
            page_bytes,
            kernel.name,
        )
        blocks = random.permutation(blocks)


def refuses_unaligned_pages() -> None:
    host = HostMemory(1, 4096, pin=False, progress=lambda *_: None)
    one = np.zeros(1, dtype=np.int64)
    kernel = GatherKernel(*SHAPES[0])
    assert not kernel.supports(
        PageCopies(torch.zeros(1, 24, dtype=torch.uint8), one, host, one, one)
    )
    assert not kernel.supports(
        PageCopies(torch.zeros(1, 32, dtype=torch.uint8), one, host, one, one + 8)
    )


if __name__ == "__main__":
    for seed in range(40):
        compare(np.random.default_rng(seed))
    refuses_unaligned_pages()
