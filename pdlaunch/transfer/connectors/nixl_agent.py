"""Makes NIXL agents that no other user can reach, for vLLM and for the ranks of native engines."""

from __future__ import annotations

import os
from typing import Any

BACKEND = "UCX"
# Transports to other hosts, as pdlaunch names them in UCX_TLS.
_TO_HOSTS = frozenset(("tcp", "rc_verbs", "rc_mlx5"))
# Sleep of UCX's progress thread when no event wakes it; NIXL's Python API spins on a core.
PROGRESS_INTERVAL_US = 1_000


def new_agent(
    api: Any,
    bindings: Any,
    name: str,
    *,
    interval_us: int = PROGRESS_INTERVAL_US,
    num_threads: int = 0,
    captures_telemetry: bool = False,
) -> Any:
    """Make an agent like ``nixl_agent``; it listens only if UCX_TLS names the network.

    With error handling, UCX needs a transport that listens on TCP, where it takes writes to any
    address from anybody. If UCX_TLS names local transports alone, error handling is off: nobody
    listens, and nobody learns of a peer's death. If UCX_TLS names a network, the user trusts that
    network, and error handling is on.
    """
    # The wrapper is made without a backend and given an agent of its own below: the one that it
    # makes has a progress thread that never sleeps.
    agent = api.nixl_agent(name, api.nixl_agent_config(backends=[]))
    config = bindings.nixlAgentConfig()
    config.useProgThread = True
    config.useListenThread = False
    config.syncMode = bindings.NIXL_THREAD_SYNC_NONE
    config.pthrDelay = interval_us
    config.captureTelemetry = captures_telemetry
    agent.agent = bindings.nixlAgent(name, config)
    is_open = not _TO_HOSTS.isdisjoint(os.environ.get("UCX_TLS", "").split(","))
    options = {"ucx_error_handling_mode": "peer" if is_open else "none"}
    if num_threads:
        options["num_threads"] = str(num_threads)
    agent.create_backend(BACKEND, options)
    return agent
