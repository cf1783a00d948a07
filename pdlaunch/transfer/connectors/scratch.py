"""Proves and times the paths to a peer with READs of its scratch, which holds a known pattern.

::

    for each path:   cold READ ── right bytes ──▶ warm READ x NUM_WARM_READS ──▶ GB/s of the fastest
                       └── refused, failed, late, wrong bytes ──▶ the path's error
"""

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch

from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import Read

PATTERN_BYTES = 1024**2
SCRATCH_BYTES = 16 * PATTERN_BYTES  # scratch on a CPU: enough to time a path of several GB/s
# Scratch on a GPU: a READ takes 0.3 ms at 400 GB/s, much longer than its start.
DEVICE_SCRATCH_BYTES = 128 * PATTERN_BYTES
# Smallest piece in a READ of the scratch. The time of a smaller piece hardly depends on its size.
LEAST_PIECE_BYTES = 4 * 1024
# READs with pieces of at least this size cover the scratch. READs with smaller pieces have the same
# number of pieces and read only a part: a greater number would only take longer.
COVERING_PIECE_BYTES = 16 * 1024
# Number of timed READs. The fastest one counts, because other work easily delays a READ of 0.5 ms.
NUM_WARM_READS = 3
STEADY_S = 0.02  # a READ that takes this long is not repeated: delays hardly change its time
# Paths with this share of the best speed count as equal, because measurements scatter by less.
# Among equal paths, the connector's preference decides.
NEARLY = 0.95

# Starts a READ of a peer's scratch over a path; returns it and its landing. Raises TransferError.
StartRead = Callable[[str], tuple[Read, torch.Tensor]]


def write_pattern(scratch: torch.Tensor, agent_name: str) -> None:
    """Fill [num_bytes] uint8 with this incarnation's pattern, so that peers see stale mappings."""
    scratch.view(-1, PATTERN_BYTES).copy_(_row(agent_name))


def has_pattern(landing: torch.Tensor, agent_name: str) -> bool:
    """Return True if the agent's scratch begins with these bytes, a multiple of PATTERN_BYTES."""
    row = _row(agent_name).to(landing.device)
    return bool((landing.view(-1, PATTERN_BYTES) == row).all())


def new_landing(num_bytes: int, device: torch.device, block_bytes: int) -> tuple[torch.Tensor, int]:
    """Return memory for the beginning of a scratch of ``num_bytes``, at least a quarter of it, and
    the size of its pieces: about the size of a block, so that a piece costs as much as a block.
    """
    wanted = min(num_bytes, max(block_bytes, LEAST_PIECE_BYTES))
    piece_bytes = 1 << (wanted.bit_length() - 1)
    num_pieces = num_bytes // max(piece_bytes, COVERING_PIECE_BYTES)
    # Write zeros, because the first use of each page would count as time of the READ.
    landing = torch.empty(num_pieces * piece_bytes, dtype=torch.uint8, device=device).fill_(0)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # READs do not wait for this stream
    return landing, piece_bytes


def _row(agent_name: str) -> torch.Tensor:
    """Return the pattern, [PATTERN_BYTES] uint8. The scratch repeats it."""
    row = hashlib.shake_256(agent_name.encode()).digest(PATTERN_BYTES)
    return torch.frombuffer(bytearray(row), dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class PathFigure:
    path: str
    gigabytes_per_s: float = 0.0
    error: str = ""  # why the path cannot be used; empty if it can

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
    """Try all paths to one peer in ``timeout_s``. Yields while a READ is pending. A READ that times
    out, or is pending when the generator is closed, must be released by the caller after its end.
    """
    figures: list[PathFigure] = []
    # A path that hangs must leave time for the other paths. A single path ends with the
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
            # Not the first READ, whose time includes the set-up of connections and mappings.
            figures.append(PathFigure(path, landing.numel() / 1e9 / max(min(times_s[1:]), 1e-9)))
    return figures


def best_path(figures: Sequence[PathFigure]) -> PathFigure:
    """Return the first path with at least NEARLY the best speed. Raises TransferError."""
    usable = [figure for figure in figures if not figure.error]
    if not usable:
        errors = [f"{figure.path}: {figure.error}" for figure in figures]
        raise TransferError(figures[0].error if len(figures) == 1 else "; ".join(errors))
    fastest = max(figure.gigabytes_per_s for figure in usable)
    return next(figure for figure in usable if figure.gigabytes_per_s >= NEARLY * fastest)
