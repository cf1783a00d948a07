"""Joins NIXL and P2P: each peer is read by whichever the handshake has found to be faster.

The first connector must open. What the others need may not be there, and a peer may not be in their
reach: the reason is an error of their paths, which comes out where paths are tried.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    MemoryMapper,
    PeerAgent,
    Read,
    ReadPart,
    ReadState,
)
from pdlaunch.transfer.connectors.device_binding import new_device_binding
from pdlaunch.transfer.connectors.nixl import NixlConnector
from pdlaunch.transfer.connectors.p2p import P2PConnector

logger = logging.getLogger(__name__)


class _Offer(msgspec.Struct, frozen=True):
    """Describes one connector of a rank to its peers."""

    metadata: bytes = b""
    error: str = ""
    """The reason why it did not open; empty when it did."""


_decoder = msgspec.msgpack.Decoder(dict[str, _Offer])


class PathsConnector(Connector):
    """Passes every READ on to the connector whose path is used."""

    def __init__(self, connectors: Sequence[Connector]) -> None:
        """``connectors`` are those of one rank, the preferred one last. None has a pusher, and at
        most one has a mapper.
        """
        self._connectors = connectors
        self.name = "+".join(connector.name for connector in connectors)
        self.path = " or ".join(connector.path for connector in connectors)
        self.agent_name = connectors[0].agent_name
        self._offers: dict[str, _Offer] = {}

    def open(self, memory: LocalMemory) -> None:
        first, *others = self._connectors
        first.open(memory)
        self._offers = {first.name: _Offer(first.agent_metadata())}
        for connector in others:
            try:
                connector.open(memory)
                self._offers[connector.name] = _Offer(connector.agent_metadata())
            except TransferError as error:
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
        ways = [
            _connect(connector, peer, self._offer(connector, offers))
            for connector in self._connectors
        ]
        if all(way.connection is None for way in ways):
            raise TransferError("; ".join(f"{way.path}: {way.error}" for way in ways))
        return _PathsConnection(ways)

    def close(self) -> None:
        for connector in self._connectors:
            if not self._offers[connector.name].error:
                connector.close()

    @property
    def mapper(self) -> MemoryMapper | None:
        mappers = [connector.mapper for connector in self._connectors]
        return next((mapper for mapper in mappers if mapper is not None), None)

    def _offer(self, connector: Connector, offers: dict[str, _Offer]) -> _Offer:
        """Return the peer's offer, or the reason why one of the two sides has none."""
        own = self._offers[connector.name]
        return (
            own
            if own.error
            else offers.get(connector.name, _Offer(error="the peer does not offer it"))
        )


@dataclass(slots=True, eq=False)
class _Way:
    """Reaches a peer by one of the connectors."""

    path: str
    """Path of the connector, for the case that there is no connection."""
    connection: Connection | None
    error: str = ""
    """The reason why there is no connection."""
    num_reads: int = 0
    """READs that are not released."""

    def paths(self) -> Sequence[str]:
        return [self.path] if self.connection is None else self.connection.paths()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


class _PathsConnection(Connection):
    """Reads from a peer in several ways until one is chosen."""

    def __init__(self, ways: Sequence[_Way]) -> None:
        """``ways`` are in the order of the connectors: the preferred one is last."""
        self._ways = ways
        self._chosen: Connection | None = None

    def paths(self) -> Sequence[str]:
        # Connectors begin with the one that has to open, paths with the one that is preferred.
        return [path for way in reversed(self._ways) for path in way.paths()]

    def use_path(self, path: str) -> None:
        chosen = self._way_of(path)
        assert chosen.connection is not None
        chosen.connection.use_path(path)
        self._chosen = chosen.connection
        for way in self._ways:
            # A READ that took too long may still write: its way is closed with the connection.
            if way is not chosen and not way.num_reads:
                way.close()

    def read(self, blocks: BlockRead) -> Read:
        assert self._chosen is not None
        return self._chosen.read(blocks)

    def read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        way = self._way_of(path)
        if way.connection is None:
            raise TransferError(way.error)
        read, landing = way.connection.read_scratch(path)
        way.num_reads += 1
        return _CountedRead(way, read), landing

    def close(self) -> None:
        for way in self._ways:
            way.close()

    def _way_of(self, path: str) -> _Way:
        return next(way for way in self._ways if path in way.paths())


@dataclass(frozen=True, slots=True, eq=False)
class _CountedRead(Read):
    """Counts a READ of a scratch; the connection that it uses stays open until it is released."""

    way: _Way
    read: Read

    def poll(self) -> ReadState:
        return self.read.poll()

    def parts(self) -> Sequence[ReadPart]:
        return self.read.parts()

    def seconds(self) -> float:
        return self.read.seconds()

    def release(self) -> None:
        self.read.release()
        self.way.num_reads -= 1


def _connect(connector: Connector, peer: PeerAgent, offer: _Offer) -> _Way:
    if offer.error:
        return _Way(connector.path, None, offer.error)
    try:
        connection = connector.connect(PeerAgent(peer.name, offer.metadata, peer.geometry))
    except TransferError as error:
        return _Way(connector.path, None, str(error))
    return _Way(connector.path, connection)


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> Connector:
    """Make the connector nixl of a rank, over the path or paths that its settings name."""
    match settings.nixl.path:
        case "nixl":
            return NixlConnector(name, incarnation)
        case "p2p":
            return P2PConnector(name, incarnation, binding=new_device_binding())
        case "auto":
            nixl = NixlConnector(name, incarnation)
            p2p = P2PConnector(name, incarnation, binding=new_device_binding())
            return PathsConnector([nixl, p2p])
