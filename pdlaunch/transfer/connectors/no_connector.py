"""Stands for the connector of ranks that neither lend KV blocks nor pull any."""

from __future__ import annotations

from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import Connection, Connector, LocalMemory, PeerAgent


class NoConnector(Connector):
    """Opens no library and registers no memory; ``name`` is the rank's."""

    name = "none"
    path = "none"

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
