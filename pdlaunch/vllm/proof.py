"""Judges blocks that a decode worker has read, against what prefill workers state about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pdlaunch.vllm.statements import ChecksumArray, Statement


def first_head(total_num_heads: int, tp_size: int, tp_rank: int) -> int:
    """Return the index of a rank's first KV head among those of the model.

    With more ranks than heads, neighbours have the same one.
    """
    return tp_rank * total_num_heads // tp_size


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    token_hash: str
    # All blocks of the prompt at the prefill engine; the last ones were read.
    remote_block_ids: tuple[int, ...]
    first_head: int
    algorithm: str
    checksums: ChecksumArray  # checksums of the blocks that were read


def judge(read: ReadBlocks, statements: Mapping[int, Statement | None]) -> str:
    """Return why blocks must not be used; empty: they are those that prefill computed.

    ``statements``: of each prefill rank whose heads were read, None where there is none any more.
    """
    num_blocks, num_heads = read.checksums.shape
    open_heads = set(range(read.first_head, read.first_head + num_heads))
    for rank, statement in sorted(statements.items()):
        if statement is None:
            return f"rank {rank} does not vouch for them any more: their lease has expired"
        if reason := _difference(read, statement, num_blocks):
            return f"{reason} (rank {rank})"
        stated = range(statement.first_head, statement.first_head + statement.checksums.shape[1])
        heads = [head for head in stated if head in open_heads]
        ours = read.checksums[:, [head - read.first_head for head in heads]]
        theirs = statement.checksums[
            len(statement.block_ids) - num_blocks :, [head - stated.start for head in heads]
        ]
        wrong = (ours != theirs).nonzero()
        if len(wrong[0]):
            return (
                f"{len(wrong[0])} of {ours.size} checksums of rank {rank} differ, first in block "
                f"{wrong[0][0]} of those read, head {heads[wrong[1][0]]}"
            )
        open_heads -= set(heads)
    return f"nobody vouches for heads {_listed(sorted(open_heads))}" if open_heads else ""


def _difference(read: ReadBlocks, statement: Statement, num_blocks: int) -> str:
    if statement.algorithm != read.algorithm:
        return f"prefill hashes with {statement.algorithm}, decode with {read.algorithm}"
    if statement.token_hash != read.token_hash:
        return "they are those of another prompt"
    if statement.block_ids != read.remote_block_ids:
        return "prefill vouches for other blocks than it was said to have"
    if num_blocks > len(statement.block_ids):
        return f"prefill vouches for {len(statement.block_ids)} blocks, {num_blocks} were read"
    return ""


def _listed(heads: Sequence[int]) -> str:
    return ", ".join(map(str, heads))
