"""Derives the environment of a vLLM engine, as far as it is known before the engine is started."""

from __future__ import annotations

from typing import Literal

from pdlaunch.config.engine_spec import ENGINE_HOST

GIBIBYTE = 1024**3


def vllm_environment(device: Literal["cpu", "cuda"], kv_cache_bytes: int) -> dict[str, str]:
    """Return the variables for ``vllm serve``; those of the user go over them.

    ``kv_cache_bytes``: of one rank; vLLM takes whole GiB on a CPU.
    """
    common = {
        # It would report model, hardware and settings to its makers.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # The address that its side channel binds, and tells decode engines.
        "VLLM_NIXL_SIDE_CHANNEL_HOST": ENGINE_HOST,
        # Without it, loopback of its own groups is looked up by the host's name.
        "VLLM_HOST_IP": ENGINE_HOST,
        # The InfiniBand module crashes the process in a finaliser at exit (NIXL 1.5.1).
        "UCX_MODULES": "^ib",
    }
    if device == "cuda":
        return common
    return common | {
        # Else it pins its threads to cores by itself, all engines to the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, kv_cache_bytes // GIBIBYTE)),
    }
