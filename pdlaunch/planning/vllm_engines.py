"""Derives further values for vLLM engines, and whether their KV blocks are proven."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePath

from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.config.model_files.shape import HYBRID
from pdlaunch.config.vllm_arguments import long_name
from pdlaunch.machine.engine_commands import EngineCommand, find_engine_command
from pdlaunch.planning.hosts import ResolvedHost
from pdlaunch.planning.models import Model
from pdlaunch.vllm.support import SUPPORTED_VERSIONS, is_supported

GIBIBYTE = 1024**3
AWAITS_AGENT = "its agent has not joined yet"
"""Ends a reason that the start of the launch may remove."""
_SPLITTING = frozenset({"decode-context-parallel-size", "speculative-config"})
"""Arguments of vLLM with which an engine keeps KV in a way that the connector refuses."""


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


def unverified_because(
    settings: EngineSettings,
    environ: Mapping[str, str],
    model: Model,
    hosts: Collection[ResolvedHost],
    here: ResolvedHost,
) -> str:
    """Return why an engine of vLLM uses pulled blocks unproven; empty: it proves them.

    ``hosts``: those of the engines.
    """
    command, unknown = settings.engine_command, ""
    # A reason from an agent goes before hosts whose version is not known yet.
    for host in hosts:
        found = engine_command_on(host, here, command, environ)
        # Of a host whose agent has not joined nothing is known but what is installed here.
        version = (found or find_engine_command(command, environ)).version
        if version is None and found is not None:
            return f"the version of {command} is not known"
        if version is None:
            unknown = f"the version of {command} on {host.name} is not known: {AWAITS_AGENT}"
        elif not is_supported(version):
            return f"it is vLLM {version}, and {', '.join(SUPPORTED_VERSIONS)} can be verified"
    if model.error is not None:
        return "the layers of the model are not known"
    if model.unproven:
        return model.unproven
    if model.shape is not None and any(window is not None for window in model.shape.layer_windows):
        return HYBRID
    splitting = [name for name in settings.engine_args if long_name(name) in _SPLITTING]
    return f"engine_args has {splitting[0]}" if splitting else unknown
