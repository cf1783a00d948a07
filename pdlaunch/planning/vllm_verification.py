"""Decides whether engines of vLLM prove the blocks that they pull, with the connector of
``pdlaunch.vllm``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePath

from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.model_files.shape import HYBRID
from pdlaunch.config.vllm_arguments import long_name
from pdlaunch.machine.engine_commands import EngineCommand, find_engine_command
from pdlaunch.planning.hosts import ResolvedHost
from pdlaunch.planning.models import Model
from pdlaunch.vllm.support import SUPPORTED_VERSIONS, is_supported

AWAITS_AGENT = "its agent has not joined yet"
"""Ends a reason that the start of the launch may remove."""
_SPLITTING = (
    "decode-context-parallel-size",
    "speculative-config",
)
"""Arguments of vLLM with which an engine keeps KV in a way that the connector refuses."""


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
    for name in settings.engine_args:
        if long_name(name) in _SPLITTING:
            return f"engine_args has {name}"
    return unknown
