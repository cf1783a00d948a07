"""Environment variables that the connectors' libraries read when they are first imported."""

from __future__ import annotations

from pdlaunch.config.models import KVTransferSettings, MooncakeProtocol

_MOONCAKE_TRANSPORT: dict[MooncakeProtocol, dict[str, str]] = {
    "tcp": {"MC_FORCE_TCP": "1"},
    "rdma": {},
    "nvlink": {"MC_INTRA_NVLINK": "1"},
}
"""Mooncake picks a transport by what it finds, whatever it was told."""


def connector_environment(settings: KVTransferSettings) -> dict[str, str]:
    """What a rank's environment must hold before the connector is opened; what the user has set takes precedence."""
    match settings.connector:
        case "nixl":
            # A UCX worker listens on a TCP socket of every network device it may use. All engines of a launch are on one host, so
            # loopback is enough, and nothing listens elsewhere. Shared memory, CMA and CUDA IPC are no network devices.
            return {
                "UCX_NET_DEVICES": "lo",
                # The InfiniBand module crashes the process in a finaliser at exit (NIXL 1.5.1).
                "UCX_MODULES": "^ib",
                "UCX_WARN_UNUSED_ENV_VARS": "n",
                "NIXL_LOG_LEVEL": "WARN",
            }
        case "mooncake":
            # A call that gives up by its own time-out leaves its write under way: only the transport's time-outs end one.
            return {
                "MC_TCP_BIND_ADDRESS": "127.0.0.1",
                "MC_TRANSFER_TIMEOUT": "3600",
                "MC_LOG_LEVEL": "WARNING",
                **_MOONCAKE_TRANSPORT[settings.mooncake_protocol],
            }
        case "file":
            return {}
