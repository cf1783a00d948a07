"""Attention over a paged KV cache in float64, and random batches to compare backends on."""

from dataclasses import dataclass

import numpy as np
import torch

from pdlaunch.engine.kvcache.groups import KVCacheGroup, KVCacheLayout
from pdlaunch.engine.models.attention import PackedBatch


@dataclass(frozen=True)
class Case:
    """``rows``: (tokens before the step, tokens of the step), rows of one token first."""

    rows: tuple[tuple[int, int], ...]
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    windows: tuple[int | None, ...] = (None, 24)
    """One group of two layers each."""
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def layout(self) -> KVCacheLayout:
        groups = tuple(
            KVCacheGroup((2 * index, 2 * index + 1), window)
            for index, window in enumerate(self.windows)
        )
        return KVCacheLayout(
            groups, self.num_kv_heads, self.head_dim, self.block_size, self.dtype.itemsize
        )


@dataclass
class Inputs:
    layout: KVCacheLayout
    kv_cache: torch.Tensor
    batch: PackedBatch
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Slots that no context holds are NaN: a backend that reads them shows it. Blocks lie in random
    order.
    """
    random = np.random.default_rng(case.seed)
    torch.manual_seed(case.seed)
    layout = case.layout
    before, counts = np.array(case.rows, dtype=np.int64).T
    lengths = before + counts
    row_starts = np.concatenate([[0], np.cumsum(counts)])
    row_of_token = np.repeat(np.arange(len(counts)), counts)
    per_row = -(-int(lengths.max()) // case.block_size)
    shape = (len(layout.groups), len(counts), per_row)
    num_blocks = int(np.prod(shape)) + 3
    tables = random.permutation(num_blocks)[: num_blocks - 3].reshape(shape)
    batch = PackedBatch(
        token_ids=random.integers(0, 9, len(row_of_token)),
        positions=np.arange(len(row_of_token)) - row_starts[row_of_token] + before[row_of_token],
        row_of_token=row_of_token,
        row_starts=row_starts,
        context_lengths=lengths,
        block_tables=tuple(tables),
        num_decode_rows=int((counts == 1).sum()),
    )
    held = torch.zeros(num_blocks, case.block_size, dtype=torch.bool)
    for group, table in zip(layout.groups, tables, strict=True):
        for row, length in enumerate(before):
            first = 0 if group.sliding_window is None else max(0, length - group.sliding_window + 1)
            positions = np.arange(first, length)
            held[table[row, positions // case.block_size], positions % case.block_size] = True
    kv_cache = torch.randn(num_blocks, *layout.block_shape()).to(case.dtype)
    kv_cache = kv_cache.masked_fill(~held[:, None, None, None, :, None], float("nan"))
    states = [
        torch.randn(len(row_of_token), heads, case.head_dim).to(device, case.dtype).transpose(0, 1)
        for heads in (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    ]
    return Inputs(layout, kv_cache.to(device), batch, *states)


def reference(inputs: Inputs, layer: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """KV cache after the step, and attention [num_tokens, num_heads, head_dim] in float64; both on
    the CPU.
    """
    layout, batch = inputs.layout, inputs.batch
    index = next(index for index, group in enumerate(layout.groups) if layer in group.layers)
    group, table = layout.groups[index], batch.block_tables[index]
    slot = group.layers.index(layer)
    kv_cache = inputs.kv_cache.cpu().clone()
    query, key, value = (
        states.cpu().transpose(0, 1) for states in (inputs.query, inputs.key, inputs.value)
    )
    places = [divmod(int(position), layout.block_size) for position in batch.positions]
    for token, (block, offset) in enumerate(places):
        target = kv_cache[table[batch.row_of_token[token], block], :, slot, :, offset]
        target[:, 0], target[:, 1] = key[token], value[token]
    result = torch.empty(query.shape, dtype=torch.float64)
    share = query.shape[1] // layout.num_kv_heads
    for row, length in enumerate(batch.context_lengths):
        part = slice(batch.row_starts[row], batch.row_starts[row + 1])
        seen, asking = torch.arange(length), torch.from_numpy(batch.positions[part])[:, None]
        visible = seen <= asking
        if group.sliding_window is not None:
            visible &= seen > asking - group.sliding_window
        blocks = torch.from_numpy(table[row])[seen // layout.block_size]
        rows = kv_cache[blocks, :, slot, :, seen % layout.block_size].double()
        needed = visible.any(dim=0)
        assert not rows[needed].isnan().any()
        rows[~needed] = 0
        keys, values = (rows[:, :, which].repeat_interleave(share, dim=1) for which in (0, 1))
        scores = torch.einsum("qhd,thd->hqt", query[part].double(), keys) * scaling
        scores = scores.masked_fill(~visible, float("-inf"))
        result[part] = torch.einsum("hqt,thd->qhd", scores.softmax(dim=2), values)
    return kv_cache, result


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN when there is one in ``found``."""
    return float((found.cpu().double() - expected).norm() / expected.norm())
