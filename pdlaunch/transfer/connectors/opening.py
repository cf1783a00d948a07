"""The connector that the configuration names. Libraries are imported when it is opened, not
here.
"""

from __future__ import annotations

from pdlaunch.config.models import KVPath, KVTransferSettings
from pdlaunch.transfer.connectors.connector import Connector
from pdlaunch.transfer.connectors.device_binding import new_device_binding
from pdlaunch.transfer.connectors.file import FileConnector
from pdlaunch.transfer.connectors.mooncake import MooncakeConnector
from pdlaunch.transfer.connectors.nixl import NixlConnector
from pdlaunch.transfer.connectors.p2p import P2PConnector
from pdlaunch.transfer.connectors.paths import PathsConnector


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> Connector:
    """``name``: of the rank, ``prefill-0/rank-0``."""
    match settings.connector:
        case "nixl":
            return _new_paths(settings.path, name, incarnation)
        case "mooncake":
            return MooncakeConnector(
                name,
                incarnation,
                protocol=settings.mooncake_protocol,
                devices=settings.mooncake_devices,
                num_sender_threads=settings.num_sender_threads,
                binding=new_device_binding(),
            )
        case "file":
            assert settings.file_directory is not None, "checked by KVTransferSettings"
            return FileConnector(
                name,
                incarnation,
                directory=settings.file_directory,
                size_limit_bytes=settings.file_size_limit,
                num_sender_threads=settings.num_sender_threads,
                binding=new_device_binding(),
            )


def _new_paths(path: KVPath, name: str, incarnation: int) -> Connector:
    match path:
        case "nixl":
            return NixlConnector(name, incarnation)
        case "p2p":
            return P2PConnector(name, incarnation, binding=new_device_binding())
        case "auto":
            nixl = NixlConnector(name, incarnation)
            return PathsConnector(
                [nixl, P2PConnector(name, incarnation, binding=new_device_binding())]
            )
