"""Whether this user can write to a folder, or make it: asked without writing anything. Never
raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

Access = Callable[[Path, int], bool]


def why_not_writable(folder: str, access: Access = os.access) -> str | None:
    """What keeps this user from writing to ``folder``, which need not exist yet; None: nothing
    known.
    """
    try:
        path = Path(folder).absolute()
        nearest = next(known for known in (path, *path.parents) if os.path.lexists(known))
        if not nearest.is_dir():
            what = (
                "a link to nothing"
                if nearest.is_symlink() and not nearest.exists()
                else "no folder"
            )
            return f"{nearest} is {what}"
        if not access(nearest, os.W_OK | os.X_OK):
            return f"this user may not write to {nearest}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None
