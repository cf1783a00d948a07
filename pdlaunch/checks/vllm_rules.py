"""Rules PD121 and PD122 judge variables of vLLM, which pdlaunch does not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.settings import all_settings, variable_name

COUNTERPARTS: Mapping[str, str] = MappingProxyType(
    {
        "VLLM_API_KEY": "api_key",
        "VLLM_CACHE_ROOT": "PDLAUNCH_CACHE",
        "VLLM_CPU_KVCACHE_SPACE": "kv_cache_memory",
        "VLLM_CPU_OMP_THREADS_BIND": "num_threads",
        "VLLM_ENGINE_ITERATION_TIMEOUT_S": "hang_timeout_s",
        "VLLM_ENGINE_READY_TIMEOUT_S": "startup_timeout_s",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "hang_timeout_s",
        "VLLM_LOGGING_LEVEL": "log_level",
        "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": "kv_transfer.lease_s",
        "VLLM_NIXL_ABORT_REQUEST_TIMEOUT": "kv_transfer.lease_s",
        "VLLM_SERVER_DEV_MODE": "admin_api_key",
    }
)
"""Settings of pdlaunch, or variables of its own, that do what these variables do in vLLM."""
_PREFIX = "VLLM_"
_SHOWN = 4
_SOURCE = "vllm/envs.py."


@rule(
    "PD121",
    "warning",
    fix="Use pdlaunch's name: "
    + ", ".join(f"{ours} for {theirs}" for theirs, ours in COUNTERPARTS.items())
    + ".",
    source=_SOURCE,
)
def vllm_variable_with_counterpart(context: Context) -> Iterator[Found]:
    """A variable of vLLM is set that has another name here.

    pdlaunch does not read VLLM_* variables: whoever sets one of these and thinks that it works has
    an API without a key, or a KV cache of another size. It does no harm beside the setting of
    pdlaunch's own.
    """
    for where, name in _variables(context):
        ours = COUNTERPARTS.get(name)
        if ours is not None and not _is_given(context, ours):
            variable = variable_name(ours) if ours in all_settings() else ours
            names = ours if variable == ours else f"{ours}, or {variable}"
            message = f"{name} has no effect; it is {ours} here"
            yield Found(where, message, f"set {names}; unset {name}")


@rule(
    "PD122",
    "info",
    fix="Unset them.",
    source=_SOURCE,
)
def vllm_variable_ignored(context: Context) -> Iterator[Found]:
    """Variables of vLLM are set that mean nothing here.

    pdlaunch does not read VLLM_* variables, and these have no counterpart.
    """
    names = sorted({name for _, name in _variables(context)} - set(COUNTERPARTS))
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        yield Found(f"environment {_PREFIX}*", f"ignored: {', '.join(names[:_SHOWN])}{more}")


def _variables(context: Context) -> Iterator[tuple[str, str]]:
    """Return where each variable of vLLM is set, and its name."""
    for engines in context.engines.values():
        for name in sorted(engines.given_environ):
            if name.startswith(_PREFIX):
                yield context.where_variable(engines, name), name


def _is_given(context: Context, ours: str) -> bool:
    """Return whether a setting is given at the top level or by a role, or a variable is set."""
    paths = (ours, *(f"{role}.{ours}" for role in context.engines))
    return ours in context.launch.environ or any(context.given(path) for path in paths)
