"""Environment variables that the connector's libraries read when they are first imported."""

from __future__ import annotations

from pdlaunch.config.engine_spec import EngineSpec


def connector_environment(spec: EngineSpec) -> dict[str, str]:
    """What must stand in ``os.environ`` before nixl is imported; what the user has set already takes precedence.

    A UCX worker listens on a TCP socket of every network device it may use. All engines of a launch are on one host, so loopback
    is enough, and nothing listens elsewhere. Shared memory, CMA and CUDA IPC are no network devices and stay in use.
    """
    assert spec.kv_transfer.connector == "nixl"
    return {"UCX_NET_DEVICES": "lo", "UCX_WARN_UNUSED_ENV_VARS": "n", "NIXL_LOG_LEVEL": "WARN"}
