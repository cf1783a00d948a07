"""Creates the log folder of a launch, and removes the log folders of old launches."""

import contextlib
import re
import secrets
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from pdlaunch.config.model_files.find import cache_root
from pdlaunch.config.models import LaunchConfig
from pdlaunch.errors import ConfigError
from pdlaunch.protocol.process.run_dirs import is_locked, take_lock

KEPT_LAUNCHES = 20  # log folders in the cache, besides those of older running launches
SUPERVISOR_LOG = "supervisor.log"
_LAUNCH_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")


def new_launch_id() -> str:
    """Return a new launch id, which sorts by time and is unique on this machine."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def new_log_dir(config: LaunchConfig, launch_id: str) -> Path:
    """Create the log folder, by default a new one in the cache. Raises ConfigError."""
    own = cache_root() / "logs" / launch_id
    log_dir = Path(config.log_dir).expanduser() if config.log_dir else own
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
    """Lock the log folder while the block runs, so that no launch prunes it."""
    with (log_dir / SUPERVISOR_LOG).open("ab") as log:
        # If this fails, another launch with this folder holds the lock, and so keeps the folder.
        with contextlib.suppress(OSError):
            take_lock(log.fileno())
        yield


def prune_logs(folder: Path, num_kept: int = KEPT_LAUNCHES) -> list[Path]:
    """Remove old log folders of launches that have ended; return the removed folders."""
    named = (path for path in folder.iterdir() if _LAUNCH_ID.fullmatch(path.name))
    launches = sorted(path for path in named if not path.is_symlink())
    old = [path for path in launches[:-num_kept] if not _is_kept(path)]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
    return old


def _is_kept(log_dir: Path) -> bool:
    try:
        return is_locked(log_dir / SUPERVISOR_LOG)
    except FileNotFoundError:
        return False
