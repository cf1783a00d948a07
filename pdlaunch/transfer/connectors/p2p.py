"""Copies KV blocks straight out of a peer's memory, which is mapped into this process.

It serves ranks of one host only. On a CPU the memory is a memfd, on a GPU a CuMem allocation or one
of cudaMalloc. The owner takes no part in a READ, so it goes on when the owner is busy, stopped, or
dead.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from pdlaunch.engine.memory.batch_copies import Addresses
from pdlaunch.engine.memory.kv_memory import Export, NotShareable, PeerMapping, SharedRange
from pdlaunch.errors import TransferError
from pdlaunch.machine.kernel import host_identity
from pdlaunch.protocol.side_channel import HandshakeReply
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    Read,
    bind_device,
    decode_metadata,
)
from pdlaunch.transfer.connectors.fd_channel import FdServer, fetch_fds
from pdlaunch.transfer.connectors.piece_copies import PieceCopier, Pieces, new_copier

logger = logging.getLogger(__name__)


class _Card(msgspec.Struct, frozen=True):
    """Tells peers how to get a rank's memory; it travels over the side channel alone."""

    host: str
    # Address of the socket that hands over the descriptors of the KV cache and of the scratch, as
    # far as they have any.
    address: str
    token: bytes
    kv_cache: SharedRange
    scratch: SharedRange


class P2PConnector(Connector):
    name = "p2p"
    path = "p2p"

    def __init__(
        self,
        name: str,
        incarnation: int,
        *,
        host: str | None = None,
        new_copier: Callable[[torch.device], PieceCopier] = new_copier,
    ) -> None:
        """``name`` is the rank's, ``prefill-0/rank-0``; ``host`` is this process'."""
        self.agent_name = f"{name}#{incarnation}"
        self._host = host_identity() if host is None else host
        self._new_copier = new_copier
        self._server: FdServer | None = None
        self._exports: list[Export] = []
        self._copier: PieceCopier | None = None

    def open(self, memory: LocalMemory) -> None:
        self._memory = memory
        bind_device(memory.kv_cache.device)
        try:
            for tensor in (memory.kv_cache, memory.scratch):
                self._exports.append(memory.source.export(tensor))
            fds = [export.fd for export in self._exports if export.fd is not None]
            self._server = FdServer(fds)
            self._copier = self._new_copier(memory.kv_cache.device)
        except (NotShareable, OSError, TransferError) as error:
            self.close()
            raise TransferError(f"{self.agent_name} cannot share its memory: {error}") from error
        kv_cache, scratch = (export.range for export in self._exports)
        card = _Card(self._host, self._server.address, self._server.token, kv_cache, scratch)
        self._metadata = msgspec.msgpack.encode(card)

    def agent_metadata(self) -> bytes:
        return self._metadata

    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection]:
        """Map the peer's memory; takes about a millisecond, and ``fd_channel.TIMEOUT_S`` where the
        peer was stopped since it answered the handshake.
        """
        card = decode_metadata(peer, _Card)
        # An empty name is that of a kernel that does not tell: two of them need not be one host.
        if not self._host or card.host != self._host:
            raise TransferError(
                f"{peer.agent_name} is not on this host, or in another network namespace"
            )
        geometry = peer.geometry
        for what, shared, wanted in (
            ("KV cache", card.kv_cache, geometry.num_blocks * geometry.block_bytes),
            ("scratch", card.scratch, geometry.scratch_bytes),
        ):
            if shared.num_bytes != wanted:
                raise TransferError(
                    f"{what}: {shared.num_bytes} bytes are shared, {wanted} are described"
                )
        return {f"p2p/{card.kv_cache.kind}": self._map_peer(peer, card)}

    def close(self) -> None:
        if self._server is not None:
            # The server first: it must hand out no descriptor that is about to be closed.
            self._server.close()
        for export in self._exports:
            export.close()
        if self._copier is not None:
            self._copier.close()
        self._exports, self._copier = [], None
        del self._memory

    def wait_unmapped(self, timeout_s: float) -> bool:
        return self._server is None or self._server.wait_unused(timeout_s)

    def _map_peer(self, peer: HandshakeReply, card: _Card) -> _P2PConnection:
        ranges = card.kv_cache, card.scratch
        fds, use = fetch_fds(card.address, card.token, sum(each.needs_fd for each in ranges))
        mappings: list[PeerMapping] = []
        try:
            remaining = iter(fds)
            for shared in ranges:
                fd = next(remaining) if shared.needs_fd else None
                mappings.append(self._memory.source.map(shared, fd))
        except NotShareable as error:
            for mapping in mappings:
                mapping.close()
            use.close()
            raise TransferError(
                f"the memory of {peer.agent_name} cannot be mapped: {error}"
            ) from error
        finally:
            for fd in fds:
                os.close(fd)  # mappings hold the memory by themselves
        kind, num_bytes = card.kv_cache.kind, card.kv_cache.num_bytes
        logger.info("%s is mapped: %s, %d bytes", peer.agent_name, kind, num_bytes)
        assert self._copier is not None
        kv_cache, scratch = mappings
        return _P2PConnection(peer, self._memory, kv_cache, scratch, use, self._copier)


@dataclass(frozen=True, slots=True)
class _P2PConnection(Connection):
    peer: HandshakeReply
    memory: LocalMemory
    kv_cache: PeerMapping
    scratch: PeerMapping
    use: socket.socket  # tells the owner, as long as it is open, that its memory is mapped
    copier: PieceCopier

    def read(self, blocks: BlockRead) -> Read:
        geometry, layout = self.peer.geometry, self.memory.layout
        remote = blocks.remote_blocks
        # Past the last block lies memory that this mapping does not cover.
        if not 0 <= min(remote) <= max(remote) < geometry.num_blocks:
            raise TransferError(
                f"{self.peer.agent_name} has {geometry.num_blocks} blocks: others were asked for"
            )
        head_bytes = layout.head_bytes
        # block   | head 0 | head 1 | head 2 | ..      heads of a block lie side by side, so that
        #                  └─ heads asked for ─┘         one piece for each block holds all of them
        ours = self.memory.kv_cache.data_ptr() + blocks.local_heads.start * head_bytes
        theirs = self.kv_cache.address + blocks.remote_heads.start * head_bytes
        pieces = Pieces(
            _addresses(ours, blocks.local_blocks, layout.block_bytes),
            _addresses(theirs, remote, geometry.block_bytes),
            len(blocks.local_heads) * head_bytes,
        )
        return self.copier.start(pieces)

    def read_scratch(self, landing: torch.Tensor, piece_bytes: int) -> Read:
        offsets = range(0, landing.numel(), piece_bytes)[::-1]
        ours = _addresses(landing.data_ptr(), offsets)
        theirs = _addresses(self.scratch.address, offsets)
        return self.copier.start(Pieces(ours, theirs, piece_bytes))

    def close(self) -> None:
        for mapping in (self.kv_cache, self.scratch):
            try:
                mapping.close()
            except Exception:  # of a driver, about the memory of a process that may be gone
                logger.exception("memory of a peer was not unmapped")
        self.use.close()


def _addresses(start: int, indices: Sequence[int], stride_bytes: int = 1) -> Addresses:
    return np.array(indices, dtype=np.uint64) * np.uint64(stride_bytes) + np.uint64(start)
