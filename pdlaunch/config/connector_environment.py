"""Environment variables that the connectors' libraries read when they are first imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pdlaunch.config.models import KVTransferSettings, MooncakeProtocol
from pdlaunch.config.ucx import local_transports

_MOONCAKE_TRANSPORT: dict[MooncakeProtocol, dict[str, str]] = {
    "tcp": {"MC_FORCE_TCP": "1"},
    "rdma": {},
    "nvlink": {"MC_INTRA_NVLINK": "1"},
}
"""Mooncake picks a transport by what it finds, whatever it was told."""


def connector_environment(
    settings: KVTransferSettings, environ: Mapping[str, str], device: Literal["cpu", "cuda"]
) -> dict[str, str]:
    """Return what a rank's environment must hold before the connector is opened.

    Args: environ: the user's, whose values take precedence; its UCX_TLS is narrowed to transports
        without a listener. device: of the rank.
    """
    defaults = _defaults(settings)
    variables = {name: environ.get(name, value) for name, value in defaults.items()}
    if settings.connector == "nixl":
        # A name that UCX does not know stands for none: UCX takes an empty UCX_TLS for all.
        variables["UCX_TLS"] = ",".join(local_transports(environ, device)) or "none"
    return variables


def _defaults(settings: KVTransferSettings) -> dict[str, str]:
    match settings.connector:
        case "nixl":
            return {
                # The InfiniBand module crashes the process in a finaliser at exit (NIXL 1.5.1).
                "UCX_MODULES": "^ib",
                "UCX_WARN_UNUSED_ENV_VARS": "n",
                "NIXL_LOG_LEVEL": "WARN",
            }
        case "mooncake":
            # A call that gives up by its own time-out leaves its write under way: only the
            # transport's time-outs end one.
            return {
                "MC_TCP_BIND_ADDRESS": "127.0.0.1",
                "MC_TRANSFER_TIMEOUT": "3600",
                "MC_LOG_LEVEL": "WARNING",
                **_MOONCAKE_TRANSPORT[settings.mooncake_protocol],
            }
        case "file":
            return {}
