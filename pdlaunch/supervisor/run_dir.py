"""The folder of a launch for sockets and rendezvous files, and what dead launches have left of theirs."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pdlaunch.supervisor.file_lock import is_locked, take_lock

PREFIX = "pdlaunch-run-"
MAX_PATH_BYTES = 107
"""Of a Unix socket's path on Linux."""

_SOCKET_NAME_BYTES = 60
"""What is kept free for the names of sockets inside."""
_LOCK = "lock"
_NEW_FOR_S = 60.0


@contextlib.contextmanager
def new_run_dir(base: Path | None = None) -> Iterator[Path]:
    """A fresh folder, mode 0700, removed at the end. A lock in it, which dies with this process, says that it is in use."""
    base = base or _base()
    remove_stale_run_dirs(base)
    run_dir = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    lock = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        take_lock(lock)
        yield run_dir
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
        os.close(lock)


def remove_stale_run_dirs(base: Path) -> list[Path]:
    """Remove this user's folders whose launch is dead; returns them."""
    stale = [path for path in base.glob(f"{PREFIX}*") if _is_ours(path) and _is_stale(path)]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return stale


def _base() -> Path:
    """The folder for temporary files, unless it is so deep that sockets in it would have too long a path."""
    base = Path(tempfile.gettempdir())
    longest = len(os.fsencode(base)) + len(f"/{PREFIX}12345678/") + _SOCKET_NAME_BYTES
    return base if longest <= MAX_PATH_BYTES else Path("/tmp")


def _is_ours(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.lstat().st_uid == os.getuid() and path.is_dir() and not path.is_symlink()
    return False


def _is_stale(path: Path) -> bool:
    try:
        return not is_locked(path / _LOCK)
    except FileNotFoundError:
        # Its launch died, or is just about to make the lock.
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > _NEW_FOR_S
        return False
