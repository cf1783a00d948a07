"""Makes the folders of a launch for its log files and its sockets, and removes those of dead
launches.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from pdlaunch.config.model_files.aliases import cache_root
from pdlaunch.config.models import LaunchConfig
from pdlaunch.errors import ConfigError
from pdlaunch.process.run_dirs import LOCK, PREFIX, base_dir, is_locked, own_run_dirs, take_lock

KEPT_LAUNCHES = 20
"""Number of log folders in the cache that stay, the new one included.

Those of running launches stay beyond that.
"""
SUPERVISOR_LOG = "supervisor.log"
_LAUNCH_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
_NEW_FOR_S = 60.0
"""A run folder without a lock is left alone for so long: its launch may just be making it."""


def new_launch_id() -> str:
    """Return a new id: sortable by time, unique on this machine."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def new_log_dir(config: LaunchConfig, launch_id: str) -> Path:
    """Make the folder of the log files: as configured, else a new one in the cache.

    Raises ConfigError when nothing can be written there.
    """
    log_dir = (
        Path(config.log_dir).expanduser() if config.log_dir else cache_root() / "logs" / launch_id
    )
    try:
        log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        (log_dir / SUPERVISOR_LOG).touch()
    except OSError as error:
        raise ConfigError(
            f"log files cannot be written to {log_dir}: {error.strerror}",
            field="log_dir",
            value=str(log_dir),
            fix="name a folder that you may write to with --log-dir",
        ) from None
    if not config.log_dir:
        prune_logs(log_dir.parent)
    return log_dir.resolve()


@contextlib.contextmanager
def keep_logs(log_dir: Path) -> Iterator[None]:
    """Keep everybody from pruning the folder while the block runs."""
    with (log_dir / SUPERVISOR_LOG).open("ab") as log:
        # Another launch that writes to the same folder has it, and keeps it as well.
        with contextlib.suppress(OSError):
            take_lock(log.fileno())
        yield


def prune_logs(folder: Path, num_kept: int = KEPT_LAUNCHES) -> list[Path]:
    """Remove all but the latest log folders of launches that have ended; return the removed."""
    launches = sorted(
        path
        for path in folder.iterdir()
        if _LAUNCH_ID.fullmatch(path.name) and not path.is_symlink()
    )
    old = [path for path in launches[:-num_kept] if not _is_kept(path)]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
    return old


def _is_kept(log_dir: Path) -> bool:
    try:
        return is_locked(log_dir / SUPERVISOR_LOG)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def new_run_dir(base: Path | None = None) -> Iterator[Path]:
    """Yield a fresh folder, mode 0700, which is removed at the end.

    A lock in it, which dies with this process, says that the folder is in use.
    """
    base = base or base_dir()
    remove_stale_run_dirs(base)
    run_dir = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    lock = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        take_lock(lock)
        yield run_dir
    finally:
        # While it is still locked: nobody shall take what is half removed for stale.
        shutil.rmtree(run_dir, ignore_errors=True)
        os.close(lock)


def remove_stale_run_dirs(base: Path) -> list[Path]:
    """Remove this user's folders whose launch is dead; return them."""
    stale = [path for path in own_run_dirs(base) if _is_stale(path)]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return stale


def _is_stale(path: Path) -> bool:
    try:
        return not is_locked(path / LOCK)
    except FileNotFoundError:
        # Its launch died, or is just about to make the lock.
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > _NEW_FOR_S
        return False
