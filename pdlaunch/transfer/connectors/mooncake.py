"""Moves KV blocks with Mooncake's transfer engine: the prefill side writes to its readers.

Mooncake has no authentication and listens on two ports of all network devices. This connector binds
these sockets to the loopback device as soon as they exist. If the network to other hosts is
trusted, they accept only packets to this host's address in that network instead. A write is done
when the reader's engine has acknowledged it; over TCP, Mooncake does so since 0.3.13.
"""

import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch

from pdlaunch.config.connectors import MOONCAKE_ADDRESS
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.machine import network
from pdlaunch.protocol.side_channel import HandshakeReply
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    LocalMemory,
    PendingRead,
    PushingConnector,
    ReadState,
)
from pdlaunch.transfer.regions import BlockIds, Pieces, even_pieces, merge, pieces_of

logger = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_FIX = (
    "install mooncake-transfer-engine (without CUDA: mooncake-transfer-engine-non-cuda) and "
    "Debian's libibverbs1"
)


class _Target(msgspec.Struct, frozen=True):
    segment: str  # address of the reader's engine: ``127.0.0.1:12345``
    addresses: list[int]  # of each piece, in the order of the READ
    sizes: list[int]


class MooncakeConnector(PushingConnector):
    """Writes with one transfer engine. ``open`` imports Mooncake, which reads MC_* variables."""

    name = "mooncake"

    def __init__(self, settings: KVTransferSettings, name: str, incarnation: int) -> None:
        self._settings = settings.mooncake
        super().__init__(name, incarnation, self._settings.num_sender_threads)
        self.path = f"mooncake/{self._settings.protocol}"
        self._data_ports: list[int] = []

    def agent_metadata(self) -> bytes:
        return self._segment.encode()

    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection]:
        _host_of(peer)
        return super().connect(peer)

    def expect(self, peer: HandshakeReply, blocks: BlockRead) -> PendingRead:
        kv = self.memory.kv
        ours = pieces_of(kv.places, kv.groups, blocks.local_blocks, blocks.local_heads)
        target = _Target(self._segment, ours.addresses.tolist(), ours.sizes.tolist())
        settle = partial(self._settle, _host_of(peer))
        return PendingRead(settle, msgspec.msgpack.encode(target))

    def expect_scratch(self, peer: HandshakeReply, landing: torch.Tensor) -> PendingRead:
        self._register(landing)
        target = _Target(self._segment, [landing.data_ptr()], [landing.numel()])
        settle = partial(self._settle, _host_of(peer))
        unregister = partial(self.engine.unregister_memory, landing.data_ptr())
        return PendingRead(settle, msgspec.msgpack.encode(target), unregister)

    def _start(self, memory: LocalMemory) -> None:
        self.engine = self._new_engine()
        self._tensors = [*memory.kv.allocations, memory.scratch]
        for tensor in self._tensors:
            self._register(tensor)

    def _stop(self) -> None:
        for tensor in self._tensors:
            self.engine.unregister_memory(tensor.data_ptr())

    def _write(self, memory: LocalMemory, target: bytes, blocks: BlockIds, heads: range) -> None:
        try:
            wanted = msgspec.msgpack.decode(target, type=_Target)
        except msgspec.MsgspecError as error:
            raise TransferError(f"the target of a write cannot be read: {error}") from None
        there = Pieces(*(np.array(each, np.uint64) for each in (wanted.addresses, wanted.sizes)))
        # A reader may ask for less than the whole scratch.
        scratch_bytes = min(memory.scratch.numel(), sum(wanted.sizes))
        here = even_pieces(memory.scratch.data_ptr(), scratch_bytes, scratch_bytes)
        if blocks:
            here = pieces_of(memory.kv.places, memory.kv.groups, blocks, heads)
        if not np.array_equal(there.sizes, here.sizes):
            raise TransferError(
                f"{len(here.sizes)} pieces of {here.sizes.sum()} bytes do not fit the target's "
                f"{len(there.sizes)} pieces of {there.sizes.sum()} bytes"
            )
        remote, local, lengths = (column.tolist() for column in merge(there, here))
        code = self.engine.batch_transfer_sync_write(wanted.segment, local, remote, lengths)
        if code != 0:
            raise TransferError(
                f"Mooncake could not write to {wanted.segment} over {self.path}: code {code}"
            )

    def _settle(self, writer: str, error: str) -> ReadState:
        """Return the state of a READ whose write has ended. After a failed write, the kernel may
        still hold bytes for the target: the READ is pending until they are gone. ``writer``: the
        writing host. Another host's kernel cannot send anything once its connections have ended.
        """
        if not error:
            return "done"
        is_far = writer != self._host
        is_under_way = any(
            network.is_connected(port, writer) if is_far else network.has_bytes_under_way(port)
            for port in self._data_ports
        )
        return "pending" if is_under_way else "failed"

    def _new_engine(self) -> Any:
        try:
            from mooncake import engine as mooncake
        except ImportError as error:
            raise TransferError(f"Mooncake cannot be imported: {error}; {_FIX}") from error
        if os.environ.get("MC_TCP_PROTO") == "1":
            raise TransferError("MC_TCP_PROTO=1 has no acknowledged writes: unset it")
        # Mooncake reports only its handshake port. The other new listeners are its data ports.
        before = network.listeners()
        self._host = os.environ.get(MOONCAKE_ADDRESS, _LOOPBACK)
        name = f"[{self._host}]" if ":" in self._host else self._host
        engine = mooncake.TransferEngine()
        code = engine.initialize(
            name, "P2PHANDSHAKE", self._settings.protocol, self._settings.devices
        )
        if code != 0:
            raise TransferError(
                f"Mooncake cannot start over {self.path}: code {code}; this rank's log has the "
                "reason"
            )
        rpc_port = engine.get_rpc_port()
        self._segment = f"{name}:{rpc_port}"
        for listener in network.listeners() - before:
            self._close_to_strangers(listener)
            if listener.port != rpc_port:
                self._data_ports.append(listener.port)
        return engine

    def _close_to_strangers(self, listener: network.Listener) -> None:
        wanted = f"closed to packets that are not for {self._host}"
        try:
            if self._host == _LOOPBACK:
                wanted = "bound to the loopback device (needs Linux 5.7 or CAP_NET_RAW)"
                network.bind_to_loopback(listener)
                return
            network.admit_one_address(listener, self._host)
        except OSError as error:
            where = f"Mooncake listens on {listener.address}:{listener.port}"
            raise TransferError(f"{where}, which cannot be {wanted}: {error}") from error
        logger.info(
            "listens for KV blocks at %s:%d: any process that reaches it can read and write them "
            "(kv_transfer.trusted_network)",
            self._host,
            listener.port,
        )

    def _register(self, tensor: torch.Tensor) -> None:
        code = self.engine.register_memory(tensor.data_ptr(), tensor.nbytes)
        if code != 0:
            raise TransferError(
                f"Mooncake cannot register {tensor.nbytes} bytes on {tensor.device}: code {code}"
            )


def _host_of(peer: HandshakeReply) -> str:
    """Return the host in a peer's metadata. Raises TransferError if the metadata are invalid."""
    metadata = peer.agent_metadata
    if not 0 < len(metadata) <= 256 or not metadata.isascii():
        raise TransferError(
            f"the metadata of agent {peer.agent_name} cannot be read: {metadata[:64]!r}"
        )
    return metadata.decode().rpartition(":")[0].strip("[]")
