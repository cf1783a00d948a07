"""The Triton kernel of paged attention for chunks of prompts that no library can do: those in
float32, and those of heads with sinks.

It reads the KV cache in place. Import this module only where triton is there.

Source: FlashAttention-2 for the online softmax.
"""

from __future__ import annotations

# Triton reads annotations of kernels: only its own may stand there. Its constants are in capitals.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import triton
import triton.language as tl

from pdlaunch.engine.models.attention_kernels import LOG2_E, first_tile, row_offsets


@triton.jit(do_not_specialize=["table_row"])
def attend_chunks(
    query,
    kv_cache,
    tables,
    table_stride_at,
    lengths,
    row_starts,
    tile_rows,
    tile_tokens,
    sinks,
    result,
    table_row,
    scaling_log2,
    query_token_stride,
    query_head_stride,
    result_token_stride,
    layer_offset,
    block_stride,
    head_stride,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Attend for TOKENS tokens of a row's chunk and one query head.

    Program (i, h): tokens from ``tile_tokens[i]`` on, counted in the chunk of row ``tile_rows[i]``.
    ``row_starts``: [rows + 1] first token of each row in ``query`` and ``result``.

    ::

        0 ................. before ......................... length
          computed earlier  │  the chunk: tokens 0 .. num_tokens │
    """
    head = tl.program_id(1)
    row, token = tl.load(tile_rows + tl.program_id(0)), tl.load(tile_tokens + tl.program_id(0))
    row_start = tl.load(row_starts + row)
    num_tokens = tl.load(row_starts + row + 1) - row_start
    before = tl.load(lengths + row) - num_tokens
    # The positions that the tile's tokens see.
    start = first_tile(before + token + 1, WINDOW, TILE)
    stop = before + tl.minimum(token + TOKENS, num_tokens)
    dims, tokens = tl.arange(0, PADDED_DIM), token + tl.arange(0, TOKENS)
    is_dim, is_token = dims < HEAD_DIM, tokens < num_tokens
    seats = (row_start + tokens).to(tl.int64)
    queries = tl.load(
        query + seats[:, None] * query_token_stride + head * query_head_stride + dims[None, :],
        mask=is_token[:, None] & is_dim[None, :],
        other=0.0,
    )
    table = tables + (table_row + row).to(tl.int64) * tl.load(table_stride_at)
    layer = kv_cache + (head // GROUP) * head_stride + layer_offset
    best = tl.full([TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    if HAS_SINKS:
        best = tl.zeros_like(best) + tl.load(sinks + head).to(tl.float32) * LOG2_E
        total += 1.0
    attended = tl.zeros([TOKENS, PADDED_DIM], tl.float32)
    for position in range(start, stop, TILE):
        positions = position + tl.arange(0, TILE)
        held = positions < stop
        rows = row_offsets(table, positions, held, block_stride, BLOCK_SIZE, HEAD_DIM)
        visible = held[None, :] & (positions[None, :] <= before + tokens[:, None])
        if WINDOW > 0:
            # Blocks before the window may belong to others by now: what lies there is not read.
            held = held & (positions > before + token - WINDOW)
            visible = visible & (positions[None, :] > before + tokens[:, None] - WINDOW)
        keys = tl.load(
            layer + rows[None, :] + dims[:, None],
            mask=held[None, :] & is_dim[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * scaling_log2
        scores = tl.where(visible, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        # A token may see nothing of this tile: no score to subtract yet.
        reference = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(best - reference)
        values = tl.load(
            layer + BLOCK_SIZE * HEAD_DIM + rows[:, None] + dims[None, :],
            mask=held[:, None] & is_dim[None, :],
            other=0.0,
        )
        attended = tl.dot(
            weights.to(values.dtype), values, attended * decay[:, None], input_precision="ieee"
        )
        total = total * decay + tl.sum(weights, 1)
        best = new_best
    attended = attended / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        result + seats[:, None] * result_token_stride + head * HEAD_DIM + dims[None, :],
        attended.to(result.dtype.element_ty),
        mask=is_token[:, None] & is_dim[None, :],
    )
