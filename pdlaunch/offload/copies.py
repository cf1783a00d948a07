"""From a transfer's blocks to copies of pages: which bytes of which tensor lie where in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pdlaunch.offload.spec import ChunkLayout, GroupShape, GroupSpan, IntArray

Pages = torch.Tensor
"""[num_blocks, page_bytes] uint8: one tensor of a group, a row a block."""


@dataclass(frozen=True, slots=True)
class PageCopies:
    """Pages of one tensor and their places in host memory; the direction is the caller's."""

    device: Pages
    block_ids: IntArray
    """[num_pages]; rows of ``device``, none twice."""
    host: torch.Tensor
    """[num_bytes] uint8; all of host memory."""
    host_offsets: IntArray
    """[num_pages]; first byte of each page in ``host``."""

    @property
    def page_bytes(self) -> int:
        return self.device.shape[1]

    @property
    def num_bytes(self) -> int:
        return len(self.block_ids) * self.page_bytes


@dataclass(frozen=True, slots=True)
class Runs:
    """Copies of maximal length: pages that are neighbours on both sides are one run."""

    device_offsets: IntArray
    """[num_runs]; from the start of the tensor, in bytes."""
    host_offsets: IntArray
    """[num_runs]"""
    sizes: IntArray
    """[num_runs]; bytes."""


def as_pages(tensor: torch.Tensor) -> Pages:
    """The bytes of a contiguous tensor whose first dimension is the block."""
    assert tensor.is_contiguous()
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)


def shape_of(group: Sequence[Pages]) -> GroupShape:
    """The tensors of one group, which hold the same blocks."""
    assert len({pages.shape[0] for pages in group}) == 1
    return GroupShape(group[0].shape[0], tuple(pages.shape[1] for pages in group))


def plan_copies(
    spans: Sequence[GroupSpan], layout: ChunkLayout, groups: Sequence[Sequence[Pages]], host: torch.Tensor
) -> list[PageCopies]:
    """One entry a group and tensor. In a chunk's block the pages of the group's tensors follow each other."""
    copies = []
    for span in spans:
        offsets = layout.block_offsets(span)
        for pages in groups[span.group]:
            copies.append(PageCopies(pages, span.block_ids, host, offsets))
            offsets = offsets + pages.shape[1]
    return copies


def merge_runs(copies: PageCopies) -> Runs:
    """The fewest copies that move the same bytes, in the given order of pages."""
    page_bytes = copies.page_bytes
    device_offsets = copies.block_ids * page_bytes
    breaks = (np.diff(device_offsets) != page_bytes) | (np.diff(copies.host_offsets) != page_bytes)
    starts = np.flatnonzero(np.concatenate(([True], breaks)))
    num_pages = np.diff(np.append(starts, len(device_offsets)))
    return Runs(device_offsets[starts], copies.host_offsets[starts], num_pages * page_bytes)
