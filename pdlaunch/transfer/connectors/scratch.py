"""Fills and checks the scratch of a rank: memory with a known pattern that peers read in pieces to
prove a path and to time it.
"""

from __future__ import annotations

import hashlib

import torch

PATTERN_BYTES = 1024**2
SCRATCH_BYTES = 16 * PATTERN_BYTES
"""Scratch on a CPU: enough to time a path of several GB/s."""
DEVICE_SCRATCH_BYTES = 128 * PATTERN_BYTES
"""Scratch on a GPU: a third of a millisecond at 400 GB/s, long against the cost of starting a READ.
"""
LEAST_PIECE_BYTES = 4 * 1024
"""Smallest piece that a scratch is read in: where blocks are smaller, a piece's own cost is nearly
all of its time anyway.
"""
COVERING_PIECE_BYTES = 16 * 1024
"""Pieces from this size on cover the scratch. There are no more of smaller ones than of these: more
would only take longer.
"""


def scratch_bytes(device: torch.device) -> int:
    """Return the size of the scratch of a rank on ``device``."""
    return SCRATCH_BYTES if device.type == "cpu" else DEVICE_SCRATCH_BYTES


def write_pattern(scratch: torch.Tensor, agent_name: str) -> None:
    """Fill ``scratch``, [num_bytes] uint8. The bytes differ for every incarnation of an agent, so
    that a stale mapping shows.
    """
    scratch.view(-1, PATTERN_BYTES).copy_(_row(agent_name))


def has_pattern(landing: torch.Tensor, agent_name: str) -> bool:
    """Return whether that agent's scratch begins with these bytes. ``landing`` is [num_bytes]
    uint8, a multiple of PATTERN_BYTES.
    """
    row = _row(agent_name).to(landing.device)
    return bool((landing.view(-1, PATTERN_BYTES) == row).all())


def new_landing(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Return [num_bytes] uint8 of zeros to read a scratch into. Its pages are touched: their first
    use would count as time of the READ.
    """
    landing = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(0)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # READs do not wait for what is queued
    return landing


def piece_offsets(num_bytes: int, *block_bytes: int) -> tuple[list[int], int]:
    """Return where the pieces to read of a scratch begin, and their size: about that of the smaller
    block, so that its cost shows.

    They go from last to first, so that no connector merges neighbours: it could not merge the
    scattered blocks of a prompt either. Together they are the beginning of the scratch, a quarter
    of it at least.
    """
    wanted = min(num_bytes, max(min(block_bytes), LEAST_PIECE_BYTES))
    piece_bytes = 1 << (wanted.bit_length() - 1)
    num_pieces = num_bytes // max(piece_bytes, COVERING_PIECE_BYTES)
    return [index * piece_bytes for index in reversed(range(num_pieces))], piece_bytes


def _row(agent_name: str) -> torch.Tensor:
    """Return [PATTERN_BYTES] uint8, which a scratch repeats."""
    row = hashlib.shake_256(agent_name.encode()).digest(PATTERN_BYTES)
    return torch.frombuffer(bytearray(row), dtype=torch.uint8)
