"""NIXL and P2P together: each peer is read by whichever the handshake has found to be faster for
it.

The first connector must open; what the others need may not be there, and a peer may not be in their
reach. Why not is an error of their paths, which comes out where paths are tried.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec
import torch

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import Geometry
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connector,
    Landing,
    LocalMemory,
    PeerHandle,
    ReadHandle,
    ReadState,
)
from pdlaunch.transfer.connectors.device_binding import new_device_binding
from pdlaunch.transfer.connectors.nixl import NixlConnector
from pdlaunch.transfer.connectors.p2p import P2PConnector

logger = logging.getLogger(__name__)


class _Offer(msgspec.Struct, frozen=True):
    """One connector of a rank, for its peers."""

    metadata: bytes = b""
    error: str = ""
    """Why it did not open; empty when it did."""


_decoder = msgspec.msgpack.Decoder(dict[str, _Offer])


@dataclass(slots=True, eq=False)
class _Side:
    """A peer as one of the connectors knows it."""

    connector: Connector
    peer: PeerHandle | None
    error: str = ""
    num_reads: int = 0
    """Not released."""


@dataclass(slots=True, eq=False)
class _Peer:
    sides: list[_Side] = field(default_factory=list)
    chosen: _Side | None = None


@dataclass(slots=True, eq=False)
class _Read:
    side: _Side
    handle: ReadHandle


class PathsConnector(Connector):
    """Passes every READ on to the connector whose path is used."""

    def __init__(self, connectors: Sequence[Connector]) -> None:
        """``connectors``: of one rank, none of which pushes; the preferred one last."""
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

    def add_peer(self, agent_name: str, metadata: bytes, geometry: Geometry) -> PeerHandle:
        try:
            offers = _decoder.decode(metadata)
        except msgspec.MsgspecError as error:
            raise TransferError(
                f"the metadata of agent {agent_name} cannot be read: {error}"
            ) from None
        peer = _Peer(
            [
                _add_side(connector, agent_name, self._offer(connector, offers), geometry)
                for connector in self._connectors
            ]
        )
        if all(side.peer is None for side in peer.sides):
            raise TransferError(
                "; ".join(f"{side.connector.path}: {side.error}" for side in peer.sides)
            )
        return cast(PeerHandle, peer)

    def remove_peer(self, peer: PeerHandle) -> None:
        for side in cast(_Peer, peer).sides:
            _let_go(side)

    def paths(self, peer: PeerHandle) -> Sequence[str]:
        return [path for side in reversed(cast(_Peer, peer).sides) for path in _paths_of(side)]

    def use_path(self, peer: PeerHandle, path: str) -> None:
        known = cast(_Peer, peer)
        known.chosen = _side_of(known, path)
        assert known.chosen.peer is not None
        known.chosen.connector.use_path(known.chosen.peer, path)
        for side in known.sides:
            if side is not known.chosen and not side.num_reads:
                _let_go(side)

    def prepare_read(self, peer: PeerHandle, read: BlockRead) -> None:
        side = cast(_Peer, peer).chosen
        assert side is not None
        assert side.peer is not None
        side.connector.prepare_read(side.peer, read)

    def start_read(self, peer: PeerHandle, read: BlockRead) -> ReadHandle:
        side = cast(_Peer, peer).chosen
        assert side is not None
        assert side.peer is not None
        return _begun(side, side.connector.start_read(side.peer, read))

    def start_scratch_read(self, peer: PeerHandle, path: str) -> tuple[ReadHandle, torch.Tensor]:
        side = _side_of(cast(_Peer, peer), path)
        if side.peer is None:
            raise TransferError(side.error)
        handle, landing = side.connector.start_scratch_read(side.peer, path)
        return _begun(side, handle), landing

    def poll(self, handle: ReadHandle) -> ReadState:
        read = cast(_Read, handle)
        return read.side.connector.poll(read.handle)

    def landings(self, handle: ReadHandle) -> Sequence[Landing]:
        read = cast(_Read, handle)
        return read.side.connector.landings(read.handle)

    def read_s(self, handle: ReadHandle) -> float:
        read = cast(_Read, handle)
        return read.side.connector.read_s(read.handle)

    def release(self, handle: ReadHandle) -> None:
        read = cast(_Read, handle)
        read.side.connector.release(read.handle)
        read.side.num_reads -= 1

    def close(self) -> None:
        for connector in self._connectors:
            if not self._offers[connector.name].error:
                connector.close()

    def wait_unmapped(self, timeout_s: float) -> bool:
        return all(connector.wait_unmapped(timeout_s) for connector in self._connectors)

    def _offer(self, connector: Connector, offers: dict[str, _Offer]) -> _Offer:
        """Of the peer, or why either of the two sides has none."""
        own = self._offers[connector.name]
        return (
            own
            if own.error
            else offers.get(connector.name, _Offer(error="the peer does not offer it"))
        )


def _add_side(connector: Connector, agent_name: str, offer: _Offer, geometry: Geometry) -> _Side:
    if offer.error:
        return _Side(connector, None, offer.error)
    try:
        return _Side(connector, connector.add_peer(agent_name, offer.metadata, geometry))
    except TransferError as error:
        return _Side(connector, None, str(error))


def _begun(side: _Side, handle: ReadHandle) -> ReadHandle:
    side.num_reads += 1
    return cast(ReadHandle, _Read(side, handle))


def _let_go(side: _Side) -> None:
    if side.peer is not None:
        side.connector.remove_peer(side.peer)
        side.peer = None


def _paths_of(side: _Side) -> Sequence[str]:
    return [side.connector.path] if side.peer is None else side.connector.paths(side.peer)


def _side_of(peer: _Peer, path: str) -> _Side:
    return next(side for side in peer.sides if path in _paths_of(side))


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
