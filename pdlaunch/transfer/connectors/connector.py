"""Interfaces of a connector, which moves the bytes of KV blocks between ranks.

::

    open(memory) ── connect(peer) ──▶ Connection ── read(blocks) ──▶ Read ── poll .. release
      ▲    │                              └─ close, once its READs have ended
      └────┴─ close

One thread uses a connector, its connections and READs: that of the ``TransferThread``. They read
whole blocks, or heads of blocks, of a peer into local blocks, and know nothing of requests, leases
or proofs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import msgspec
import torch

from pdlaunch.config.connectors import connector_settings, load_named
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.memory.kv_memory import KVMemory, PrivateKVMemory
from pdlaunch.errors import ConfigError, TransferError
from pdlaunch.protocol.side_channel import HandshakeReply
from pdlaunch.transfer.regions import BlockIds, KVRegions, Pieces, even_pieces, pieces_of

ReadState = Literal["pending", "done", "failed"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LocalMemory:
    """Holds the memory that a rank lets others read."""

    kv: KVRegions  # outlives the connector
    # [num_bytes] uint8; a pattern, written before ``open``: peers read it as proof.
    scratch: torch.Tensor
    # The memory that KV cache and scratch were allocated from.
    source: KVMemory = field(default_factory=PrivateKVMemory)


@dataclass(frozen=True, slots=True)
class BlockRead:
    """Says which bytes go where: heads ``remote_heads`` of ``remote_blocks[g][i]`` to heads
    ``local_heads`` of ``local_blocks[g][i]``. Heads are indices within their rank.
    """

    # Of each KV cache group: ``local_blocks[g][i]`` is a row of the group's regions.
    local_blocks: BlockIds
    remote_blocks: BlockIds
    local_heads: range
    remote_heads: range
    # ``<digest of the prompt>/<digest of the reader>``, for connectors that keep files.
    label: str = ""


class Read(ABC):
    """Stands for a READ that has been started and not yet released."""

    # Tells the peer's connector where to write; None when this side reads by itself.
    target: bytes | None = None

    @abstractmethod
    def poll(self) -> ReadState:
        """Return where the READ stands. After done or failed it writes no more."""

    @abstractmethod
    def seconds(self) -> float:
        """Return how long a READ that is done took from its post to its end."""

    def end(self, error: str) -> None:  # noqa: B027 - only where the peer writes
        """Record that the peer has ended its write, or has died; ``error`` is empty if all bytes
        have landed. ``poll`` returns done or failed once no more bytes can land.
        """

    def release(self) -> None:  # noqa: B027 - most READs hold nothing
        """Free a READ that is done or failed. Never raises."""


class Connection(ABC):
    """One path to one peer's memory."""

    @abstractmethod
    def read(self, blocks: BlockRead) -> Read:
        """Start to read at least one block and head; may block while the bytes are copied, never
        for an answer of the peer: this thread answers that peer's questions, too, and two ranks
        that wait for each other would both stand still. Raises TransferError.

        Until ``poll`` says done or failed the READ may write to the local blocks, whatever else
        happens.
        """

    @abstractmethod
    def read_scratch(self, landing: torch.Tensor, piece_bytes: int) -> Read:
        """Start to read the beginning of the peer's scratch into ``landing``, [num_bytes] uint8,
        which the caller keeps alive until the READ has ended. Raises TransferError.

        Where each piece has a cost of its own, it is read in pieces of ``piece_bytes``, from the
        last to the first: no connector merges neighbours in this order, as it could not merge the
        scattered blocks of a prompt.
        """

    def named(self, path: str) -> str:
        """Return the name of its path for people, once READs have gone over it."""
        return path

    def close(self) -> None:  # noqa: B027 - some keep nothing
        """Forget the peer; the READs have ended and are released. Never raises."""


class Connector(ABC):
    """Moves KV blocks. It may be opened again after ``close``."""

    name: str  # the name in the settings; ranks whose names differ do not connect
    path: str  # the name of what carries the bytes, for people: ``nixl/UCX``
    # Unique over ranks and incarnations: the pattern of the scratch follows from it, by which peers
    # tell this memory from that of a predecessor.
    agent_name: str
    # The prefill side writes to its readers, by ``push``; READs have a ``target``.
    pushes: bool = False

    @abstractmethod
    def open(self, memory: LocalMemory) -> None:
        """Register the memory, once, and keep it alive until ``close``. Raises TransferError."""

    @abstractmethod
    def agent_metadata(self) -> bytes:
        """Return what a peer needs to connect; the same until ``close``."""

    @abstractmethod
    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection | TransferError]:
        """Get ready to read from a peer. Raises TransferError.

        Returns its paths, the preferred one first: each a connection, or why there is none. The
        handshake tries each and uses one; all are closed together.
        """

    def push(self, target: bytes, blocks: BlockIds, heads: range) -> Future[None]:
        """Begin to write ``heads`` of ``blocks``, or the scratch when there are no blocks, to where
        the ``Read.target`` of a peer says. A write cannot be taken back; this never waits. The
        future ends when all bytes have landed, or with the reason why not.
        """
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Deregister and let go of everything. READs that are pending are abandoned, and only when
        the process is about to exit: a rank that falls asleep has waited for all of them.
        """

    def wait_unmapped(self, timeout_s: float) -> bool:
        """Wait after ``close`` until no peer maps this memory; False after ``timeout_s``."""
        return True


class NoConnector(Connector):
    """The connector of a rank that exchanges no KV blocks."""

    name = path = "none"

    def __init__(self, rank_name: str) -> None:
        self.agent_name = rank_name

    def open(self, memory: LocalMemory) -> None:
        """Do nothing: nobody reads this memory."""

    def agent_metadata(self) -> bytes:
        return b""

    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection | TransferError]:
        raise TransferError(f"{self.agent_name} has no connector: it pulls no KV blocks")

    def close(self) -> None:
        """Do nothing: nothing was opened."""


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> Connector:
    """Make the connector of a rank and import no other one. Raises ConfigError."""
    what = f"connector {settings.connector}"
    factory = load_named(connector_settings(settings.connector).factory, what)
    connector = factory(settings, name, incarnation)
    if not isinstance(connector, Connector):
        raise ConfigError(f"{what}: {type(connector).__name__} is no Connector")
    return connector


def pieces_to_read(
    memory: LocalMemory, peer: HandshakeReply, blocks: BlockRead
) -> tuple[Pieces, Pieces]:
    """Return where each piece of a READ goes, and where it lies at the peer. Raises TransferError
    for blocks that the peer does not have: there lies memory of something else.
    """
    groups, geometry = memory.kv.groups, peer.geometry
    remote_ids = [block_id for group in blocks.remote_blocks for block_id in group]
    if not 0 <= min(remote_ids) <= max(remote_ids) < geometry.num_blocks:
        raise TransferError(
            f"{peer.agent_name} has {geometry.num_blocks} blocks: others were asked for"
        )
    ours = pieces_of(memory.kv.places, groups, blocks.local_blocks, blocks.local_heads)
    return ours, pieces_of(geometry.regions, groups, blocks.remote_blocks, blocks.remote_heads)


def pieces_of_scratch(
    landing: torch.Tensor, peer: HandshakeReply, piece_bytes: int
) -> tuple[Pieces, Pieces]:
    """Return where the pieces of a peer's scratch go, and where they lie."""
    return (
        even_pieces(landing.data_ptr(), landing.numel(), piece_bytes),
        even_pieces(peer.geometry.scratch_address, landing.numel(), piece_bytes),
    )


def bind_device(device: torch.device) -> None:
    """Bind this thread to the KV cache's CUDA device, as libraries change the current one."""
    if device.type != "cpu":
        torch.cuda.set_device(device)


def memory_kind(tensor: torch.Tensor) -> tuple[Literal["DRAM", "VRAM"], int]:
    """Return the kind of a tensor's memory and the index of its device, 0 on a CPU."""
    return ("DRAM", 0) if tensor.device.type == "cpu" else ("VRAM", tensor.get_device())


def decode_metadata(peer: HandshakeReply, kind: type[T]) -> T:
    """Return a peer's metadata, encoded by msgpack. Raises TransferError."""
    try:
        return msgspec.msgpack.decode(peer.agent_metadata, type=kind)
    except msgspec.MsgspecError as error:
        raise TransferError(
            f"the metadata of agent {peer.agent_name} cannot be read: {error}"
        ) from None
