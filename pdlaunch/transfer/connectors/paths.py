"""Joins NIXL and P2P: each peer is read by whichever the handshake has found to be faster.

One of the connectors must open. What the others need may not be there, and a peer may not be in
their reach: the reason is an error of their paths, which comes out where paths are tried.
"""

from __future__ import annotations

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

# By name of each connector of a rank its metadata, and the reason why it did not open, if so.
Offers = dict[str, tuple[bytes, str]]


class PathsConnector(Connector):
    def __init__(self, connectors: Sequence[Connector]) -> None:
        """``connectors`` are those of one rank, the preferred one last. None of them pushes."""
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
        # Connectors begin with the one that has to open, paths with the one that is preferred.
        for connector in reversed(self._connectors):
            _, own_error = self._offers[connector.name]
            metadata, their_error = offers.get(connector.name, (b"", "the peer does not offer it"))
            try:
                if reason := own_error or their_error:
                    raise TransferError(reason)
                found |= connector.connect(msgspec.structs.replace(peer, agent_metadata=metadata))
            except TransferError as failure:
                # Without its traceback, whose frames would keep the connections alive.
                found[connector.path] = TransferError(str(failure))
        return found

    def close(self) -> None:
        for connector in self._connectors:
            if not self._offers[connector.name][1]:
                connector.close()

    def wait_unmapped(self, timeout_s: float) -> bool:
        return all(connector.wait_unmapped(timeout_s) for connector in self._connectors)


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> Connector:
    """Make the connector nixl of a rank, over the path or paths that its settings name."""
    match settings.nixl.path:
        case "nixl":
            return NixlConnector(name, incarnation)
        case "p2p":
            return P2PConnector(name, incarnation)
        case "auto":
            nixl, p2p = NixlConnector(name, incarnation), P2PConnector(name, incarnation)
            return PathsConnector([nixl, p2p])
