"""Turns the blocks of a transfer into copies of pages: which bytes of which tensor lie where in
host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.spec import ChunkLayout, GroupShape, GroupSpan, IntArray

Pages = torch.Tensor
"""[num_blocks, page_bytes] uint8: one tensor of a group, a row a block."""


@dataclass(frozen=True, slots=True)
class PageCopies:
    """Names the pages of one tensor and their places in host memory; the caller knows the
    direction.
    """

    device: Pages
    block_ids: IntArray
    """[num_pages]: rows of ``device``, no row twice."""
    host: HostMemory
    chunk_ids: IntArray
    """[num_pages]"""
    chunk_offsets: IntArray
    """[num_pages]: the first byte of each page in its chunk."""

    @property
    def page_bytes(self) -> int:
        return self.device.shape[1]

    @property
    def num_bytes(self) -> int:
        return len(self.block_ids) * self.page_bytes

    def host_addresses(self) -> IntArray:
        """Return the address of each page in host memory: [num_pages]."""
        return self.host.addresses(self.chunk_ids) + self.chunk_offsets


@dataclass(frozen=True, slots=True)
class Runs:
    """Holds copies of maximal length: pages that are neighbours on both sides are one run. All
    arrays are [num_runs].
    """

    device_offsets: IntArray
    """Offsets from the start of the tensor, in bytes."""
    host_pieces: IntArray
    """Indices of the pieces of host memory; no run crosses the border of a piece."""
    host_offsets: IntArray
    """Offsets from the start of the piece, in bytes."""
    sizes: IntArray
    """Bytes."""


def as_pages(tensor: torch.Tensor) -> Pages:
    """Return the bytes of a contiguous tensor whose first dimension is the block."""
    assert tensor.is_contiguous()
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)


def shape_of(group: Sequence[Pages]) -> GroupShape:
    """Return the shape of a group whose tensors hold the same blocks."""
    assert len({pages.shape[0] for pages in group}) == 1
    return GroupShape(group[0].shape[0], tuple(pages.shape[1] for pages in group))


def plan_copies(
    spans: Sequence[GroupSpan],
    layout: ChunkLayout,
    groups: Sequence[Sequence[Pages]],
    host: HostMemory,
) -> list[PageCopies]:
    """Return one entry for each group and tensor. Within a block of a chunk the pages of the
    group's tensors follow each other.
    """
    copies = []
    for span in spans:
        chunk_ids, offsets = layout.places(span)
        # one block in a chunk   | page of tensor 0 | page of tensor 1 | ..
        #                        └ offsets          └ offsets + page bytes
        for pages in groups[span.group]:
            copies.append(PageCopies(pages, span.block_ids, host, chunk_ids, offsets))
            offsets = offsets + pages.shape[1]
    return copies


def merge_runs(copies: PageCopies) -> Runs:
    """Return the fewest copies that move the same bytes, in the given order of pages."""
    page_bytes = copies.page_bytes
    device = copies.block_ids * page_bytes
    pieces = copies.host.piece_of(copies.chunk_ids)
    host = copies.host.offsets(copies.chunk_ids) + copies.chunk_offsets
    # Runs end where pages are no neighbours on one of the sides, or where host memory goes on in
    # another piece.
    breaks = (
        (np.diff(device) != page_bytes) | (np.diff(host) != page_bytes) | (np.diff(pieces) != 0)
    )
    starts = np.flatnonzero(np.concatenate(([True], breaks)))
    num_pages = np.diff(np.append(starts, len(device)))
    return Runs(device[starts], pieces[starts], host[starts], num_pages * page_bytes)
