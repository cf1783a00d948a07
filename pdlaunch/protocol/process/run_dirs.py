"""Makes and finds the folders of running launches.

::

    pdlaunch-run-XXXXXXXX/   mode 0700, made by the supervisor, locked for as long as it lives
      lock                   locked as long, for hosts that share the folder and see no lock of it
      control                socket of the supervisor (ZMQ)
      admin.sock             mode 0600; the router takes commands here (HTTP)
      launch.json            a LaunchCard, written by the router when it listens
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pdlaunch.errors import StartupError

PREFIX = "pdlaunch-run-"
LOCK = "lock"
ADMIN_SOCKET = "admin.sock"
MAX_PATH_BYTES = 107  # the longest path of a Unix socket on Linux
_CARD = "launch.json"
_SHORT = Path("/tmp")
_logger = logging.getLogger(__name__)
_SOCKET_NAME_BYTES = 28  # room for the names of sockets inside: ``prefill-9999.events.replay``
# A folder without a lock file is left alone at first: its launch may just be making it.
_NEW_FOR_S = 60.0


class LaunchCard(msgspec.Struct, frozen=True, kw_only=True):
    launch_id: str
    url: str  # the router's URL, as processes on this host reach it

    def write(self, run_dir: Path) -> None:
        """Leave the card in the launch's folder, whole or not at all."""
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
    """Return the launches of this user whose router has listened."""
    found = []
    for run_dir in _own_run_dirs(base or base_dir()):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if _is_in_use(run_dir):
                card = msgspec.json.decode((run_dir / _CARD).read_bytes(), type=LaunchCard)
                found.append(RunningLaunch(run_dir, card))
    return found


@contextlib.contextmanager
def new_run_dir(base: Path | None = None) -> Iterator[Path]:
    """Yield a fresh folder, mode 0700, locked by this process and removed at the end.

    Raises StartupError where none can be made or locked.
    """
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
    # Removed while it is still locked: a half removed folder must not be taken for stale.
    undo.callback(shutil.rmtree, run_dir, ignore_errors=True)
    folder = os.open(run_dir, os.O_RDONLY | os.O_CLOEXEC)
    descriptors.callback(os.close, folder)
    new = run_dir / f"{LOCK}.new"
    lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    descriptors.callback(os.close, lock)
    lock_folder(folder)
    take_lock(lock)
    new.rename(run_dir / LOCK)  # a lock file that nobody holds makes its folder stale
    return run_dir


def remove_stale_run_dirs(base: Path) -> list[Path]:
    """Remove this user's folders whose launch is dead; return them."""
    stale = [path for path in _own_run_dirs(base) if _is_stale(path)]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return stale


def _is_stale(run_dir: Path) -> bool:
    try:
        return not _is_in_use(run_dir)
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            return time.time() - run_dir.stat().st_mtime > _NEW_FOR_S
        return False


def base_dir() -> Path:
    """Return the folder for temporary files, or /tmp where its path is too long for sockets."""
    base = Path(tempfile.gettempdir())
    longest = len(os.fsencode(base)) + len(f"/{PREFIX}12345678/") + _SOCKET_NAME_BYTES
    return base if longest <= MAX_PATH_BYTES else _SHORT


def _own_run_dirs(base: Path) -> Iterator[Path]:
    """Yield this user's folders in ``base``: others may make some of the same name."""
    for path in sorted(base.glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.getuid() and path.is_dir() and not path.is_symlink():
                yield path


def take_lock(descriptor: int) -> None:
    """Hold an open file until it is closed. Raises OSError when another process holds it."""
    # Imported here: a plan can be made, and a clear error given, on systems that do not have it.
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_folder(descriptor: int) -> None:
    """Hold an open folder until it is closed; systemd-tmpfiles leaves locked folders alone.

    Source: https://systemd.io/TEMPORARY_DIRECTORIES
    """
    import fcntl

    # Waits: others who look, and systemd-tmpfiles, hold a folder for an instant.
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_in_use(run_dir: Path) -> bool:
    # Either: cleaners take lock files, and over NFS or Lustre the locks of folders do not show.
    return is_locked(run_dir) or is_locked(run_dir / LOCK)


def is_locked(path: Path) -> bool:
    """Return whether somebody holds the file or folder, or True where that is unknown.

    Raises FileNotFoundError.
    """
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError:
        return True
    try:
        # Shared: others who look at the same time are not taken for a holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return os.fstat(descriptor).st_nlink == 0  # removed meanwhile, by another launch
    finally:
        os.close(descriptor)
