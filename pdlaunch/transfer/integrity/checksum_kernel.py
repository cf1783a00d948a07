"""A kernel that computes xxh3_64 of many regions of device memory, all of the same size, with the
same result as the xxHash library. One program of one warp hashes one region.

::

    region   | block of 1,024 bytes | block | ... | 0 to 15 stripes left | .. last 64 bytes |
    block    | 16 stripes of 64 bytes, 8 lanes of 8 bytes each |

A block's stripes are added up, so a tile of several blocks is summed in parallel. After each block,
the eight accumulators are scrambled, which must be done block by block. Meanwhile, the next tile is
loaded. Import this module only if triton is installed. Source: the specification of XXH3 for large
inputs, and its constants, in xxHash's doc/xxhash_spec.md.
"""

from __future__ import annotations

# No Python types in kernels, because Triton evaluates annotations. Its constants are in capitals.
# ruff: noqa: ANN001, ANN201, ANN202, N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import numpy as np
import torch
import triton
import triton.language as tl

SMALLEST_BYTES = 241  # XXH3 uses other algorithms for smaller inputs
UNIT_BYTES = 16  # the widest load of a thread; sizes and addresses must be multiples of it
# Blocks that a program loads at once: 8 KiB. Four programs on each multiprocessor then keep the
# memory busy.
TILE_BLOCKS = 8

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
    "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d"
    "8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc"
    "8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME64 = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
# Initial values of the eight accumulators.
_START = (_PRIME32[2], *_PRIME64[:4], _PRIME32[1], _PRIME64[4], _PRIME32[0])
# Offset in bytes of the secret's eight words for each purpose. Stripe n of a block uses the eight
# words at offset 8 n.
_WORDS_AT = {"scramble": 128, "last_stripe": 121, "merge": 11}


def constants(device: torch.device) -> torch.Tensor:
    """Return [48] int64: the secret's words for stripes (16 + 8, of which the last eight scramble),
    for the last stripe and for merging, then the initial accumulators.
    """
    words = [np.frombuffer(_SECRET, dtype="<u8")]
    words += [
        np.frombuffer(_SECRET, dtype="<u8", count=8, offset=_WORDS_AT[use])
        for use in ("last_stripe", "merge")
    ]
    words.append(np.array(_START, dtype="<u8"))
    return torch.from_numpy(np.concatenate(words).view(np.int64)).to(device)


def supports(region: torch.Tensor) -> bool:
    """Return True if the kernel can hash ``region``, [num_blocks, num_heads, head_bytes] uint8."""
    sizes = region.data_ptr(), region.stride(0), region.shape[2]
    return region.shape[2] >= SMALLEST_BYTES and not any(size % UNIT_BYTES for size in sizes)


def hash_pages(
    anchor: torch.Tensor,
    units: torch.Tensor,
    head_bytes: int,
    first_head: int,
    results: torch.Tensor,
    words: torch.Tensor,
) -> None:
    """Launch the kernel on the current stream.

    ``anchor``: a tensor on the device. ``units``: [num_pages] int64, the distance of each page from
    ``anchor`` in units of 16 bytes. ``results``: [num_pages, num_heads] int64, receives the
    checksums of the heads from ``first_head`` on. ``units`` and ``results`` may be page-locked host
    memory. ``words``: from ``constants``.
    """
    num_pages, num_heads = results.shape
    assert len(units) == num_pages
    if results.numel() == 0:
        return
    hash_page_head[(num_pages * num_heads,)](
        anchor[0, 0, :8].view(torch.int64),
        units,
        results,
        words,
        first_head,
        num_heads,
        REGION_BYTES=head_bytes,
        LENGTH_START=head_bytes * _PRIME64[0] % 2**64,
        TILE_BLOCKS=TILE_BLOCKS,
        num_warps=1,
    )


# Compiled at start, once for each size of heads. Triton must not compile again for other values of
# the arguments listed here.
@triton.jit(do_not_specialize=["units", "results", "first_head", "num_heads"])
def hash_page_head(
    memory,
    units,
    results,
    words,
    first_head,
    num_heads,
    REGION_BYTES: tl.constexpr,
    LENGTH_START: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """Hash one head: program p hashes head first_head + p % num_heads of page p // num_heads."""
    # A stripe or block that ends with the region is hashed after the loop over tiles.
    num_stripes: tl.constexpr = (REGION_BYTES - 1) // 64
    num_blocks: tl.constexpr = num_stripes // 16
    num_tiles: tl.constexpr = num_blocks // TILE_BLOCKS
    tile_words: tl.constexpr = TILE_BLOCKS * 128
    stripes_left: tl.constexpr = num_stripes - num_tiles * TILE_BLOCKS * 16

    program = tl.program_id(0)
    # The multiplication here shows the compiler how every page is aligned.
    page = memory + tl.load(units + program // num_heads).to(tl.int64) * 2
    region = page + (first_head + program % num_heads) * (REGION_BYTES // 8)
    lanes = tl.arange(0, 4) * 2
    secrets = words + tl.arange(0, 16)[:, None] + lanes[None, :]
    even_secret, odd_secret = _load_word(secrets), _load_word(secrets + 1)
    even_key, odd_key = _load_word(words + 16 + lanes), _load_word(words + 17 + lanes)
    even, odd = _load_word(words + 40 + lanes), _load_word(words + 41 + lanes)

    offsets = tl.arange(0, tile_words)
    ahead = tl.load(region + offsets, mask=offsets < num_stripes * 8, other=0)
    for tile in range(num_tiles):
        current = ahead
        next_word = (tile + 1) * tile_words
        ahead = tl.load(
            region + next_word + offsets, mask=offsets < num_stripes * 8 - next_word, other=0
        )
        even_sums, odd_sums = _sum_stripes(
            current, even_secret, odd_secret, TILE_BLOCKS, TILE_BLOCKS * 16
        )
        for block in tl.static_range(TILE_BLOCKS):
            even = _scramble(even + _row(even_sums, block, TILE_BLOCKS), even_key)
            odd = _scramble(odd + _row(odd_sums, block, TILE_BLOCKS), odd_key)
    even_sums, odd_sums = _sum_stripes(ahead, even_secret, odd_secret, TILE_BLOCKS, stripes_left)
    for block in tl.static_range(stripes_left // 16):
        even = _scramble(even + _row(even_sums, block, TILE_BLOCKS), even_key)
        odd = _scramble(odd + _row(odd_sums, block, TILE_BLOCKS), odd_key)
    even += _row(even_sums, stripes_left // 16, TILE_BLOCKS)
    odd += _row(odd_sums, stripes_left // 16, TILE_BLOCKS)

    last = region + REGION_BYTES // 8 - 8 + lanes
    even_word, odd_word = _load_word(last), _load_word(last + 1)
    even += _product(even_word ^ _load_word(words + 24 + lanes)) + odd_word
    odd += _product(odd_word ^ _load_word(words + 25 + lanes)) + even_word
    tl.store(
        results + program,
        _merge(even, odd, words + 32 + lanes, LENGTH_START).to(tl.int64, bitcast=True),
    )


@triton.jit
def _sum_stripes(tile, even_secret, odd_secret, BLOCKS: tl.constexpr, NUM_STRIPES: tl.constexpr):
    """Return the sums of the tile's first NUM_STRIPES stripes by block: [BLOCKS, 4] for even lanes,
    and [BLOCKS, 4] for odd lanes.

    ``tile``: [BLOCKS * 128]. A lane's product is added to the lane's accumulator, its word to the
    accumulator of the neighbouring lane.
    """
    pairs = tl.reshape(tile.to(tl.uint64, bitcast=True), (BLOCKS, 16, 4, 2))
    even, odd = tl.split(pairs)
    even_shares = _product(even ^ even_secret[None]) + odd
    odd_shares = _product(odd ^ odd_secret[None]) + even
    if NUM_STRIPES < BLOCKS * 16:
        stripes = tl.arange(0, BLOCKS)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]
        even_shares = tl.where(stripes < NUM_STRIPES, even_shares, 0)
        odd_shares = tl.where(stripes < NUM_STRIPES, odd_shares, 0)
    return tl.sum(even_shares, axis=1), tl.sum(odd_shares, axis=1)


@triton.jit
def _row(sums, INDEX: tl.constexpr, BLOCKS: tl.constexpr):
    """Return one row. This moves no data: every thread holds all rows of its lanes."""
    return tl.sum(tl.where((tl.arange(0, BLOCKS) == INDEX)[:, None], sums, 0), axis=0)


@triton.jit
def _product(value):
    """Multiply the two halves of each word."""
    return (value & 0xFFFFFFFF) * (value >> 32)


@triton.jit
def _scramble(accumulator, key):
    return (accumulator ^ (accumulator >> 47) ^ key) * 0x9E3779B1


@triton.jit
def _merge(even, odd, keys, LENGTH_START: tl.constexpr):
    """Return the checksum: multiply the accumulators in pairs, add the products, mix the bits."""
    first = even ^ _load_word(keys)
    second = odd ^ _load_word(keys + 1)
    result = tl.sum((first * second) ^ tl.umulhi(first, second), axis=0) + LENGTH_START
    result = (result ^ (result >> 37)) * 0x165667919E3779F9
    return result ^ (result >> 32)


@triton.jit
def _load_word(place):
    return tl.load(place).to(tl.uint64, bitcast=True)
