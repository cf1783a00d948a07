"""Jobs that the scheduler gives to the offload worker of every rank, and their reports. No torch.

A host block holds one KV block of one group. A job's blocks and host blocks belong to the job from
the moment it is made until all ranks have reported it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Direction = Literal["store", "load"]  # ``store``: device to host; ``load``: host to device

DIRECTIONS: tuple[Direction, Direction] = ("store", "load")


class BlockKey(NamedTuple):
    """Names the content of a block."""

    group: int
    block_hash: bytes  # covers model, salt and all tokens up to the end of the block


@dataclass(frozen=True, slots=True)
class OffloadJob:
    """Describes one transfer, the same for all ranks; each rank moves its own heads of the blocks.

    The three lists are equally long: block i moves between ``block_ids[i]`` and ``host_ids[i]``.
    """

    job_id: int
    direction: Direction
    block_ids: list[int]  # device blocks
    host_ids: list[int]
    keys: list[BlockKey]
    """The content of each block: a store writes it, a load expects it."""


@dataclass(frozen=True, slots=True)
class JobFinished:
    """A job has ended: nothing reads or writes its blocks any more."""

    job_id: int
    ok: bool
    """All bytes are where they belong; those of a load are proven to be those that were stored."""
    error: str = ""
    failed_host_ids: list[int] = field(default_factory=list)
    """Host blocks whose content was not what this load expected."""
    num_bytes: int = 0
