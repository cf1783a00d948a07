"""Makes the connector that the settings name; no other one is imported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from pdlaunch.config.connectors import connector_settings, load_named
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import ConfigError, TransferError
from pdlaunch.transfer.connectors.connector import Connection, Connector, LocalMemory, PeerAgent

T = TypeVar("T")


def rank_part(kind: type[T], settings: KVTransferSettings) -> Callable[..., T]:
    """Return ``kind``, or what the connector in use puts in its place; faults do, in tests."""
    path = connector_settings(settings.connector).stand_ins.get(kind.__name__)
    if path is None:
        return kind
    stand_in = load_named(path, f"connector {settings.connector}")
    assert issubclass(stand_in, kind)
    return partial(stand_in, settings.section(settings.connector))


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> Connector:
    """Make the connector of a rank (``prefill-0/rank-0``). Raises ConfigError."""
    what = f"connector {settings.connector}"
    factory = load_named(connector_settings(settings.connector).factory, what)
    connector = factory(settings, name, incarnation)
    if not isinstance(connector, Connector):
        raise ConfigError(f"{what}: {type(connector).__name__} is no Connector")
    return connector


class NoConnector(Connector):
    """Stands for the connector of ranks that neither lend KV blocks nor pull any; ``name`` is the
    rank's.
    """

    name = path = "none"

    def __init__(self, name: str) -> None:
        self.agent_name = name

    def open(self, memory: LocalMemory) -> None:
        """Do nothing: nobody reads this memory."""

    def agent_metadata(self) -> bytes:
        return b""

    def connect(self, peer: PeerAgent) -> Connection:
        raise TransferError(f"{self.agent_name} has no connector: it pulls no KV blocks")

    def close(self) -> None:
        """Do nothing: nothing was opened."""
