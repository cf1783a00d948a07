"""Derives further values for engines of vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.machine.engine_commands import EngineCommand, find_engine_command
from pdlaunch.planning.hosts import ResolvedHost

GIBIBYTE = 1024**3


def whole_gibibytes(num_bytes: int) -> int:
    """Return the size of the KV cache that vLLM makes of ``num_bytes`` on a CPU."""
    return max(1, num_bytes // GIBIBYTE) * GIBIBYTE


OWN_VARIABLES = frozenset({"VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_SERVER_DEV_MODE"})
"""Variables of vLLM that are pdlaunch's alone: `env` cannot set them."""


def vllm_environment(
    kv_cache_bytes: int | None, settings: EngineSettings, side_channel_host: str
) -> dict[str, str]:
    """Return the variables for ``vllm serve``; those of the user go over them, but over
    ``OWN_VARIABLES``.

    ``kv_cache_bytes``: of one rank on a CPU; None on a GPU.
    """
    common = {
        # It would report model, hardware and settings to its makers.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # The address that its side channel binds, and tells decode engines.
        "VLLM_NIXL_SIDE_CHANNEL_HOST": side_channel_host,
        # Without it, loopback of its own groups is looked up by the host's name.
        "VLLM_HOST_IP": ENGINE_HOST,
        # The InfiniBand module crashes the process in a finaliser at exit (NIXL 1.5.1).
        "UCX_MODULES": "^ib",
        # Routes by which anybody who can connect runs methods in the engine; /sleep is among them.
        "VLLM_SERVER_DEV_MODE": "1" if settings.enable_sleep_mode else "0",
    }
    if kv_cache_bytes is None:
        return common
    return common | {
        # Else it pins its threads to cores by itself, all engines to the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_bytes // GIBIBYTE),
    }


def engine_command_on(
    host: ResolvedHost, here: ResolvedHost, command: str, environ: Mapping[str, str]
) -> EngineCommand | None:
    """Return what is known of an executable on the host of an engine; None: its agent has not told.

    ``here``: the supervisor's host, where ``environ`` says how to find it.
    """
    if host.name == here.name:
        return find_engine_command(command, environ)
    if host.executables is None:
        return None
    name = PurePath(command).name
    problem = f"its agent does not allow it: start that with --allow-executable {name}"
    return host.executables.get(name, EngineCommand(problem=problem))
