"""Replaces ``engine: auto``: vLLM if it is installed, else native engines."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pdlaunch.config.model_files.find import ALIASES
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import HOW_TO_GET_VLLM, ROLES, EngineName


class EngineChoice(NamedTuple):
    """Holds the settings with ``auto`` replaced, and the reason (empty if nothing was ``auto``)."""

    config: LaunchConfig
    reason: str


def choose_engine(config: LaunchConfig, environ: Mapping[str, str]) -> EngineChoice:
    """Replace ``auto`` by a kind of engine, depending on the executables of this host.

    Replace ``engine_command`` by its path if it is in the active environment but not on PATH.
    """
    auto = [role for role in ROLES if getattr(config.role(role), "engine", None) == "auto"]
    path = find_beside_python(config.engine_command, environ)
    command = {} if path is None else {"engine_command": path}
    if config.engine != "auto" and not auto:
        uses_command = config.engine == "vllm" and command
        return EngineChoice(config.model_copy(update=command) if uses_command else config, "")
    name, reason = _choose(config, path or shutil.which(config.engine_command, path=_path(environ)))
    changed: dict[str, object] = {
        role: config.role(role).model_copy(update={"engine": name}) for role in auto
    }
    if config.engine == "auto":
        changed["engine"] = name
    if name == "vllm":
        changed |= command
    return EngineChoice(config.model_copy(update=changed), f"{name}, because {reason}")


def _choose(config: LaunchConfig, path: str | None) -> tuple[EngineName, str]:
    others = "native engines: --engine native"
    for_vllm = [
        name for name in ("engine_command", "engine_args") if name in config.model_fields_set
    ]
    if for_vllm:
        return "vllm", f"{for_vllm[0]} is set; {others}"
    if config.model in ALIASES:
        found = "--engine vllm" if path else HOW_TO_GET_VLLM
        return "native", f"{config.model} is the demo model; vLLM: {found}"
    if path is None:
        return "native", f"no {config.engine_command} was found; vLLM: {HOW_TO_GET_VLLM}"
    return "vllm", f"{path} is installed; {others}"


def find_beside_python(command: str, environ: Mapping[str, str]) -> str | None:
    """Return the path of a command in the active environment; None if on PATH, or not found."""
    if os.sep in command or shutil.which(command, path=_path(environ)):
        return None
    # Do not resolve links: the python of a virtual environment links to a folder outside of it.
    folders = [Path(sys.executable).parent]
    folders += [Path(environ[name], "bin") for name in _ENVIRONMENTS if environ.get(name)]
    return shutil.which(command, path=os.pathsep.join(map(str, folders)))


_ENVIRONMENTS = ("VIRTUAL_ENV", "CONDA_PREFIX")


def _path(environ: Mapping[str, str]) -> str:
    return environ.get("PATH", os.defpath)
