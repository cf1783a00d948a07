"""Makes the folder of a launch, or of an agent, for its sockets, and removes those of dead ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pdlaunch.errors import StartupError
from pdlaunch.protocol.process.run_dirs import (
    LOCK,
    PREFIX,
    base_dir,
    is_in_use,
    lock_folder,
    own_run_dirs,
    take_lock,
)

_NEW_FOR_S = 60.0
"""A folder that nobody holds and that has no lock file is left alone for so long: its launch may
just be making it.
"""


@contextlib.contextmanager
def new_run_dir(base: Path | None = None) -> Iterator[Path]:
    """Yield a fresh folder, mode 0700, which is removed at the end.

    Locks of the folder and of a file in it, which die with this process, say that it is in use.
    Raises StartupError where none can be made or locked.
    """
    with contextlib.ExitStack() as undo:
        try:
            base = base or base_dir()
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
    new = run_dir / f"{LOCK}.new"
    descriptors = undo.enter_context(contextlib.ExitStack())
    # While it is still locked: nobody shall take what is half removed for stale.
    undo.callback(shutil.rmtree, run_dir, ignore_errors=True)
    folder = os.open(run_dir, os.O_RDONLY | os.O_CLOEXEC)
    descriptors.callback(os.close, folder)
    lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    descriptors.callback(os.close, lock)
    lock_folder(folder)
    # A lock file that is there and that nobody holds says that the folder is stale.
    take_lock(lock)
    new.rename(run_dir / LOCK)
    return run_dir


def remove_stale_run_dirs(base: Path) -> list[Path]:
    """Remove this user's folders whose launch is dead; return them."""
    stale = [path for path in own_run_dirs(base) if _is_stale(path)]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return stale


def _is_stale(path: Path) -> bool:
    try:
        return not is_in_use(path)
    except FileNotFoundError:
        # Its launch died, or is just about to lock it.
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > _NEW_FOR_S
        return False
