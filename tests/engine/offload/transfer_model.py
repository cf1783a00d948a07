"""A plain Python model of the transfer handler, and hypothesis strategies for what it is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.spec import TransferSpec


@dataclass(frozen=True)
class Geometry:
    page_bytes: list[list[int]]
    """By group and tensor."""
    num_blocks: list[int]
    blocks_per_chunk: int
    num_chunks: int

    def new_groups(self, device: str = "cpu") -> list[list[torch.Tensor]]:
        return [
            [torch.randint(0, 256, (count, size), dtype=torch.uint8).to(device) for size in pages]
            for pages, count in zip(self.page_bytes, self.num_blocks, strict=True)
        ]


@st.composite
def geometries(draw: st.DrawFn, unit_bytes: int = 1, max_units: int = 40) -> Geometry:
    num_groups = draw(st.integers(1, 4))
    sizes = st.lists(
        st.integers(1, max_units).map(lambda units: units * unit_bytes), min_size=1, max_size=3
    )
    return Geometry(
        [draw(sizes) for _ in range(num_groups)],
        [draw(st.integers(1, 12)) for _ in range(num_groups)],
        draw(st.integers(1, 5)),
        draw(st.integers(20, 60)),
    )


@st.composite
def spans(draw: st.DrawFn, geometry: Geometry) -> tuple[list[int], list[int], list[int]]:
    """``group_sizes``, ``block_indices`` and ``chunk_ids`` that fit each other."""
    sizes = [draw(st.integers(0, count)) for count in geometry.num_blocks]
    indices = [draw(st.integers(0, 3 * geometry.blocks_per_chunk)) for _ in sizes]
    counts = [
        len({block // geometry.blocks_per_chunk for block in range(index, index + size)})
        for size, index in zip(sizes, indices, strict=True)
    ]
    total = sum(counts)
    if total > geometry.num_chunks:
        sizes, total = [0] * len(sizes), 0
    return sizes, indices, draw(st.permutations(range(geometry.num_chunks)))[:total]


@st.composite
def block_choices(draw: st.DrawFn, geometry: Geometry, sizes: list[int]) -> list[int]:
    """Flat block ids, none twice in a group."""
    ids = []
    for size, count in zip(sizes, geometry.num_blocks, strict=True):
        ids += draw(st.permutations(range(count)))[:size]
    return ids


def model_transfer(
    spec: TransferSpec, geometry: Geometry, groups: list[list[torch.Tensor]], host: torch.Tensor
) -> None:
    """Copy page by page what ``spec`` says: logical block i lies in slot i % blocks_per_chunk of
    its chunk.

    ``host``: [num_chunks, chunk_bytes]
    """
    ids, chunk_ids = list(spec.block_ids), list(spec.chunk_ids)
    for group, size in enumerate(spec.group_sizes):
        first = spec.block_indices[group]
        chunks: dict[int, int] = {}
        for logical in range(first, first + size):
            chunk = logical // geometry.blocks_per_chunk
            if chunk not in chunks:
                chunks[chunk] = chunk_ids.pop(0)
            slot = logical % geometry.blocks_per_chunk
            place = slot * sum(geometry.page_bytes[group])
            block_id = ids.pop(0)
            for tensor, page_bytes in zip(groups[group], geometry.page_bytes[group], strict=True):
                if spec.direction == "store":
                    host[chunks[chunk], place : place + page_bytes] = tensor[block_id]
                else:
                    tensor[block_id] = host[chunks[chunk], place : place + page_bytes]
                place += page_bytes
    assert not ids
    assert not chunk_ids


def host_content(host: HostMemory) -> torch.Tensor:
    """[num_chunks, chunk_bytes]: a copy of all chunks."""
    return torch.stack([host.chunk(chunk_id) for chunk_id in range(host.num_chunks)])
