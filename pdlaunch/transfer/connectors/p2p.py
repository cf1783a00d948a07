"""Copies KV blocks straight out of a peer's memory, which is mapped into this process.

It serves ranks of one host only. On a CPU the memory is a memfd, on a GPU a CuMem allocation or one
of cudaMalloc. The owner takes no part in a READ, so it goes on when the owner is busy, stopped, or
dead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import torch

from pdlaunch.engine.memory.batch_copies import Addresses
from pdlaunch.engine.memory.kv_memory import Export, NotShareable, PeerMapping, SharedRange
from pdlaunch.errors import TransferError
from pdlaunch.machine.kernel import host_identity
from pdlaunch.protocol.side_channel import Geometry
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    PeerAgent,
    Read,
    bind_device,
)
from pdlaunch.transfer.connectors.fd_channel import FdConnection, FdServer, fetch_fds
from pdlaunch.transfer.connectors.piece_copies import HostCopier, PieceCopier, Pieces
from pdlaunch.transfer.connectors.scratch import new_landing, piece_offsets

logger = logging.getLogger(__name__)


class _Card(msgspec.Struct, frozen=True):
    """Tells peers how to get a rank's memory; it travels over the side channel alone."""

    host: str
    address: str
    """Address of the socket that hands over the descriptors of the KV cache and of the scratch, as
    far as they have any.
    """
    token: bytes
    kv_cache: SharedRange
    scratch: SharedRange


_decoder = msgspec.msgpack.Decoder(_Card)


class P2PConnector(Connector):
    """Copies from mapped memory."""

    name = "p2p"
    path = "p2p"

    def __init__(
        self,
        name: str,
        incarnation: int,
        *,
        host: str | None = None,
        new_copiers: Callable[[LocalMemory], Sequence[PieceCopier]] | None = None,
    ) -> None:
        """``name`` is the rank's, ``prefill-0/rank-0``; ``host`` is this process'; ``new_copiers``
        makes those of its device.
        """
        self.agent_name = f"{name}#{incarnation}"
        self._host = host_identity() if host is None else host
        self._new_copiers = new_copiers or _copiers_of
        self._server: FdServer | None = None
        self._exports: Sequence[Export] = ()
        self._copiers: Sequence[PieceCopier] = ()

    def open(self, memory: LocalMemory) -> None:
        self._memory = memory
        bind_device(memory.kv_cache.device)
        try:
            self._exports = _export_all(memory)
            fds = [export.fd for export in self._exports if export.fd is not None]
            self._server = FdServer(fds)
            self._copiers = list(self._new_copiers(memory))
        except (NotShareable, OSError, TransferError) as error:
            self.close()
            raise TransferError(f"{self.agent_name} cannot share its memory: {error}") from error
        kv_cache, scratch = (export.range for export in self._exports)
        card = _Card(self._host, self._server.address, self._server.token, kv_cache, scratch)
        self._metadata = msgspec.msgpack.encode(card)

    def agent_metadata(self) -> bytes:
        return self._metadata

    def connect(self, peer: PeerAgent) -> Connection:
        """Map the peer's memory; takes about a millisecond, and ``fd_channel.TIMEOUT_S`` where the
        peer was stopped since it answered the handshake.
        """
        try:
            card = _decoder.decode(peer.metadata)
        except msgspec.MsgspecError as error:
            raise TransferError(
                f"the metadata of agent {peer.name} cannot be read: {error}"
            ) from None
        # An empty name is that of a kernel that does not tell: two of them need not be one host.
        if not self._host or card.host != self._host:
            raise TransferError(f"{peer.name} is not on this host, or in another network namespace")
        _check_sizes(card, peer.geometry)
        descriptors = fetch_fds(
            card.address, card.token, card.kv_cache.needs_fd + card.scratch.needs_fd
        )
        try:
            return self._map_peer(peer, card, descriptors)
        except NotShareable as error:
            descriptors.close()
            raise TransferError(f"the memory of {peer.name} cannot be mapped: {error}") from error
        finally:
            descriptors.close_fds()  # mappings hold the memory by themselves

    def close(self) -> None:
        if self._server is not None:
            # The server first: it must hand out no descriptor that is about to be closed.
            self._server.close()
        for export in self._exports:
            export.close()
        for copier in self._copiers:
            copier.close()
        self._exports, self._copiers = [], []
        del self._memory

    def wait_unmapped(self, timeout_s: float) -> bool:
        return self._server is None or self._server.wait_unused(timeout_s)

    def _map_peer(self, peer: PeerAgent, card: _Card, descriptors: FdConnection) -> _P2PConnection:
        fds = iter(descriptors.fds)
        kv_fd, scratch_fd = (
            next(fds) if shared.needs_fd else None for shared in (card.kv_cache, card.scratch)
        )
        source = self._memory.source
        kv_cache = source.map(card.kv_cache, kv_fd)
        try:
            scratch = source.map(card.scratch, scratch_fd)
        except NotShareable:
            kv_cache.close()
            raise
        logger.info(
            "%s is mapped: %s, %d bytes", peer.name, card.kv_cache.kind, card.kv_cache.num_bytes
        )
        copiers = {_path_of(card.kv_cache.kind, copier): copier for copier in self._copiers}
        return _P2PConnection(peer, self._memory, kv_cache, scratch, descriptors, copiers)


class _P2PConnection(Connection):
    """Reads a peer's mapped memory."""

    def __init__(
        self,
        peer: PeerAgent,
        memory: LocalMemory,
        kv_cache: PeerMapping,
        scratch: PeerMapping,
        use: FdConnection,
        copiers: Mapping[str, PieceCopier],
    ) -> None:
        """``use`` tells the owner, as long as it is open, that its memory is mapped; ``copiers``
        by path, the preferred one first.
        """
        self._peer = peer
        self._memory = memory
        self._kv_cache = kv_cache
        self._scratch = scratch
        self._use = use
        self._copiers = copiers
        self._any_copier = self._copier = next(iter(copiers.values()))

    def paths(self) -> Sequence[str]:
        return list(self._copiers)

    def use_path(self, path: str) -> None:
        self._copier = self._copiers[path]

    def read(self, blocks: BlockRead) -> Read:
        pieces = self._pieces_of(blocks)
        # The chosen copier was timed with pieces of the scratch; these may be too small or
        # unaligned for it.
        copier = self._copier if self._copier.supports(pieces) else self._any_copier
        return copier.start(pieces)

    def read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        offsets, size = piece_offsets(
            self._scratch.num_bytes,
            self._memory.layout.block_bytes,
            self._peer.geometry.block_bytes,
        )
        landing = new_landing(len(offsets) * size, self._memory.kv_cache.device)
        pieces = Pieces(
            _addresses(landing.data_ptr(), offsets),
            _addresses(self._scratch.address, offsets),
            size,
        )
        copier = self._copiers[path]
        if not copier.supports(pieces):
            raise TransferError(f"pieces of {size} bytes cannot be copied by {copier.name}")
        return copier.start(pieces), landing

    def close(self) -> None:
        for mapping in (self._kv_cache, self._scratch):
            _unmap(mapping)
        self._use.close()

    def _pieces_of(self, blocks: BlockRead) -> Pieces:
        geometry, layout = self._peer.geometry, self._memory.layout
        remote = blocks.remote_blocks
        # Past the last block lies memory that this mapping does not cover.
        if not 0 <= min(remote) <= max(remote) < geometry.num_blocks:
            raise TransferError(
                f"{self._peer.name} has {geometry.num_blocks} blocks: others were asked for"
            )
        head_bytes = layout.head_bytes
        # block   | head 0 | head 1 | head 2 | ..      heads of a block lie side by side, so that
        #                  └─ heads asked for ─┘         one piece for each block holds all of them
        ours = self._memory.kv_cache.data_ptr() + blocks.local_heads.start * head_bytes
        theirs = self._kv_cache.address + blocks.remote_heads.start * head_bytes
        return Pieces(
            _addresses(ours, blocks.local_blocks, layout.block_bytes),
            _addresses(theirs, remote, geometry.block_bytes),
            len(blocks.local_heads) * head_bytes,
        )


def _copiers_of(memory: LocalMemory) -> Sequence[PieceCopier]:
    if memory.kv_cache.device.type == "cpu":
        return [HostCopier()]
    from pdlaunch.transfer.connectors.cuda_copies import new_cuda_copiers

    return new_cuda_copiers(memory.kv_cache)


def _export_all(memory: LocalMemory) -> list[Export]:
    """Export the KV cache and the scratch. Raises NotShareable; then nothing is open."""
    kv_cache = memory.source.export(memory.kv_cache)
    try:
        return [kv_cache, memory.source.export(memory.scratch)]
    except NotShareable:
        kv_cache.close()
        raise


def _check_sizes(card: _Card, geometry: Geometry) -> None:
    expected = {
        "KV cache": (geometry.num_blocks * geometry.block_bytes, card.kv_cache.num_bytes),
        "scratch": (geometry.scratch_bytes, card.scratch.num_bytes),
    }
    for what, (wanted, found) in expected.items():
        if wanted != found:
            raise TransferError(f"{what}: {found} bytes are shared, {wanted} are described")


def _path_of(kind: str, copier: PieceCopier) -> str:
    return f"p2p/{kind}" + (f"/{copier.name}" if copier.name else "")


def _addresses(start: int, indices: Sequence[int], stride_bytes: int = 1) -> Addresses:
    return np.array(indices, dtype=np.uint64) * np.uint64(stride_bytes) + np.uint64(start)


def _unmap(mapping: PeerMapping) -> None:
    try:
        mapping.close()
    except Exception:  # of a driver, about the memory of a process that may be gone
        logger.exception("memory of a peer was not unmapped")
