"""What a configuration comes to on a machine, as plain JSON values."""

from __future__ import annotations

from typing import Any

from pdlaunch.checks.context import Context, Engine
from pdlaunch.checks.footprint import footprint
from pdlaunch.config.memory_options import contradicts, memory_options
from pdlaunch.config.shown import shown_config
from pdlaunch.config.sources import LoadedConfig


def resolved_values(context: Context) -> dict[str, Any]:
    """The configuration, what is derived for each role, and the machine it was judged for; no
    secrets.
    """
    machine = context.machine
    return {
        "config": shown_config(LoadedConfig(context.config, context.origins)),
        "engines": {role: _engine(engine) for role, engine in context.engines.items()},
        "host_tier_bytes": sum(
            engine.num_ranks * engine.host_tier_bytes for engine in context.engines.values()
        ),
        "machine": {
            "system": machine.system,
            "cpus": len(machine.cpus),
            "memory_bytes": machine.memory_bytes,
            "native_bf16": machine.has_native_bf16,
            "gpus": [{"name": gpu.name, "memory_bytes": gpu.memory_bytes} for gpu in machine.gpus],
            "cumem_allocator": {
                "available": machine.cumem.available,
                "reason": machine.cumem.reason,
            },
        },
    }


def _engine(engine: Engine) -> dict[str, Any]:
    needed = footprint(engine)
    options = None if contradicts(engine.settings) else memory_options(engine.settings)
    return {
        "replicas": engine.replicas,
        "tensor_parallel_size": engine.tp_size,
        "model_dir": engine.model.path,
        "device": engine.device,
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "block_size": engine.settings.block_size,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "enable_cumem_allocator": options and options.cumem_allocator,
        "enable_sleep_mode": engine.settings.enable_sleep_mode,
        "memory_of_a_rank": needed
        and {
            "weight_bytes": needed.weight_bytes,
            "activation_bytes": needed.activation_bytes,
            "kv_cache_bytes": engine.kv_cache_bytes,
            "host_tier_bytes": engine.host_tier_bytes,
            "block_bytes": needed.block_bytes,
            "blocks_for_longest_request": needed.num_blocks_for_longest,
        },
    }
