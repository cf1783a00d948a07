"""Joins NIXL and P2P. The handshake measures both paths to a peer and uses the faster path.

At least one of the connectors must open. If a connector cannot open, or cannot reach a peer, its
path has an error in place of a connection.
"""

import logging
from collections.abc import Mapping, Sequence

import msgspec

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import HandshakeReply
from pdlaunch.transfer.connectors.connector import (
    Connection,
    Connector,
    LocalMemory,
    decode_metadata,
)
from pdlaunch.transfer.connectors.nixl import NixlConnector
from pdlaunch.transfer.connectors.p2p import P2PConnector

logger = logging.getLogger(__name__)

# Connector name -> its metadata, and the error if it did not open.
Offers = dict[str, tuple[bytes, str]]


class PathsConnector(Connector):
    def __init__(self, connectors: Sequence[Connector]) -> None:
        """``connectors``: of one rank, the preferred connector last. None of them pushes."""
        self._connectors = connectors
        self.name = "+".join(connector.name for connector in connectors)
        self.path = " or ".join(connector.path for connector in connectors)
        self.agent_name = connectors[0].agent_name
        self._offers: Offers = {}

    def open(self, memory: LocalMemory) -> None:
        self._offers = {}
        for connector in self._connectors:
            try:
                connector.open(memory)
                self._offers[connector.name] = connector.agent_metadata(), ""
            except TransferError as error:
                logger.info("no path %s: %s", connector.path, error)
                self._offers[connector.name] = b"", str(error)
        errors = [error for _, error in self._offers.values()]
        if all(errors):
            raise TransferError("; ".join(errors))

    def agent_metadata(self) -> bytes:
        return msgspec.msgpack.encode(self._offers)

    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection | TransferError]:
        offers = decode_metadata(peer, Offers)
        found: dict[str, Connection | TransferError] = {}
        # Connectors have the preferred one last, paths have it first.
        for connector in reversed(self._connectors):
            _, own_error = self._offers[connector.name]
            metadata, their_error = offers.get(connector.name, (b"", "the peer does not offer it"))
            try:
                if reason := own_error or their_error:
                    raise TransferError(reason)
                found |= connector.connect(msgspec.structs.replace(peer, agent_metadata=metadata))
            except TransferError as failure:
                # A new exception: the frames in its traceback would keep the connections alive.
                found[connector.path] = TransferError(str(failure))
        return found

    def close(self) -> None:
        for connector in self._connectors:
            if not self._offers[connector.name][1]:
                connector.close()

    def wait_unmapped(self, timeout_s: float) -> bool:
        return all(connector.wait_unmapped(timeout_s) for connector in self._connectors)


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> Connector:
    """Make a rank's connector for ``connector: nixl``, with the paths in ``nixl.path``."""
    match settings.nixl.path:
        case "nixl":
            return NixlConnector(name, incarnation)
        case "p2p":
            return P2PConnector(name, incarnation)
        case "auto":
            nixl, p2p = NixlConnector(name, incarnation), P2PConnector(name, incarnation)
            return PathsConnector([nixl, p2p])
