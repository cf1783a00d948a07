"""Inspects executables of vLLM without running them; never raises."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """Describes an engine's executable, as far as that is possible without running it."""

    problem: str = ""  # the reason why the executable cannot be run; empty if it can
    # Version of vLLM in the environment of the script's Python; None: not known
    version: str | None = None


def find_engine_command(command: str, environ: Mapping[str, str]) -> EngineCommand:
    """Find an executable on PATH or by its path, and the version of vLLM that it belongs to."""
    path = shutil.which(command, path=environ.get("PATH", os.defpath))
    if path is None:
        return EngineCommand(problem=_why_not(command))
    site = _site_packages(Path(path))
    if site is None:
        return EngineCommand()
    # Read the version from metadata: importing vLLM takes seconds and needs its GPU libraries.
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
    """Return site-packages of the Python in a console script's first line; None if not found."""
    try:
        with script.open("rb") as file:
            first = file.readline(4096).decode(errors="replace")
    except OSError:
        return None
    interpreter = first.removeprefix("#!").strip()
    if not first.startswith("#!/") or " " in interpreter:
        return None
    # Do not resolve links: the python of a virtual environment links to a folder outside of it.
    root = Path(interpreter).parent.parent
    return next((path for path in sorted(root.glob("lib/python3*/site-packages"))), None)
