"""Makes NIXL agents for vLLM that no other user can reach."""

from __future__ import annotations

import os
from typing import Any

BACKEND = "UCX"
_TO_HOSTS = frozenset(("tcp", "rc_verbs", "rc_mlx5"))
"""Transports to other hosts, as pdlaunch names them in UCX_TLS."""
PROGRESS_INTERVAL_US = 1_000
"""Sleep of UCX's progress thread when no event wakes it; NIXL's Python API spins on a core."""


def new_agent(api: Any, bindings: Any, name: str, config: Any) -> Any:
    """Make an agent as ``nixl_agent(name, config)`` does, but for what it opens.

    With error handling UCX insists on a transport that listens on TCP, where it takes writes to
    any address from anybody. Without it, and with ``UCX_TLS`` naming local transports alone, there
    is no listener; nobody is told of a peer's death. Where UCX_TLS names one to other hosts, the
    network is said to be trusted, and deaths are told.
    """
    num_threads = config.num_threads
    agent = api.nixl_agent(name, api.nixl_agent_config(backends=[]))
    low = bindings.nixlAgentConfig()
    low.useProgThread = True
    low.useListenThread = False
    low.syncMode = bindings.NIXL_THREAD_SYNC_NONE
    low.pthrDelay = PROGRESS_INTERVAL_US
    # vLLM takes bytes and seconds of its metrics from there.
    low.captureTelemetry = config.capture_telemetry
    agent.agent = bindings.nixlAgent(name, low)
    is_open = not _TO_HOSTS.isdisjoint(os.environ.get("UCX_TLS", "").split(","))
    options = {"ucx_error_handling_mode": "peer" if is_open else "none"}
    if num_threads:
        options["num_threads"] = str(num_threads)
    agent.create_backend(BACKEND, options)
    return agent
