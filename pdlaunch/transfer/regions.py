"""Describes where the KV blocks of a rank lie in memory, independent of the engine.

::

    region     | block 0                | block 1                | ...     of one layer or several
               | head 0 | head 1 | ..   | head 0 | head 1 | ..   |
    group      has some of the regions; its block ids are row numbers in each of them
    page       the part of a block in one region
    READ       copies (region, block) pieces of a peer to the same regions here

A native rank has one region, in which all layers of a head lie side by side. vLLM has one region
for each layer, or two if keys and values are separate. All groups take block ids from one pool. If
a page cannot be divided into heads (tokens first, latent attention), it counts as one head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.protocol.side_channel import RegionPlace

Addresses = npt.NDArray[np.uint64]
BlockIds = Sequence[Sequence[int]]  # for each KV cache group, its block ids


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole allocation that contains a tensor, as [num_bytes] uint8."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage())


@dataclass(frozen=True)
class KVRegions:
    """Holds one rank's KV cache."""

    # Each is [num_blocks, num_heads, head_bytes] uint8. The heads of a block are contiguous; there
    # may be gaps between blocks.
    regions: tuple[torch.Tensor, ...]
    # For each KV cache group, the indices of its regions.
    groups: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for region in self.regions:
            assert region.dtype == torch.uint8
            assert region.stride()[1:] == (region.shape[2], 1)
            assert region.shape[:2] == self.regions[0].shape[:2]

    @property
    def num_blocks(self) -> int:
        return self.regions[0].shape[0]

    @property
    def num_heads(self) -> int:
        return self.regions[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.regions[0].device

    @cached_property
    def places(self) -> list[RegionPlace]:
        return [
            RegionPlace(each.data_ptr(), each.stride(0), each.shape[2]) for each in self.regions
        ]

    @property
    def page_bytes(self) -> int:
        """Return the size of the smallest page: the smallest piece in a READ of whole blocks."""
        return min(place.head_bytes for place in self.places) * self.num_heads

    @cached_property
    def allocations(self) -> list[torch.Tensor]:
        storages = {each.untyped_storage().data_ptr(): each for each in self.regions}
        return list(map(bytes_of, storages.values()))

    def num_bytes(self, blocks: BlockIds, num_heads: int) -> int:
        sizes = [place.head_bytes for place in self.places]
        return num_heads * sum(
            len(block_ids) * sum(sizes[index] for index in group)
            for group, block_ids in zip(self.groups, blocks, strict=True)
        )

    def views(self, blocks: BlockIds, heads: range) -> Iterator[torch.Tensor]:
        """Yield the heads of each block in each region of its group: [num_heads, head_bytes]."""
        for group, block_ids in zip(self.groups, blocks, strict=True):
            for index in group:
                for block_id in block_ids:
                    yield self.regions[index][block_id, heads.start : heads.stop]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Addresses and sizes of pieces of memory. Both sides of a READ have pieces of equal sizes."""

    addresses: Addresses
    sizes: Addresses


def pieces_of(
    places: Sequence[RegionPlace], groups: Sequence[Sequence[int]], blocks: BlockIds, heads: range
) -> Pieces:
    """Return the pieces of ``heads`` of these blocks, group by group and region by region."""
    addresses, sizes = [], []
    for group, block_ids in zip(groups, blocks, strict=True):
        chosen = [places[index] for index in group]
        # Vectorised: a loop over 64 regions takes 2 ms of a pull of 4,096 tokens.
        firsts, strides, num_bytes = np.array(
            [
                (
                    place.address + heads.start * place.head_bytes,
                    place.stride_bytes,
                    len(heads) * place.head_bytes,
                )
                for place in chosen
            ],
            dtype=np.uint64,
        ).T
        ids = np.array(block_ids, dtype=np.uint64)
        addresses.append((firsts[:, None] + strides[:, None] * ids).ravel())
        sizes.append(num_bytes.repeat(len(ids)))
    return Pieces(np.concatenate(addresses), np.concatenate(sizes))


def even_pieces(start: int, num_bytes: int, piece_bytes: int) -> Pieces:
    """Divide memory into equal pieces, the last first, so that no connector can merge them."""
    offsets = np.arange(0, num_bytes, piece_bytes, dtype=np.uint64)[::-1]
    return Pieces(
        np.ascontiguousarray(offsets) + np.uint64(start),
        np.full(len(offsets), piece_bytes, np.uint64),
    )


def merge(destinations: Pieces, sources: Pieces) -> tuple[Addresses, Addresses, Addresses]:
    """Return destinations, sources and sizes of the fewest copies. Needs at least one piece."""
    sizes = destinations.sizes
    # One copy moves pieces that are contiguous on both sides.
    breaks = np.diff(destinations.addresses) != sizes[:-1]
    breaks |= np.diff(sources.addresses) != sizes[:-1]
    starts = np.flatnonzero(np.concatenate(([True], breaks)))
    return (
        destinations.addresses[starts],
        sources.addresses[starts],
        np.add.reduceat(sizes, starts),
    )


def native_regions(kv_cache: torch.Tensor, layout: KVCacheLayout) -> KVRegions:
    """Return the one region of a native rank. ``kv_cache``: [num_blocks, num_kv_heads, num_layers,
    2, block_size, head_dim], contiguous. Heads come before layers, so that a range of a block's
    heads is contiguous: ranks of another TP size read just the heads that they need.
    """
    shape = kv_cache.shape[0], layout.num_kv_heads, layout.head_bytes
    region = kv_cache.view(torch.uint8).view(shape)
    return KVRegions((region,), tuple((0,) for _ in layout.groups))
