"""Locks on files that die with their process: they tell the folders of launches that run from those
that are left over.
"""

from __future__ import annotations

import os
from pathlib import Path


def take_lock(descriptor: int) -> None:
    """Hold an open file until it is closed. Raises OSError when another process holds it."""
    # Imported here: a plan can be made, and a clear error given, on systems that do not have it.
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(path: Path) -> bool:
    """Somebody holds the file, or it cannot be told. Raises FileNotFoundError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError:
        return True
    try:
        take_lock(descriptor)
    except OSError:
        return True
    else:
        # Removed meanwhile: by another launch that cleans up.
        return os.fstat(descriptor).st_nlink == 0
    finally:
        os.close(descriptor)
