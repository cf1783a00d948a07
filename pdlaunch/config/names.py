"""Short names of settings: one table for the flags and for the ``PDLAUNCH_*`` variables."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pdlaunch.config.fields import all_fields

VARIABLE_PREFIX = "PDLAUNCH_"

FLAG_PATHS: Mapping[str, str] = MappingProxyType(
    {
        "model": "model",
        "prefill": "prefill.replicas",
        "decode": "decode.replicas",
        "prefill-tp": "prefill.tensor_parallel_size",
        "decode-tp": "decode.tensor_parallel_size",
        "device": "device",
        "dtype": "dtype",
        "max-model-len": "max_model_len",
        "block-size": "block_size",
        "kv-cache-memory": "kv_cache_memory",
        "kv-offload-memory": "kv_offload.host_memory",
        "kv-connector": "kv_transfer.connector",
        "kv-file-directory": "kv_transfer.file_directory",
        "enable-cumem-allocator": "enable_cumem_allocator",
        "enable-sleep-mode": "enable_sleep_mode",
        "enforce-eager": "enforce_eager",
        "async-scheduling": "async_scheduling",
        "host": "host",
        "port": "port",
        "api-key": "api_key",
        "admin-api-key": "admin_api_key",
        "engine-api-key": "engine_api_key",
        "allowed-hosts": "allowed_hosts",
        "cors-origins": "cors_origins",
        "log-dir": "log_dir",
        "startup-timeout": "startup_timeout_s",
        "drain-timeout": "drain_timeout_s",
        "log-level": "log_level",
    }
)
"""Name of the flag without dashes in front, and the setting it gives."""


def flag_name(path: str) -> str:
    """How the command line names a setting; the dotted path where there is no flag."""
    return next((f"--{flag}" for flag, target in FLAG_PATHS.items() if target == path), path)


def variable_paths() -> dict[str, str]:
    """``PDLAUNCH_*`` variables by name: each path with ``__`` between its parts, and each flag's
    name.
    """
    names = {_variable(path.replace(".", "__")): path for path in all_fields()}
    return names | {_variable(flag.replace("-", "_")): path for flag, path in FLAG_PATHS.items()}


def _variable(name: str) -> str:
    return f"{VARIABLE_PREFIX}{name.upper()}"
