"""Finds the folders of running launches, and says what lies in them.

::

    pdlaunch-run-XXXXXXXX/   mode 0700, made by the supervisor, locked for as long as it lives
      lock                   locked as long, for those who do not see the lock of the folder
      control                socket of the supervisor (ZMQ)
      admin.sock             mode 0600; the router takes commands here (HTTP)
      launch.json            a LaunchCard, written by the router when it listens
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import msgspec

PREFIX = "pdlaunch-run-"
LOCK = "lock"
ADMIN_SOCKET = "admin.sock"
MAX_PATH_BYTES = 107
"""Linux allows a Unix socket no longer path."""

_CARD = "launch.json"
_SOCKET_NAME_BYTES = 60
"""Room that is kept free for the names of sockets inside."""


class LaunchCard(msgspec.Struct, frozen=True, kw_only=True):
    """Tells the launches of a user apart."""

    launch_id: str
    url: str
    """The router's URL, as processes on this host reach it."""

    def write(self, run_dir: Path) -> None:
        """Leave the card in the launch's folder, whole or not at all."""
        new = run_dir / f"{_CARD}.{os.getpid()}"
        new.write_bytes(msgspec.json.encode(self))
        new.replace(run_dir / _CARD)


class RunningLaunch(msgspec.Struct, frozen=True):
    """Describes a launch of this user that lives."""

    run_dir: Path
    card: LaunchCard

    @property
    def admin_socket(self) -> Path:
        return self.run_dir / ADMIN_SOCKET


def base_dir() -> Path:
    """Return the folder for temporary files.

    It is /tmp where sockets in the usual one would have too long a path.
    """
    base = Path(tempfile.gettempdir())
    longest = len(os.fsencode(base)) + len(f"/{PREFIX}12345678/") + _SOCKET_NAME_BYTES
    return base if longest <= MAX_PATH_BYTES else Path("/tmp")


def own_run_dirs(base: Path, prefix: str = PREFIX) -> list[Path]:
    """Return this user's folders in ``base``, of launches that live and of dead ones.

    Links are left out.
    """
    return sorted(path for path in base.glob(f"{prefix}*") if _is_ours(path))


def running_launches(base: Path | None = None) -> list[RunningLaunch]:
    """Return the launches of this user whose router has listened."""
    found = []
    for run_dir in own_run_dirs(base or base_dir()):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if is_in_use(run_dir):
                found.append(
                    RunningLaunch(
                        run_dir,
                        msgspec.json.decode((run_dir / _CARD).read_bytes(), type=LaunchCard),
                    )
                )
    return found


def _is_ours(path: Path) -> bool:
    """Tell whether this user owns the folder.

    Others may make folders of this name too, to be sent the commands.
    """
    with contextlib.suppress(OSError):
        return path.lstat().st_uid == os.getuid() and path.is_dir() and not path.is_symlink()
    return False


def take_lock(descriptor: int) -> None:
    """Hold an open file until it is closed. Raises OSError when another process holds it."""
    # Imported here: a plan can be made, and a clear error given, on systems that do not have it.
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_folder(descriptor: int) -> None:
    """Hold an open folder until it is closed.

    Cleaners of temporary files may remove an old file from a folder that lives. systemd-tmpfiles
    leaves a locked folder alone, with all that lies in it.
    Source: https://systemd.io/TEMPORARY_DIRECTORIES
    """
    import fcntl

    # Waits: others who look, and systemd-tmpfiles, hold a folder for an instant.
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def is_in_use(run_dir: Path) -> bool:
    """Tell whether the launch of a folder lives.

    Launches of older versions lock the file alone. Where several hosts share the folder of
    temporary files, over NFS or Lustre, each of them sees the locks of its own folders alone, and
    those of all files. Raises FileNotFoundError when nobody holds the folder and it has no file.
    """
    return is_locked(run_dir) or is_locked(run_dir / LOCK)


def is_locked(path: Path) -> bool:
    """Tell whether somebody holds the file or folder, or it cannot be told.

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
        # Removed meanwhile: by another launch that cleans up.
        return os.fstat(descriptor).st_nlink == 0
    finally:
        os.close(descriptor)
