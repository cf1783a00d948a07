"""Triton kernels for the small operations of a decoder layer. Each makes one pass over memory.

They compute in float32 and round once. Transformers' own code rounds after each operation.
"""

from __future__ import annotations

# No Python types in kernels, because Triton evaluates annotations. Its constants are in capitals.
# ruff: noqa: ANN001, ANN201, N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import triton
import triton.language as tl


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
    """Add ``hidden`` to ``residual`` if ADDS, then write its RMS norm into ``result``.

    All are [num_tokens, SIZE]. Grid: tokens. NORMALIZES_HIDDEN: add the RMS norm of ``hidden``,
    with weights ``hidden_weights``. NORM_OFFSET is added to all weights.
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
    """Compute ``silu(gate) * up``, [num_tokens, SIZE], from [num_tokens, 2 * SIZE].

    Grid: tokens; tiles of COLUMNS columns. IS_GELU: use GELU's tanh approximation instead of SiLU,
    with 0.5 * (1 + tanh(x)) = sigmoid(2 * x).
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
