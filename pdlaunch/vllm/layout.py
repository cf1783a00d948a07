"""Finds the regions of vLLM's KV caches from their tensors and specs.

::

    a layer's tensor    (rows, heads, tokens, content)    4-D: content has keys and values
                        (rows, 2, tokens, heads, dim)     5-D, until 0.25: keys, then values
                        (rows, tokens, content)           3-D, latent attention: no heads
    rows of a block     1, or several if the attention kernel has smaller blocks

Pages are transferred and proven whole if both engines have the same TP size. If not, pages are
divided into heads, which must be contiguous in all layers. Source: vLLM 0.24 to 0.33.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pdlaunch.transfer.handshake import heads_of_rank
from pdlaunch.transfer.regions import KVRegions, bytes_of

# Prefixes of the spec names of layers whose pages can be transferred.
_KINDS = (
    *("FullAttention", "MLAAttention", "SlidingWindow", "ChunkedLocalAttention", "RSWA"),
    "Mamba",  # one tensor from 0.27 on; before, a list of tensors, which is refused
)


class UnknownLayout(Exception):
    """Raised if an engine's blocks cannot be transferred. The text says why."""


@dataclass(frozen=True, slots=True)
class VllmLayout:
    kv: KVRegions
    groups: str  # description of the groups, in one line
    pages: str  # description of the pages' layout, which must be equal on both sides
    # Heads of the model if pages are divided; ranks if not; 1 for latent attention in one stage.
    total_heads: int
    first_head: int


@dataclass(frozen=True, slots=True)
class _Layer:
    name: str
    spec: Any
    tensor: torch.Tensor
    rows_per_block: int

    def heads(self) -> int:
        """Return the number of heads in a row, or 0 if a row cannot be divided into heads."""
        shape, strides = self.tensor.shape, self.tensor.stride()
        if len(shape) == 4:
            (num_heads, num_tokens, content), stride = shape[1:], strides[1]
            is_inner = strides[2:] == (content, 1)
        elif len(shape) == 5:
            (num_tokens, num_heads, content), stride = shape[2:], strides[3]
            is_inner = (strides[2], strides[4]) == (content, 1)
        else:
            return 0
        # The stride of a single head does not matter.
        is_cut = is_inner and (num_heads == 1 or stride == num_tokens * content)
        return num_heads if is_cut else 0

    def regions(self, *, cut: bool) -> Iterator[torch.Tensor]:
        """Yield the layer's regions, [num_blocks, num_heads, head_bytes] uint8."""
        item, tensor = self.tensor.element_size(), self.tensor
        stride, start = tensor.stride(0) * item, tensor.storage_offset() * item
        num_heads = self.heads() if cut else 1
        # Either two parts, keys and values, each divided into heads; or the whole row.
        parts = 2 if cut and tensor.dim() == 5 else 1
        apart = tensor.stride(1) * item if parts == 2 else 0
        rows, part_bytes = self.rows_per_block, tensor[0].numel() * item // parts
        if not cut and stride == part_bytes:
            rows, stride, part_bytes = 1, stride * rows, part_bytes * rows
        for row in range(rows):
            for part in range(parts):
                yield bytes_of(tensor).as_strided(
                    (tensor.shape[0] // self.rows_per_block, num_heads, part_bytes // num_heads),
                    (stride * rows, part_bytes // num_heads, 1),
                    start + row * stride + part * apart,
                )


def read_layout(
    kv_caches: Mapping[str, Any],
    kv_cache_config: Any,
    *,
    total_kv_heads: int,
    tp_size: int,
    num_stages: int,
    rank: int,
    by_head: bool,
) -> VllmLayout:
    """Return the layout of a worker's KV caches. ``rank``: counts the ranks of the first pipeline
    stage first; ``by_head``: divide pages into heads. Whole pages need fewer checksums: an eighth
    for an 8B model. Raises UnknownLayout.
    """
    groups = [
        [
            _layer(name, group, kv_caches[name], kv_cache_config.num_blocks)
            for name in sorted(group.layer_names, key=lambda name: (len(name), name))
        ]
        for group in kv_cache_config.kv_cache_groups
    ]
    layers = [layer for group in groups for layer in group]
    if not layers:
        raise UnknownLayout("it has no KV cache")
    is_latent = all("MLA" in type(layer.spec).__name__ for layer in layers)
    heads = {layer.heads() for layer in layers}
    held = heads_of_rank(total_kv_heads, tp_size, rank % tp_size) if not is_latent else range(1)
    # A stage has other layers than the next, so each rank pulls from one rank alone.
    is_staged = num_stages > 1
    cut = by_head and not is_latent and not is_staged and heads == {len(held)}
    regions: dict[tuple[int, ...], tuple[int, torch.Tensor]] = {}
    indices = []
    for group in groups:
        found = []
        for layer in group:
            for region in layer.regions(cut=cut):
                # Layers of different groups may share memory, because they have different blocks.
                key = region.data_ptr(), *region.shape, *region.stride()
                index, _ = regions.setdefault(key, (len(regions), region))
                found.append(index)
        indices.append(tuple(found))
    kv = KVRegions(tuple(region for _, region in regions.values()), tuple(indices))
    if is_latent and not is_staged:
        total_kv_heads = 1
    elif not cut:
        total_kv_heads, held = tp_size * num_stages, range(rank, rank + 1)
    stage = f", stage {rank // tp_size + 1} of {num_stages}" if is_staged else ""
    return VllmLayout(
        kv,
        groups="; ".join(_describe_group(group) for group in groups),
        pages=_describe_pages(layers, cut=cut) + stage,
        total_heads=total_kv_heads,
        first_head=held.start,
    )


def window_of(spec: Any) -> int | None:
    """Return the number of tokens that a layer sees, with the current token; None: all tokens."""
    window = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    return None if window is None else int(window)


def _layer(name: str, group: Any, tensor: Any, num_blocks: int) -> _Layer:
    spec = group.kv_cache_spec
    spec = getattr(spec, "kv_cache_specs", {name: spec})[name]
    kind = type(spec).__name__
    if not kind.startswith(_KINDS) or not isinstance(tensor, torch.Tensor):
        raise UnknownLayout(f"layer {name} keeps its state as {kind}, which is not supported yet")
    shape, strides = tuple(tensor.shape), tensor.stride()
    rows = shape[0] // num_blocks
    row = tensor[0]
    steps = zip(row.shape, row.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in steps)
    if (
        tensor.dim() not in (3, 4, 5)
        or shape[0] != rows * num_blocks
        or rows < 1
        or extent != row.numel()
        or strides[0] < row.numel()
    ):
        raise UnknownLayout(
            f"layer {name} has a KV cache of shape {shape} and strides {strides} for {num_blocks} "
            "blocks: the memory of a block is not contiguous"
        )
    return _Layer(name, spec, tensor, rows)


def _describe_group(layers: list[_Layer]) -> str:
    spec = layers[0].spec
    window = window_of(spec) or ("state" if hasattr(spec, "mamba_type") else "full")
    return f"{window}: {len(layers)} layers of {spec.block_size} tokens"


def _describe_pages(layers: list[_Layer], *, cut: bool) -> str:
    """Describe the pages' layout. If ``cut``, the number of heads is left out: it may differ."""
    kinds: Counter[str] = Counter()
    for layer in layers:
        shape = list(layer.tensor.shape[1:])
        strides = [layer.tensor.stride(dim) for dim in range(1, layer.tensor.dim())]
        if cut:
            heads_at = 0 if len(shape) == 3 else 2
            del shape[heads_at], strides[heads_at]
        order = sorted(range(len(shape)), key=lambda dim: -strides[dim])
        kinds[
            f"{layer.tensor.device.type} {str(layer.tensor.dtype).removeprefix('torch.')}"
            f"{shape} order {order} x{layer.rows_per_block}"
        ] += 1
    listed = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
    return f"{'by head' if cut else 'whole pages'}: {listed}"
