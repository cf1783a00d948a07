"""Proves and times the paths to a peer by READs of its scratch, memory with a known pattern.

::

    for each path:   cold READ ── right bytes ──▶ warm READ x NUM_WARM_READS ──▶ GB/s of the fastest
                       └── refused, failed, late, wrong bytes ──▶ why it cannot be used
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch

from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import Read

PATTERN_BYTES = 1024**2
SCRATCH_BYTES = 16 * PATTERN_BYTES  # scratch on a CPU: enough to time a path of several GB/s
# Scratch on a GPU: a third of a millisecond at 400 GB/s, long against the cost of starting a READ.
DEVICE_SCRATCH_BYTES = 128 * PATTERN_BYTES
# Smallest piece that a scratch is read in: where blocks are smaller, a piece's own cost is nearly
# all of its time anyway.
LEAST_PIECE_BYTES = 4 * 1024
# Pieces from this size on cover the scratch. There are no more of smaller ones than of these: more
# would only take longer.
COVERING_PIECE_BYTES = 16 * 1024
# READs that are timed; the best one counts: half a millisecond is easily disturbed.
NUM_WARM_READS = 3
STEADY_S = 0.02  # a READ that takes this long is not repeated: disturbances are short beside it
# Share of the best speed that counts as equal; it is more than the spread of a measurement. Among
# equals the connector's preference counts.
NEARLY = 0.95

# Starts a READ of a peer's scratch over a path; returns where it lands, too. Raises TransferError.
StartRead = Callable[[str], tuple[Read, torch.Tensor]]


def scratch_bytes(device: torch.device) -> int:
    """Return the size of the scratch of a rank on ``device``."""
    return SCRATCH_BYTES if device.type == "cpu" else DEVICE_SCRATCH_BYTES


def write_pattern(scratch: torch.Tensor, agent_name: str) -> None:
    """Fill [num_bytes] uint8 with bytes of this incarnation, so that a stale mapping shows."""
    scratch.view(-1, PATTERN_BYTES).copy_(_row(agent_name))


def has_pattern(landing: torch.Tensor, agent_name: str) -> bool:
    """Return whether that agent's scratch begins with these bytes. ``landing`` is [num_bytes]
    uint8, a multiple of PATTERN_BYTES.
    """
    row = _row(agent_name).to(landing.device)
    return bool((landing.view(-1, PATTERN_BYTES) == row).all())


def new_landing(num_bytes: int, device: torch.device, block_bytes: int) -> tuple[torch.Tensor, int]:
    """Return memory for the beginning of a scratch of ``num_bytes``, a quarter of it at least, and
    the size of the pieces to read: about that of a block, so that its cost shows.
    """
    wanted = min(num_bytes, max(block_bytes, LEAST_PIECE_BYTES))
    piece_bytes = 1 << (wanted.bit_length() - 1)
    num_pieces = num_bytes // max(piece_bytes, COVERING_PIECE_BYTES)
    # Pages are touched by the zeros: their first use would count as time of the READ.
    landing = torch.empty(num_pieces * piece_bytes, dtype=torch.uint8, device=device).fill_(0)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # READs do not wait for what is queued
    return landing, piece_bytes


def _row(agent_name: str) -> torch.Tensor:
    """Return [PATTERN_BYTES] uint8, which a scratch repeats."""
    row = hashlib.shake_256(agent_name.encode()).digest(PATTERN_BYTES)
    return torch.frombuffer(bytearray(row), dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class PathFigure:
    path: str
    gigabytes_per_s: float = 0.0
    error: str = ""  # the reason why the path cannot be used; empty when it can

    def __str__(self) -> str:
        return self.error or f"{self.gigabytes_per_s:.3g} GB/s"


def try_paths(
    start: StartRead,
    release: Callable[[Read], None],
    paths: Sequence[str],
    *,
    agent_name: str,
    clock: Callable[[], float],
    timeout_s: float,
) -> Generator[None, None, list[PathFigure]]:
    """Try all paths to one peer, and yield while a READ is pending.

    ``timeout_s`` is for all paths together. A READ that is given up, as when the generator is
    closed, is not released: it stays with the caller, which gave ``start``.
    """
    figures: list[PathFigure] = []
    # One of several paths that hangs must not cost the others; a single one has until the
    # handshake's own time-out.
    path_timeout_s = timeout_s / (len(paths) + 1) if len(paths) > 1 else float("inf")
    for path in paths:
        deadline_at = clock() + path_timeout_s
        times_s: list[float] = []
        try:
            while len(times_s) <= NUM_WARM_READS and max(times_s[1:], default=0.0) < STEADY_S:
                read, landing = start(path)
                while (state := read.poll()) == "pending":
                    if clock() >= deadline_at:
                        raise TransferError(
                            f"the first READ did not end within {path_timeout_s:.3g} s"
                        )
                    yield
                times_s.append(read.seconds() if state == "done" else 0.0)
                release(read)
                if state == "failed":
                    raise TransferError("the first READ failed")
                if len(times_s) == 1 and not has_pattern(landing, agent_name):
                    raise TransferError("the first READ brought wrong bytes")
        except TransferError as error:
            figures.append(PathFigure(path, error=str(error)))
        else:
            # The first READ was cold: it has paid for connections and mappings.
            figures.append(PathFigure(path, landing.numel() / 1e9 / max(min(times_s[1:]), 1e-9)))
    return figures


def best_path(figures: Sequence[PathFigure]) -> PathFigure:
    """Return the first path that is nearly as fast as the fastest. Raises TransferError."""
    usable = [figure for figure in figures if not figure.error]
    if not usable:
        errors = [f"{figure.path}: {figure.error}" for figure in figures]
        raise TransferError(figures[0].error if len(figures) == 1 else "; ".join(errors))
    fastest = max(figure.gigabytes_per_s for figure in usable)
    return next(figure for figure in usable if figure.gigabytes_per_s >= NEARLY * fastest)
