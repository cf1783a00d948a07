"""Reads what processes have printed since the last look, from their log files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PART_BYTES = 64 * 1024
_MOST_PARTS = 16
"""Parts of one file at one look: what prints more must not keep heartbeats waiting."""


class LogTails:
    """Follows the log files of processes by name."""

    def __init__(self) -> None:
        self._read_bytes: dict[str, int] = {}

    def new(self, name: str, path: Path, *, to_the_end: bool = False) -> Iterator[bytes]:
        """Yield what the file has beyond what was read before, in parts."""
        try:
            with path.open("rb") as file:
                file.seek(self._read_bytes.get(name, 0))
                num_parts = 0
                while (to_the_end or num_parts < _MOST_PARTS) and (part := file.read(PART_BYTES)):
                    num_parts += 1
                    self._read_bytes[name] = self._read_bytes.get(name, 0) + len(part)
                    yield part
        except OSError:
            return  # Not there yet, or removed: a launch goes on without logs.
