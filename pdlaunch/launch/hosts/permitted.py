"""Decides what an agent starts: rooms of pdlaunch with its own Python, and executables that whoever
started the agent has allowed.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

import msgspec

from pdlaunch.errors import ConfigError
from pdlaunch.planning.plan import ProcessSpec

ROOMS = frozenset(("pdlaunch.engine", "pdlaunch.engine.server", "pdlaunch.launch.sidecar"))
_KINDS = frozenset(("rank", "server"))
_HARMLESS = frozenset(("PYTHONUNBUFFERED", "PYTHONHASHSEED", "PYTHONFAULTHANDLER"))
_CHOOSE_CODE = (
    *("LD_", "PYTHON", "GCONV_PATH", "BASH_ENV", "ENV", "PATH", "NODE_OPTIONS"),
    # Libraries that CUDA, NIXL, UCX, NCCL, OpenMP and OpenSSL load by such a name.
    *("CUDA_INJECTION", "NIXL_PLUGIN_DIR", "UCX_MODULE_DIR", "OMP_TOOL_LIBRARIES", "OPENSSL_"),
    *("NCCL_NET_PLUGIN", "NCCL_TUNER_PLUGIN", "NCCL_PROFILER_PLUGIN"),
)
"""Variables by which other programs or libraries than the agent's own would run, and beginnings of
such names.
"""


class NotPermittedError(ConfigError):
    """Is raised for a process that the agent does not start."""


def allowed_executables(names: Sequence[str]) -> dict[str, str]:
    """Return the path of each executable by its name. Raises ConfigError."""
    found = {}
    for name in names:
        path = shutil.which(name)
        if path is None:
            raise ConfigError(
                f"there is no executable {name[:200]}",
                field="--allow-executable",
                value=name,
                fix="name one that is on PATH, or its whole path",
            )
        found[PurePath(name).name] = str(Path(path).absolute())
    return found


def permitted(spec: ProcessSpec, executables: Mapping[str, str]) -> ProcessSpec:
    """Return a process as this host starts it. Raises NotPermittedError.

    Python is the agent's own, and so are the paths of executables. ``executables``: by name.
    """
    for name in spec.environment:
        if name.startswith(_CHOOSE_CODE) and name not in _HARMLESS:
            raise NotPermittedError(
                f"the variable {name} decides which code runs, and an agent decides that for its "
                "host: set it where the agent is started, and leave it out of env"
            )
    command = list(spec.command)
    room = command[3] if command[1:3] == ["-P", "-m"] and len(command) > 3 else ""
    if spec.kind not in _KINDS or room not in ROOMS:
        raise NotPermittedError(f"an agent starts no {spec.kind} with {' '.join(command[:4])}")
    command[0] = sys.executable
    if room == "pdlaunch.launch.sidecar":
        place = command.index("--") + 1 if "--" in command else len(command)
        name = PurePath(command[place]).name if place < len(command) else ""
        if name not in executables:
            raise NotPermittedError(
                f"this host does not allow the executable {name or 'of an engine'}: start its "
                f"agent with --allow-executable {name}"
            )
        command[place] = executables[name]
    return msgspec.structs.replace(spec, command=tuple(command))
