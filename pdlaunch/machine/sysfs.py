"""Reads files of the kernel that tell of devices."""

from __future__ import annotations

from pathlib import Path

RDMA_FOLDER = Path("/sys/class/infiniband")


def first_line(path: Path) -> str:
    """Return the line; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
