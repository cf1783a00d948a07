"""Joins NIXL and P2P: each peer is read by whichever the handshake has found to be faster.

The first connector must open. What the others need may not be there, and a peer may not be in their
reach: the reason is an error of their paths, which comes out where paths are tried.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import msgspec
import torch

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    PeerAgent,
    Read,
)
from pdlaunch.transfer.connectors.nixl import NixlConnector
from pdlaunch.transfer.connectors.p2p import P2PConnector

logger = logging.getLogger(__name__)


class _Offer(msgspec.Struct, frozen=True):
    """Describes one connector of a rank to its peers."""

    metadata: bytes = b""
    error: str = ""  # the reason why it did not open; empty when it did


_decoder = msgspec.msgpack.Decoder(dict[str, _Offer])


class PathsConnector(Connector):
    """Passes every READ on to the connector whose path is used."""

    def __init__(self, connectors: Sequence[Connector]) -> None:
        """``connectors`` are those of one rank, the preferred one last. None of them pushes."""
        self._connectors = connectors
        self.name = "+".join(connector.name for connector in connectors)
        self.path = " or ".join(connector.path for connector in connectors)
        self.agent_name = connectors[0].agent_name
        self._offers: dict[str, _Offer] = {}

    def open(self, memory: LocalMemory) -> None:
        self._offers = {}
        for connector in self._connectors:
            try:
                connector.open(memory)
                self._offers[connector.name] = _Offer(connector.agent_metadata())
            except TransferError as error:
                if not self._offers:
                    raise
                logger.info("no path %s: %s", connector.path, error)
                self._offers[connector.name] = _Offer(error=str(error))

    def agent_metadata(self) -> bytes:
        return msgspec.msgpack.encode(self._offers)

    def connect(self, peer: PeerAgent) -> Connection:
        try:
            offers = _decoder.decode(peer.metadata)
        except msgspec.MsgspecError as error:
            raise TransferError(
                f"the metadata of agent {peer.name} cannot be read: {error}"
            ) from None
        found: dict[str, Connection] = {}
        errors: dict[str, str] = {}
        # Connectors begin with the one that has to open, paths with the one that is preferred.
        for connector in reversed(self._connectors):
            missing = _Offer(error="the peer does not offer it")
            own, offer = self._offers[connector.name], offers.get(connector.name, missing)
            try:
                if reason := own.error or offer.error:
                    raise TransferError(reason)
                agent = PeerAgent(peer.name, offer.metadata, peer.geometry)
                connection = connector.connect(agent)
                found |= dict.fromkeys(connection.paths(), connection)
            except TransferError as failure:
                errors[connector.path] = str(failure)
        if not found:
            raise TransferError("; ".join(f"{path}: {error}" for path, error in errors.items()))
        return _PathsConnection(found, errors)

    def close(self) -> None:
        for connector in self._connectors:
            if not self._offers[connector.name].error:
                connector.close()

    def wait_unmapped(self, timeout_s: float) -> bool:
        return all(connector.wait_unmapped(timeout_s) for connector in self._connectors)


class _PathsConnection(Connection):
    """Reads from a peer in several ways until one is chosen."""

    def __init__(self, found: Mapping[str, Connection], errors: Mapping[str, str]) -> None:
        """``found`` by path, the preferred one first; ``errors`` say why others are none."""
        self._found = found
        self._errors = errors
        self._chosen = next(iter(found.values()))

    def paths(self) -> Sequence[str]:
        return [*self._found, *self._errors]

    def use_path(self, path: str) -> None:
        # The other connections stay: a READ that took too long may still write over them.
        self._chosen = self._found[path]
        self._chosen.use_path(path)

    def read(self, blocks: BlockRead) -> Read:
        return self._chosen.read(blocks)

    def read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        if path in self._errors:
            raise TransferError(self._errors[path])
        return self._found[path].read_scratch(path)

    def close(self) -> None:
        for connection in set(self._found.values()):
            connection.close()


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
