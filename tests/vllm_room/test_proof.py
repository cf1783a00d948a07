from dataclasses import replace

import numpy as np
import pytest

from pdlaunch.vllm.proof import ReadBlocks, first_head, judge
from pdlaunch.vllm.statements import Statement

NUM_HEADS, BLOCKS = 4, (5, 3, 8)
ALL = np.arange(1, 1 + len(BLOCKS) * NUM_HEADS, dtype=np.uint64).reshape(len(BLOCKS), NUM_HEADS)


def stated(tp_size: int, tp_rank: int) -> Statement:
    first, num = first_head(NUM_HEADS, tp_size, tp_rank), max(1, NUM_HEADS // tp_size)
    return Statement("tokens", BLOCKS, first, "blake3", ALL[:, first : first + num])


def read(tp_size: int = 1, tp_rank: int = 0, num_blocks: int = 3) -> ReadBlocks:
    first, num = first_head(NUM_HEADS, tp_size, tp_rank), max(1, NUM_HEADS // tp_size)
    checksums = ALL[len(BLOCKS) - num_blocks :, first : first + num]
    return ReadBlocks("tokens", BLOCKS, first, "blake3", checksums.copy())


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize(
    ("prefill", "decode", "sources"),
    [
        (1, 1, {0: (0,)}),
        (2, 2, {0: (0,), 1: (1,)}),
        (1, 4, {0: (0,), 1: (0,), 3: (0,)}),
        (4, 2, {0: (0, 1), 1: (2, 3)}),
        (8, 8, {0: (0,), 5: (5,), 7: (7,)}),
        (8, 2, {1: (4, 6)}),
    ],
)
def test_ranks_that_vouch_for_all_heads_prove_what_was_read(
    prefill: int, decode: int, sources: dict[int, tuple[int, ...]], num_blocks: int
) -> None:
    for rank, source_ranks in sources.items():
        statements = {source: stated(prefill, source) for source in source_ranks}
        blocks = read(decode, rank, num_blocks)
        assert judge(blocks, statements) == ""
        for at in np.ndindex(*blocks.checksums.shape):
            blocks.checksums[at] ^= 1
            assert "checksums of rank" in judge(blocks, statements)
            blocks.checksums[at] ^= 1


def test_heads_that_nobody_vouches_for_are_not_proven() -> None:
    assert judge(read(), {0: stated(2, 0)}) == "nobody vouches for heads 2, 3"
    assert judge(read(), {}) == "nobody vouches for heads 0, 1, 2, 3"


def test_a_statement_that_was_withdrawn_proves_nothing() -> None:
    statements = {0: stated(2, 0), 1: None}
    assert "their lease has expired" in judge(read(), statements)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"token_hash": "others"}, "those of another prompt"),
        ({"block_ids": (5, 3, 9)}, "other blocks than it was said to have"),
        ({"algorithm": "xxh3_64+blake3"}, "prefill hashes with xxh3_64"),
    ],
)
def test_a_statement_on_something_else_proves_nothing(changed: dict, reason: str) -> None:
    assert reason in judge(read(), {0: replace(stated(1, 0), **changed)})


def test_more_blocks_than_stated_are_not_proven() -> None:
    blocks = replace(read(), checksums=np.vstack([ALL, ALL]))
    assert "3 blocks, 6 were read" in judge(blocks, {0: stated(1, 0)})
