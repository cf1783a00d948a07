"""Shows the effective values of a launch to people and programs; secrets are masked."""

from __future__ import annotations

from pdlaunch.config.sources import shown_config
from pdlaunch.planning.plan import mask_environment
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import RoleEngines


def effective_values(launch: ResolvedLaunch) -> dict[str, object]:
    """Return the configuration, and what it comes to for each role; plain JSON."""
    return {
        "config": shown_config(launch.config),
        "engines": effective_engines(launch),
    }


def effective_engines(launch: ResolvedLaunch) -> dict[str, dict[str, object]]:
    """Return by role what its engines will use; null: not known before the start."""
    return {
        role: {
            "replicas": engines.replicas,
            "tensor_parallel_size": engines.tp_size,
            "host": engines.host,
            # Not known before the agents of other hosts have joined.
            "bind_address": engines.on.bind_address or None,
            "advertise_address": engines.on.advertise_address or None,
            "served_model_name": launch.served_model_name,
            "model_dir": engines.model.path,
            "block_size": engines.block_size,
            "enable_sleep_mode": engines.settings.enable_sleep_mode,
            "kv_cache_allocator": engines.allocator,
            **engines.derived(),
            "kv_blocks_verified": f"no: {engines.unverified}" if engines.unverified else "yes",
            "environment": mask_environment(engines.environment),
            "memory_of_a_rank": _memory(engines),
        }
        for role, engines in launch.roles.items()
    }


def _memory(engines: RoleEngines) -> dict[str, object] | None:
    """Return what is known of the memory of one rank; None while its model is not known."""
    needed = engines.footprint
    if needed is None:
        return None
    known: dict[str, object] = {
        "weight_bytes": needed.weight_bytes,
        "kv_cache_bytes": engines.kv_cache_bytes,
    }
    if needed.layout is None:
        # Blocks and activations are the engine's own affair.
        return known
    return known | {
        "activation_bytes": needed.activation_bytes,
        "num_blocks": engines.num_blocks,
        "host_tier_bytes": engines.host_tier_bytes,
        "block_bytes": needed.layout.block_bytes,
        "blocks_for_longest_request": needed.min_kv_bytes // needed.layout.block_bytes,
    }
