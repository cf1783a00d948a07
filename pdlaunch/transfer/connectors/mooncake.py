"""Moves KV blocks over Mooncake's transfer engine: the prefill side writes to its readers.

Mooncake has no authentication, and listens on two ports of all network devices. These sockets are
bound to the loopback device as soon as they exist; where the network to other hosts is trusted,
they take packets to this host's address in it alone. A write counts as done when the reader's
engine has acknowledged it, which TCP does from 0.3.13 on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import torch

from pdlaunch.config.connectors import MOONCAKE_ADDRESS, MooncakeProtocol
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.machine import network
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    LocalMemory,
    PeerAgent,
    PushJob,
    ReadState,
)
from pdlaunch.transfer.connectors.pushing import PendingRead, PushingConnector, parse_agent_metadata

logger = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"

_FIX = (
    "install mooncake-transfer-engine (without CUDA: mooncake-transfer-engine-non-cuda) and "
    "Debian's libibverbs1"
)


class _Target(msgspec.Struct, frozen=True):
    segment: str  # address of the reader's engine: ``127.0.0.1:12345``
    addresses: list[int]  # return the addresses at which the heads of each block shall begin
    piece_bytes: int  # bytes to write to each address


_decoder = msgspec.msgpack.Decoder(_Target)


class MooncakeConnector(PushingConnector):
    """Writes through one transfer engine. ``open`` imports ``mooncake``, with the variables of
    ``MooncakeSpec.environment`` applied.
    """

    name = "mooncake"

    def __init__(
        self,
        name: str,
        incarnation: int,
        *,
        protocol: MooncakeProtocol,
        devices: str,
        num_sender_threads: int,
    ) -> None:
        """``devices`` are RDMA devices with commas between them; empty for all."""
        super().__init__(name, incarnation, num_sender_threads=num_sender_threads)
        self.path = f"mooncake/{protocol}"
        self._protocol = protocol
        self._devices = devices
        self._data_ports: list[int] = []

    def agent_metadata(self) -> bytes:
        return self._segment.encode()

    def connect(self, peer: PeerAgent) -> Connection:
        parse_agent_metadata(peer)
        return _MooncakeConnection(self, peer)

    def _start(self, memory: LocalMemory) -> None:
        self.engine = self._new_engine()
        self.register(memory.kv_cache)
        self.register(memory.scratch)

    def _stop(self) -> None:
        for tensor in (self.memory.kv_cache, self.memory.scratch):
            self.engine.unregister_memory(tensor.data_ptr())

    def _write(self, memory: LocalMemory, job: PushJob) -> None:
        try:
            target = _decoder.decode(job.target)
        except msgspec.MsgspecError as error:
            raise TransferError(f"the target of a write cannot be read: {error}") from None
        if job.blocks:
            sources, piece_bytes = _pieces(memory, job.blocks, job.heads)
        else:
            sources, piece_bytes = [memory.scratch.data_ptr()], memory.scratch.numel()
        if (len(target.addresses), target.piece_bytes) != (len(sources), piece_bytes):
            raise TransferError(
                f"{len(sources)} x {piece_bytes} bytes do not fit the target's "
                f"{len(target.addresses)} x {target.piece_bytes}"
            )
        local, remote, lengths = zip(*_merge(sources, target.addresses, piece_bytes), strict=True)
        code = self.engine.batch_transfer_sync_write(
            target.segment, list(local), list(remote), list(lengths)
        )
        if code != 0:
            raise TransferError(
                f"Mooncake could not write to {target.segment} over {self._protocol}: code {code}"
            )

    def settle(self, writer: str, read: PendingRead) -> ReadState:
        """Return the state of the READ. After a failed write bytes may still wait in the kernel,
        and this process's engine will write them to the target: until they are gone the READ is
        pending. ``writer``: the address of the host that wrote; of another one's kernel nothing is
        known but that it sends nothing once its connections have ended.
        """
        if not read.error:
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
        protocol = _engine_protocol(self._protocol, vars(mooncake))
        if os.environ.get("MC_TCP_PROTO") == "1":
            raise TransferError("MC_TCP_PROTO=1 has no acknowledged writes: unset it")
        # Mooncake tells its port for handshakes alone. Those for data are the ones that are new.
        before = network.listeners()
        self._host = os.environ.get(MOONCAKE_ADDRESS, _LOOPBACK)
        name = f"[{self._host}]" if ":" in self._host else self._host
        engine = mooncake.TransferEngine()
        code = engine.initialize(name, "P2PHANDSHAKE", protocol, self._devices)
        if code != 0:
            raise TransferError(
                f"Mooncake cannot start over {self._protocol}: code {code}; its reason is in this "
                "rank's log"
            )
        rpc_port = engine.get_rpc_port()
        self._segment = f"{name}:{rpc_port}"
        for listener in network.listeners() - before:
            self._close_to_strangers(listener)
            if listener.port != rpc_port:
                self._data_ports.append(listener.port)
        return engine

    def _close_to_strangers(self, listener: network.Listener) -> None:
        where = f"Mooncake listens on {listener.address}:{listener.port}, which cannot be"
        try:
            if self._host == _LOOPBACK:
                network.bind_to_loopback(listener)
                return
            network.admit_one_address(listener, self._host)
        except OSError as error:
            raise TransferError(
                f"{where} bound to the loopback device: {error}; that needs Linux 5.7 or "
                "CAP_NET_RAW"
                if self._host == _LOOPBACK
                else f"{where} closed to packets that are not for {self._host}: {error}"
            ) from error
        logger.info(
            "takes KV blocks at %s:%d: whoever reaches it can read and write them "
            "(kv_transfer.trusted_network)",
            self._host,
            listener.port,
        )

    def register(self, tensor: torch.Tensor) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        code = self.engine.register_memory(tensor.data_ptr(), num_bytes)
        if code != 0:
            raise TransferError(
                f"Mooncake cannot register {num_bytes} bytes on {tensor.device}: code {code}"
            )

    def target(self, addresses: list[int], piece_bytes: int) -> bytes:
        return msgspec.msgpack.encode(_Target(self._segment, addresses, piece_bytes))


@dataclass(frozen=True, slots=True)
class _MooncakeConnection(Connection):
    connector: MooncakeConnector
    peer: PeerAgent

    def paths(self) -> Sequence[str]:
        return (self.connector.path,)

    def read(self, blocks: BlockRead) -> PendingRead:
        """Wait for the write that the prefill side is asked for."""
        connector = self.connector
        addresses, piece_bytes = _pieces(connector.memory, blocks.local_blocks, blocks.local_heads)
        target = connector.target(addresses, piece_bytes)
        return PendingRead(target, partial(connector.settle, _host_of(self.peer)), blocks)

    def read_scratch(self, path: str) -> tuple[PendingRead, torch.Tensor]:
        """Wait for a scratch in memory that is registered until ``release``."""
        connector, num_bytes = self.connector, self.peer.geometry.scratch_bytes
        landing = connector.new_landing(num_bytes)
        connector.register(landing)
        target = connector.target([landing.data_ptr()], num_bytes)
        release = partial(connector.engine.unregister_memory, landing.data_ptr())
        settle = partial(connector.settle, _host_of(self.peer))
        return PendingRead(target, settle, None, landing, release), landing


def _host_of(peer: PeerAgent) -> str:
    return parse_agent_metadata(peer).rpartition(":")[0].strip("[]")


def _pieces(memory: LocalMemory, blocks: Sequence[int], heads: range) -> tuple[list[int], int]:
    """Return the address of each block's heads, and their bytes: the heads of a block are
    neighbours.
    """
    layout, base = memory.layout, memory.kv_cache.data_ptr()
    first = base + heads.start * layout.head_bytes
    return [first + block * layout.block_bytes for block in blocks], len(heads) * layout.head_bytes


def _merge(
    sources: Sequence[int], targets: Sequence[int], piece_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """Yield source, target and length of each copy; pieces that are neighbours on both sides become
    one.
    """
    start, length = 0, piece_bytes
    for index in range(1, len(sources)):
        if sources[index] - sources[start] == length == targets[index] - targets[start]:
            length += piece_bytes
            continue
        yield sources[start], targets[start], length
        start, length = index, piece_bytes
    yield sources[start], targets[start], length


def _engine_protocol(protocol: MooncakeProtocol, build: Mapping[str, Any]) -> str:
    """Return Mooncake's own word for a protocol. Raises TransferError when this build lacks it."""
    if protocol != "nvlink":
        return protocol
    words = {"SUPPORT_INTRA_NVLINK": "nvlink_intra", "SUPPORT_MNNVL": "nvlink"}
    found = next((word for flag, word in words.items() if build.get(flag)), None)
    if found is None:
        raise TransferError(
            "kv_transfer.mooncake.protocol nvlink: this build of Mooncake has no NVLink transport"
        )
    return found


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> MooncakeConnector:
    """Make the connector of a rank from its settings."""
    section = settings.mooncake
    return MooncakeConnector(
        name,
        incarnation,
        protocol=section.protocol,
        devices=section.devices,
        num_sender_threads=section.num_sender_threads,
    )
