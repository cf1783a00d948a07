"""Whether a library can really be imported: tried in a process of its own, with a deadline."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

IMPORT_TIMEOUT_S = 60.0

_NIXL = """
import os
from nixl._api import nixl_agent, nixl_agent_config
nixl_agent("pdlaunch-probe", nixl_agent_config(backends=["UCX"]))
os._exit(0)
"""
_PROGRAMS: Mapping[str, str] = {"nixl": _NIXL}


def probe_imports(
    environ: Mapping[str, str], timeout_s: float = IMPORT_TIMEOUT_S
) -> dict[str, str]:
    """Modules that cannot be imported and used, and why; never raises."""
    errors = {name: _try(program, environ, timeout_s) for name, program in _PROGRAMS.items()}
    return {name: error for name, error in errors.items() if error is not None}


def _try(program: str, environ: Mapping[str, str], timeout_s: float) -> str | None:
    # UCX listens on every network device that it may use; loopback is enough for a probe.
    quiet = {"UCX_NET_DEVICES": "lo", "UCX_WARN_UNUSED_ENV_VARS": "n", **environ}
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=quiet,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {timeout_s:g} s"
    except (OSError, ValueError) as error:
        return f"cannot be tried: {error}"
    if result.returncode == 0:
        return None
    lines = result.stderr.decode(errors="backslashreplace").strip().splitlines()
    return lines[-1][:200] if lines else f"exit code {result.returncode}"
