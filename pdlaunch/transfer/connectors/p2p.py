"""KV blocks straight out of a peer's memory: its allocations are mapped into this process, and
copied from.

Only for ranks of one host. On a CPU the memory is a memfd, on a GPU a CuMem allocation or one of
cudaMalloc. The owner takes no part in a READ, so it goes on when the owner is busy or stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import msgspec
import numpy as np
import torch

from pdlaunch.errors import TransferError
from pdlaunch.memory.batch_copies import Addresses
from pdlaunch.memory.kv_memory import Export, NotShareable, PeerMapping, SharedRange
from pdlaunch.platform.kernel import host_identity
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
from pdlaunch.transfer.connectors.device_binding import DeviceBinding
from pdlaunch.transfer.connectors.fd_channel import FdConnection, FdServer, fetch_fds
from pdlaunch.transfer.connectors.piece_copies import Copy, HostCopier, PieceCopier, Pieces
from pdlaunch.transfer.connectors.scratch import new_landing, piece_offsets

logger = logging.getLogger(__name__)


class _Card(msgspec.Struct, frozen=True):
    """What a rank tells its peers of its memory; it travels over the side channel alone."""

    host: str
    address: str
    """Of the socket that hands over the descriptors of the KV cache and of the scratch, as far as
    there are any.
    """
    token: bytes
    kv_cache: SharedRange
    scratch: SharedRange


_decoder = msgspec.msgpack.Decoder(_Card)


@dataclass(slots=True, eq=False)
class _Peer:
    name: str
    kind: str
    geometry: Geometry
    kv_cache: PeerMapping
    scratch: PeerMapping
    connection: FdConnection
    copier: PieceCopier


@dataclass(slots=True, eq=False)
class _Read:
    copy: Copy
    landing: torch.Tensor | None = None


class P2PConnector(Connector):
    """Copies from mapped memory."""

    name = "p2p"
    path = "p2p"

    def __init__(
        self,
        name: str,
        incarnation: int,
        *,
        binding: DeviceBinding,
        host: str | None = None,
        new_copiers: Callable[[LocalMemory], Sequence[PieceCopier]] | None = None,
    ) -> None:
        """``name``: of the rank, ``prefill-0/rank-0``. ``host``: that of this process;
        ``new_copiers``: those of its device.
        """
        self.agent_name = f"{name}#{incarnation}"
        self._binding = binding
        self._host = host_identity() if host is None else host
        self._new_copiers = new_copiers or _copiers_of
        self._server: FdServer | None = None
        self._exports: Sequence[Export] = ()
        self._copiers: Sequence[PieceCopier] = ()

    def open(self, memory: LocalMemory) -> None:
        self._memory = memory
        self._binding.capture(memory.kv_cache)
        self._binding.bind()
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

    def add_peer(self, agent_name: str, metadata: bytes, geometry: Geometry) -> PeerHandle:
        """Takes about a millisecond; ``fd_channel.TIMEOUT_S`` where the peer was stopped since it
        answered the handshake.
        """
        try:
            card = _decoder.decode(metadata)
        except msgspec.MsgspecError as error:
            raise TransferError(
                f"the metadata of agent {agent_name} cannot be read: {error}"
            ) from None
        if not self._host or card.host != self._host:
            raise TransferError(
                f"{agent_name} is not on this host, or in another network namespace"
            )
        _check_sizes(card, geometry)
        num_fds = card.kv_cache.needs_fd + card.scratch.needs_fd
        connection = fetch_fds(card.address, card.token, num_fds)
        try:
            return cast(PeerHandle, self._map_peer(agent_name, card, geometry, connection))
        except NotShareable as error:
            connection.close_fds()
            connection.close()
            raise TransferError(f"the memory of {agent_name} cannot be mapped: {error}") from error

    def remove_peer(self, peer: PeerHandle) -> None:
        known = cast(_Peer, peer)
        for mapping in (known.kv_cache, known.scratch):
            _unmap(mapping)
        known.connection.close()

    def paths(self, peer: PeerHandle) -> Sequence[str]:
        return [_path_of(cast(_Peer, peer), copier) for copier in self._copiers]

    def use_path(self, peer: PeerHandle, path: str) -> None:
        known = cast(_Peer, peer)
        known.copier = self._copier_of(known, path)

    def prepare_read(self, peer: PeerHandle, read: BlockRead) -> None:
        known = cast(_Peer, peer)
        pieces = read.memo[peer] = self._pieces_of(known, read)
        for part in pieces.parts:
            part.merged  # noqa: B018 - it is kept

    def start_read(self, peer: PeerHandle, read: BlockRead) -> ReadHandle:
        known = cast(_Peer, peer)
        pieces = read.memo.get(peer) or self._pieces_of(known, read)
        copier = known.copier if known.copier.supports(pieces) else self._copiers[0]
        return cast(ReadHandle, _Read(copier.start(pieces)))

    def _pieces_of(self, known: _Peer, read: BlockRead) -> Pieces:
        geometry, layout = known.geometry, self._memory.layout
        if not 0 <= min(read.remote_blocks) <= max(read.remote_blocks) < geometry.num_blocks:
            raise TransferError(
                f"{known.name} has {geometry.num_blocks} blocks: others were asked for"
            )
        head_bytes, base = layout.head_bytes, self._memory.kv_cache.data_ptr()
        return Pieces(
            _addresses(
                base + read.local_heads.start * head_bytes, read.local_blocks, layout.block_bytes
            ),
            _addresses(
                known.kv_cache.address + read.remote_heads.start * head_bytes,
                read.remote_blocks,
                geometry.block_bytes,
            ),
            len(read.local_heads) * head_bytes,
        )

    def start_scratch_read(self, peer: PeerHandle, path: str) -> tuple[ReadHandle, torch.Tensor]:
        known = cast(_Peer, peer)
        offsets, size = piece_offsets(
            known.scratch.num_bytes, self._memory.layout.block_bytes, known.geometry.block_bytes
        )
        landing = new_landing(len(offsets) * size, self._memory.kv_cache.device)
        pieces = Pieces(
            _addresses(landing.data_ptr(), offsets),
            _addresses(known.scratch.address, offsets),
            size,
        )
        copier = self._copier_of(known, path)
        if not copier.supports(pieces):
            raise TransferError(f"pieces of {size} bytes cannot be copied by {copier.name}")
        return cast(ReadHandle, _Read(copier.start(pieces), landing)), landing

    def poll(self, handle: ReadHandle) -> ReadState:
        return cast(_Read, handle).copy.state()

    def landings(self, handle: ReadHandle) -> Sequence[Landing]:
        return cast(_Read, handle).copy.landings()

    def read_s(self, handle: ReadHandle) -> float:
        return cast(_Read, handle).copy.seconds()

    def release(self, handle: ReadHandle) -> None:
        """Nothing is kept of a READ."""

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for export in self._exports:
            export.close()
        for copier in self._copiers:
            copier.close()
        self._exports, self._copiers = [], []
        del self._memory

    def wait_unmapped(self, timeout_s: float) -> bool:
        return self._server is None or self._server.wait_unused(timeout_s)

    def _map_peer(
        self, agent_name: str, card: _Card, geometry: Geometry, connection: FdConnection
    ) -> _Peer:
        fds = iter(connection.fds)
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
        connection.close_fds()  # mappings hold the memory by themselves
        logger.info(
            "%s is mapped: %s, %d bytes", agent_name, card.kv_cache.kind, card.kv_cache.num_bytes
        )
        return _Peer(
            agent_name,
            card.kv_cache.kind,
            geometry,
            kv_cache,
            scratch,
            connection,
            self._copiers[0],
        )

    def _copier_of(self, peer: _Peer, path: str) -> PieceCopier:
        return next(copier for copier in self._copiers if _path_of(peer, copier) == path)


def _copiers_of(memory: LocalMemory) -> Sequence[PieceCopier]:
    if memory.kv_cache.device.type == "cpu":
        return [HostCopier()]
    from pdlaunch.transfer.connectors.cuda_copies import new_cuda_copiers

    return new_cuda_copiers(memory.kv_cache)


def _export_all(memory: LocalMemory) -> list[Export]:
    """Of the KV cache and of the scratch. Raises NotShareable; then nothing is open."""
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


def _path_of(peer: _Peer, copier: PieceCopier) -> str:
    return f"p2p/{peer.kind}" + (f"/{copier.name}" if copier.name else "")


def _addresses(start: int, indices: Sequence[int], stride_bytes: int = 1) -> Addresses:
    return np.array(indices, dtype=np.uint64) * np.uint64(stride_bytes) + np.uint64(start)


def _unmap(mapping: PeerMapping) -> None:
    try:
        mapping.close()
    except Exception:  # Whatever a driver says of the memory of a process that is gone: there is nothing more to be done.
        logger.exception("memory of a peer was not unmapped")
