"""Triton kernels of paged attention (decode with split contexts, and gather), and of the small
operations of a decoder layer, each with one pass over memory. The latter compute in float32 and
round once. Transformers' own code rounds after each operation.

The kernels of attention read ``kv_cache: [num_blocks, H, L, 2, B, D]`` (heads, layers of a block,
block size, head dim) in place; ``cache`` points at a layer's keys in the first block. If a CUDA
graph may replay a kernel, it reads the batch's sizes from the device, and rows past the batch have
length 0. Scores are multiplied by log2(e), for exp2. Import this module only if triton is
installed.

Source: flash-decoding (Dao et al., 2023) for the splits, FlashAttention-2 for the online softmax,
whose state of a query is its best score, sum of weights, and sum of weighted values.
"""

from __future__ import annotations

# No Python types in kernels, because Triton evaluates annotations. Its constants are in capitals.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def split_size(span, NUM_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, TILE: tl.constexpr):
    """Return the number of tokens in a split. Splits are equal parts of ``span``, in whole tiles;
    at most NUM_SPLITS, each with at least MIN_SPLIT tokens.
    """
    num_splits = tl.minimum(tl.maximum(span // MIN_SPLIT, 1), NUM_SPLITS)
    share = (span + num_splits - 1) // num_splits
    return (share + TILE - 1) // TILE * TILE


@triton.jit
def first_tile(length, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """Return the start of the tile with the first token that the context's last token sees."""
    return 0 if WINDOW == 0 else tl.maximum(length - WINDOW, 0) // TILE * TILE


@triton.jit(do_not_specialize=["table_row"])
def attend_decode(
    query,
    cache,
    tables,
    table_stride_at,
    lengths,
    partial,
    partial_max,
    partial_sum,
    table_row,
    scaling_log2,
    query_token_stride,
    query_head_stride,
    block_stride,
    head_stride,
    NUM_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Attend over one split of one row's context, for the GROUP query heads of one KV head. The
    query is the row's last token. ``tables``: [.., table_stride] int32, of this group from row
    ``table_row`` on. Grid: rows, KV heads, splits. Splits that a row does not need write nothing.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first = first_tile(length, WINDOW, TILE)
    # 0 ............ first ................................................ length
    #   not in sight   │ split 0: size tokens │ split 1 │ .. │ the rest │
    size = split_size(length - first, NUM_SPLITS, MIN_SPLIT, TILE)
    start = first + split * size
    stop = tl.minimum(start + size, length)
    if start < stop:
        dims, members = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_GROUP)
        is_dim, is_member = dims < HEAD_DIM, members < GROUP
        heads = head * GROUP + members
        queries = tl.load(
            query
            + row.to(tl.int64) * query_token_stride
            + heads[:, None] * query_head_stride
            + dims[None, :],
            mask=is_member[:, None] & is_dim[None, :],
            other=0.0,
        )
        table = tables + (table_row + row).to(tl.int64) * tl.load(table_stride_at)
        layer = cache + head * head_stride
        best = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
        total = tl.zeros([PADDED_GROUP], tl.float32)
        attended = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
        for position in range(start, stop, TILE):
            positions = position + tl.arange(0, TILE)
            is_held = positions < stop
            if WINDOW > 0:
                is_held = is_held & (positions >= length - WINDOW)
            blocks = tl.load(table + positions // BLOCK_SIZE, mask=is_held, other=0)
            rows = blocks.to(tl.int64) * block_stride + (positions % BLOCK_SIZE) * HEAD_DIM
            keys = tl.load(
                layer + rows[None, :] + dims[:, None],
                mask=is_held[None, :] & is_dim[:, None],
                other=0.0,
            )
            # Triton's default for float32 is TF32, whose 10 bits of mantissa are too few: engines
            # must compute the same tokens.
            scores = tl.dot(queries, keys, input_precision="ieee") * scaling_log2
            scores = tl.where(is_held[None, :], scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, 1))  # finite: each tile has a visible token
            weights = tl.exp2(scores - new_best[:, None])
            # Rescales the sums from the old best score to the new best score.
            decay = tl.exp2(best - new_best)
            values = tl.load(
                layer + BLOCK_SIZE * HEAD_DIM + rows[:, None] + dims[None, :],
                mask=is_held[:, None] & is_dim[None, :],
                other=0.0,
            )
            attended = tl.dot(
                weights.to(values.dtype), values, attended * decay[:, None], input_precision="ieee"
            )
            best, total = new_best, total * decay + tl.sum(weights, 1)
        # ``partial`` is [rows, heads, NUM_SPLITS, D].
        place = (row.to(tl.int64) * tl.num_programs(1) * GROUP + heads) * NUM_SPLITS + split
        tl.store(partial_max + place, best, mask=is_member)
        tl.store(partial_sum + place, total, mask=is_member)
        tl.store(
            partial + place[:, None] * HEAD_DIM + dims[None, :],
            attended,
            mask=is_member[:, None] & is_dim[None, :],
        )


@triton.jit
def reduce_splits(
    partial,
    partial_max,
    partial_sum,
    lengths,
    result,
    NUM_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Combine the splits of ``attend_decode`` into [rows, heads, D]; zeros for empty rows."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row)
    span = length - first_tile(length, WINDOW, TILE)
    size = split_size(span, NUM_SPLITS, MIN_SPLIT, TILE)
    splits, dims = tl.arange(0, NUM_SPLITS), tl.arange(0, PADDED_DIM)
    used = splits * size < span
    line = row.to(tl.int64) * tl.num_programs(1) + head
    place = line * NUM_SPLITS + splits
    maxima = tl.load(partial_max + place, mask=used, other=float("-inf"))
    sums = tl.load(partial_sum + place, mask=used, other=0.0)
    best = tl.max(maxima, 0)
    shares = tl.where(used, tl.exp2(maxima - best), 0.0)
    total = tl.sum(sums * shares, 0)
    attended = tl.load(
        partial + place[:, None] * HEAD_DIM + dims[None, :],
        mask=used[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    summed = tl.sum(attended * shares[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(
        result + line * HEAD_DIM + dims, summed.to(result.dtype.element_ty), mask=dims < HEAD_DIM
    )


@triton.jit(do_not_specialize=["num_tokens"])
def gather_kv(
    cache,
    slots,
    keys,
    values,
    num_tokens,
    block_stride,
    head_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Copy the tokens in ``slots`` to ``keys`` and ``values``, each [num_tokens, H, D]. Grid: tiles
    of TOKENS tokens; KV heads.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    dims = tl.arange(0, PADDED_DIM)
    mask = (tokens < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    slot = tl.load(slots + tokens, mask=tokens < num_tokens, other=0)
    rows = (slot // BLOCK_SIZE).to(tl.int64) * block_stride + (slot % BLOCK_SIZE) * HEAD_DIM
    source = cache + head * head_stride + rows[:, None] + dims[None, :]
    target = (tokens.to(tl.int64)[:, None] * tl.num_programs(1) + head) * HEAD_DIM + dims[None, :]
    tl.store(keys + target, tl.load(source, mask=mask), mask=mask)
    tl.store(values + target, tl.load(source + BLOCK_SIZE * HEAD_DIM, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def rotate_and_write(
    heads,
    values,
    cosines,
    sines,
    query_norm,
    key_norm,
    slots,
    cache,
    num_tokens,
    token_stride,
    own_head_stride,
    value_token_stride,
    value_head_stride,
    rotary_stride,
    epsilon,
    block_stride,
    head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    ROTATES: tl.constexpr,
):
    """Normalize and rotate queries and keys in place, write keys and values into the KV cache.

    ``heads``: [num_tokens, NUM_HEADS + NUM_KV_HEADS, D], queries (perhaps none) and keys;
    ``values``: [num_tokens, NUM_KV_HEADS, D]. ``slots``: [num_tokens], block * B + offset; -1: do
    not write. Grid: tiles of TOKENS tokens; heads of queries, keys and values. Dimension i of a
    head's first half and dimension i of its second half are rotated together.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    half: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, PADDED_DIM // 2)
    mask = (tokens < num_tokens)[:, None] & (dims < half)[None, :]
    seats = tokens.to(tl.int64)[:, None]
    # For a key or value: its KV head, and whether it is a value.
    kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
    is_value = (head - NUM_HEADS) // NUM_KV_HEADS
    if head >= NUM_HEADS + NUM_KV_HEADS:
        source = values + seats * value_token_stride + kv_head * value_head_stride + dims[None, :]
        first = tl.load(source, mask=mask, other=0.0)
        second = tl.load(source + half, mask=mask, other=0.0)
    else:
        place = heads + seats * token_stride + head * own_head_stride + dims[None, :]
        first = tl.load(place, mask=mask, other=0.0)
        second = tl.load(place + half, mask=mask, other=0.0)
        x, y = first.to(tl.float32), second.to(tl.float32)
        if HAS_NORMS:
            norm = query_norm if head < NUM_HEADS else key_norm
            weights = tl.load(norm + dims, mask=dims < half, other=0.0).to(tl.float32)
            more_weights = tl.load(norm + half + dims, mask=dims < half, other=0.0).to(tl.float32)
            scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / HEAD_DIM + epsilon)[:, None]
            x, y = (
                x * scale * (weights + NORM_OFFSET)[None, :],
                y * scale * (more_weights + NORM_OFFSET)[None, :],
            )
        if ROTATES:
            angle = seats * rotary_stride + dims[None, :]
            cosine = tl.load(cosines + angle, mask=mask, other=0.0).to(tl.float32)
            sine = tl.load(sines + angle, mask=mask, other=0.0).to(tl.float32)
            x, y = x * cosine - y * sine, y * cosine + x * sine
        first, second = x.to(first.dtype), y.to(second.dtype)
        if HAS_NORMS or ROTATES:
            tl.store(place, first, mask=mask)
            tl.store(place + half, second, mask=mask)
    if head >= NUM_HEADS:
        slot = tl.load(slots + tokens, mask=tokens < num_tokens, other=-1)
        rows = (slot // BLOCK_SIZE).to(tl.int64) * block_stride + (slot % BLOCK_SIZE) * HEAD_DIM
        target = cache + kv_head * head_stride + is_value * BLOCK_SIZE * HEAD_DIM
        target = target + rows[:, None] + dims[None, :]
        written = mask & (slot >= 0)[:, None]
        tl.store(target, first, mask=written)
        tl.store(target + half, second, mask=written)


@triton.jit
def add_and_normalize(
    hidden,
    residual,
    hidden_weights,
    weights,
    result,
    epsilon,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ADDS: tl.constexpr,
    NORMALIZES_HIDDEN: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
):
    """Add ``hidden`` to ``residual`` if ADDS, then write its RMS norm into ``result``; all are
    [num_tokens, SIZE]. Grid: tokens. NORMALIZES_HIDDEN: add the RMS norm of ``hidden``, with
    weights ``hidden_weights``. NORM_OFFSET is added to all weights.
    """
    places = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, PADDED_SIZE)
    mask = tl.arange(0, PADDED_SIZE) < SIZE
    content = tl.load(residual + places, mask=mask, other=0.0)
    if ADDS:
        added = tl.load(hidden + places, mask=mask, other=0.0).to(tl.float32)
        if NORMALIZES_HIDDEN:
            hidden_factors = tl.load(
                hidden_weights + tl.arange(0, PADDED_SIZE), mask=mask, other=0.0
            ).to(tl.float32)
            added = (
                added
                * tl.rsqrt(tl.sum(added * added, 0) / SIZE + epsilon)
                * (hidden_factors + NORM_OFFSET)
            )
        content = (content.to(tl.float32) + added).to(content.dtype)
        tl.store(residual + places, content, mask=mask)
    values = content.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + epsilon)
    factors = tl.load(weights + tl.arange(0, PADDED_SIZE), mask=mask, other=0.0).to(tl.float32)
    tl.store(
        result + places,
        (values * scale * (factors + NORM_OFFSET)).to(result.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def multiply_gated(
    gate_and_up, result, SIZE: tl.constexpr, COLUMNS: tl.constexpr, IS_GELU: tl.constexpr
):
    """Compute ``silu(gate) * up``, [num_tokens, SIZE], from [num_tokens, 2 * SIZE]. Grid: tokens;
    tiles of COLUMNS columns. IS_GELU: use GELU's tanh approximation, with 0.5 * (1 + tanh(x)) =
    sigmoid(2 * x).
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < SIZE
    gate = tl.load(gate_and_up + token * 2 * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_and_up + token * 2 * SIZE + SIZE + columns, mask=mask, other=0.0).to(
        tl.float32
    )
    # The constant is 2 * sqrt(2 / pi).
    opening = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if IS_GELU else gate
    tl.store(
        result + token * SIZE + columns,
        (gate * tl.sigmoid(opening) * up).to(result.dtype.element_ty),
        mask=mask,
    )
