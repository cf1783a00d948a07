"""Brings pdlaunch's KV connector into the processes of an engine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pdlaunch

_STATEMENTS = "kv-statements"
_PACKAGES = "python"


def connector_environment(run_dir: Path, python_path: str) -> dict[str, str]:
    """Return the variables with which vLLM finds the connector, and engines each other's
    statements; what they name is made in the launch's folder.

    ``python_path``: the PYTHONPATH so far. Engines of one launch call this at the same time.
    """
    statements = run_dir / _STATEMENTS
    statements.mkdir(mode=0o700, exist_ok=True)
    # The folder that pdlaunch is installed in has packages of other versions than vLLM needs.
    packages = run_dir / _PACKAGES
    packages.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (packages / "pdlaunch").symlink_to(Path(pdlaunch.__file__).parent)
    paths = [str(packages), *([python_path] if python_path else [])]
    return {
        "PDLAUNCH_STATEMENTS_DIR": str(statements),
        "PYTHONPATH": os.pathsep.join(paths),
    }
