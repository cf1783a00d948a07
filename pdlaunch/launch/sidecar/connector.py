"""Brings pdlaunch's KV connector into the processes of an engine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pdlaunch

_STATEMENTS = "kv-statements"
STATEMENTS_SOCKET = "PDLAUNCH_STATEMENTS_SOCKET"
"""As ``pdlaunch.vllm.far_statements`` has it, which imports numpy."""
_PACKAGES = "python"


def statements_folder(run_dir: Path) -> Path:
    """Return where the engines of this host leave what they state about their blocks."""
    return run_dir / _STATEMENTS


def statements_socket(run_dir: Path, name: str) -> Path:
    """Return where an engine asks its sidecar for what those of other hosts state."""
    return run_dir / f"{name}.statements"


def connector_environment(
    run_dir: Path, name: str, python_path: str, *, is_far: bool = False
) -> dict[str, str]:
    """Return the variables with which an engine of vLLM finds the connector, and engines each
    other's statements; what they name is made in the launch's folder.

    ``python_path``: the PYTHONPATH so far. ``is_far``: other engines may be on other hosts. Engines
    of one launch call this at the same time.
    """
    asks = {STATEMENTS_SOCKET: str(statements_socket(run_dir, name))} if is_far else {}
    statements = statements_folder(run_dir)
    statements.mkdir(mode=0o700, exist_ok=True)
    # The folder that pdlaunch is installed in has packages of other versions than vLLM needs.
    packages = run_dir / _PACKAGES
    packages.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (packages / "pdlaunch").symlink_to(Path(pdlaunch.__file__).parent)
    paths = [str(packages), *([python_path] if python_path else [])]
    return {
        "PDLAUNCH_STATEMENTS_DIR": str(statements),
        "PDLAUNCH_FAILURES_FILE": str(_failures_file(run_dir, name)),
        "PYTHONPATH": os.pathsep.join(paths),
    } | asks


class Failures:
    """Reads from which engines an engine could not read KV blocks, as its connector tells."""

    def __init__(self, run_dir: Path, name: str) -> None:
        """Begin a new file."""
        self._path = _failures_file(run_dir, name)
        self._path.unlink(missing_ok=True)
        self._offset = 0

    def latest(self) -> list[str]:
        """Return the ids of the engines, one for each failure since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                lines, _, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        if not lines:
            return []
        self._offset += len(lines) + 1
        return lines.decode(errors="replace").split("\n")


def _failures_file(run_dir: Path, name: str) -> Path:
    return run_dir / f"{name}.failures"
