"""Looks at the executables of engines that are not pdlaunch's own; never raises."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """Says what can be known of an executable without running it."""

    problem: str = ""  # the reason why it cannot be run; empty: it can
    # Version of the vLLM that is installed where its interpreter is; None: not known
    version: str | None = None


def find_engine_command(command: str, environ: Mapping[str, str]) -> EngineCommand:
    """Look for an executable as a shell does, and for the vLLM behind it."""
    path = shutil.which(command, path=environ.get("PATH", os.defpath))
    if path is None:
        return EngineCommand(problem=_why_not(command))
    site = _site_packages(Path(path))
    if site is None:
        return EngineCommand()
    # Read from metadata: importing vLLM takes seconds, and needs its GPU libraries.
    version = next((each.version for each in distributions(name="vllm", path=[str(site)])), None)
    return EngineCommand(version=version)


def _why_not(command: str) -> str:
    if os.sep not in command:
        return "it is not on PATH"
    path = Path(command)
    if path.is_dir():
        return "it is a folder"
    return "this user may not execute it" if path.exists() else "there is no such file"


def _site_packages(script: Path) -> Path | None:
    """Return the packages' folder of a console script, whose first line names its Python."""
    try:
        with script.open("rb") as file:
            first = file.readline(4096).decode(errors="replace")
    except OSError:
        return None
    interpreter = first.removeprefix("#!").strip()
    if not first.startswith("#!/") or " " in interpreter:
        return None
    # Not resolved: the python of a virtual environment is a link out of it.
    root = Path(interpreter).parent.parent
    return next((path for path in sorted(root.glob("lib/python3*/site-packages"))), None)
