"""Makes and finds the folders of running launches.

::

    pdlaunch-run-XXXXXXXX/   mode 0700, made by the supervisor, locked while the supervisor lives
      lock                   also locked, for hosts that share the folder but not its own lock
      control                socket of the supervisor, or of its host's agent (ZMQ)
      admin.sock             mode 0600; the router accepts commands here (HTTP)
      launch.json            a LaunchCard, written by the router when it listens
"""

import contextlib
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec

from pdlaunch.errors import StartupError

LAUNCH_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
PREFIX = "pdlaunch-run-"
LOCK = "lock"
ADMIN_SOCKET = "admin.sock"
CONTROL_SOCKET = "control"
MAX_PATH_BYTES = 107  # the longest path of a Unix socket on Linux
_CARD = "launch.json"
_SHORT = Path("/tmp")
_logger = logging.getLogger(__name__)
_SOCKET_NAME_BYTES = 32  # room for the names of sockets: ``prefill-9999.inproc.replay_dp63``
# A folder without a lock file is not stale at first: its launch may be about to create the file.
_NEW_FOR_S = 60.0


def new_launch_id() -> str:
    """Return a new launch id, which sorts by time and is unique on this machine."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


class LaunchCard(msgspec.Struct, frozen=True, kw_only=True):
    launch_id: str
    url: str  # the router's URL for processes on this host

    def write(self, run_dir: Path) -> None:
        new = run_dir / f"{_CARD}.{os.getpid()}"
        new.write_bytes(msgspec.json.encode(self))
        new.replace(run_dir / _CARD)


class RunningLaunch(msgspec.Struct, frozen=True):
    run_dir: Path
    card: LaunchCard

    @property
    def admin_socket(self) -> Path:
        return self.run_dir / ADMIN_SOCKET


def running_launches(base: Path | None = None) -> list[RunningLaunch]:
    """Return the running launches of this user whose router has written its card."""
    found = []
    for run_dir in _own_run_dirs(base or base_dir()):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if _is_in_use(run_dir):
                card = msgspec.json.decode((run_dir / _CARD).read_bytes(), type=LaunchCard)
                found.append(RunningLaunch(run_dir, card))
    return found


@contextlib.contextmanager
def new_run_dir(base: Path | None = None) -> Iterator[Path]:
    """Yield a new locked folder, mode 0700, and remove it at the end. Raises StartupError."""
    with contextlib.ExitStack() as undo:
        try:
            base = base or base_dir()
            if (wanted := Path(tempfile.gettempdir())) != base == _SHORT:
                _logger.warning(
                    "sockets need a shorter path than TMPDIR %s: the launch's folder is in %s",
                    wanted,
                    base,
                )
            remove_stale_run_dirs(base)
            run_dir = _locked_folder(base, undo)
        except OSError as error:
            raise StartupError(
                f"no folder can be made and locked in {base or 'any folder of temporary files'}: "
                f"{error.strerror or error}; set TMPDIR to a folder on a local disk with room"
            ) from error
        yield run_dir


def _locked_folder(base: Path, undo: contextlib.ExitStack) -> Path:
    run_dir = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    descriptors = undo.enter_context(contextlib.ExitStack())
    # Remove the folder before it is unlocked, or others may see a half removed, stale folder.
    undo.callback(shutil.rmtree, run_dir, ignore_errors=True)
    folder = os.open(run_dir, os.O_RDONLY | os.O_CLOEXEC)
    descriptors.callback(os.close, folder)
    new = run_dir / f"{LOCK}.new"
    lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    descriptors.callback(os.close, lock)
    lock_folder(folder)
    take_lock(lock)
    new.rename(run_dir / LOCK)  # only now: a lock file that is not locked makes its folder stale
    return run_dir


def remove_stale_run_dirs(base: Path) -> list[Path]:
    """Remove this user's folders whose launch is dead; return them."""
    stale = []
    for path in _own_run_dirs(base):
        with contextlib.suppress(OSError):  # another process removes it
            try:
                is_stale = not _is_in_use(path)
            except FileNotFoundError:
                is_stale = time.time() - path.stat().st_mtime > _NEW_FOR_S
            if is_stale:
                shutil.rmtree(path, ignore_errors=True)
                stale.append(path)
    return stale


def base_dir() -> Path:
    """Return the folder for temporary files, or /tmp if its path is too long for sockets."""
    base = Path(tempfile.gettempdir())
    longest = len(os.fsencode(base)) + len(f"/{PREFIX}12345678/") + _SOCKET_NAME_BYTES
    return base if longest <= MAX_PATH_BYTES else _SHORT


def _own_run_dirs(base: Path) -> Iterator[Path]:
    """Yield this user's folders in ``base``; other users may have folders with such names."""
    for path in sorted(base.glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.getuid() and path.is_dir() and not path.is_symlink():
                yield path


def take_lock(descriptor: int) -> None:
    """Lock an open file until it is closed. Raises OSError if another process has locked it."""
    # Imported here, so that systems without fcntl can make plans and report clear errors.
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_folder(descriptor: int) -> None:
    """Lock an open folder until it is closed. systemd-tmpfiles does not clean locked folders.

    Source: https://systemd.io/TEMPORARY_DIRECTORIES
    """
    import fcntl

    # Blocks, because systemd-tmpfiles and other launches lock the folder for an instant.
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_in_use(run_dir: Path) -> bool:
    # Two locks: cleaners may delete lock files, and NFS and Lustre do not share locks of folders.
    return is_locked(run_dir) or is_locked(run_dir / LOCK)


def is_locked(path: Path) -> bool:
    """Return True if the path is locked, or if that is unknown. Raises FileNotFoundError."""
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError:
        return True
    try:
        # A shared lock, so that processes that check at the same time ignore each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return os.fstat(descriptor).st_nlink == 0  # another launch has removed it meanwhile
    finally:
        os.close(descriptor)
