"""Interfaces of a connector, which moves the bytes of KV blocks between ranks.

::

    open(memory) ── connect(peer) ──▶ Connection ── read(blocks) ──▶ Read ── poll .. release
      ▲    │                              └─ close, once its READs have ended
      └────┴─ close

One thread uses a connector, its connections and READs: that of the ``TransferThread``. They read
whole blocks, or heads of blocks, of a peer into local blocks, and know nothing of requests, leases
or proofs. What only some connectors do is a protocol of its own: ``Pusher`` and ``MemoryMapper``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.memory.kv_memory import KVMemory, PrivateKVMemory
from pdlaunch.protocol.ids import LeaseId, ReaderId
from pdlaunch.protocol.side_channel import Geometry

ReadState = Literal["pending", "done", "failed"]
ReadPart = tuple[int, torch.cuda.Event]
"""A number of blocks, and the event after which that many blocks of a READ are in place."""


@dataclass(frozen=True, slots=True)
class LocalMemory:
    """Holds the memory that a rank lets others read."""

    kv_cache: torch.Tensor
    """[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous; outlives the
    connector. Heads stand before layers, so that a range of heads of a block is one piece of
    memory: ranks of another TP size read it as it lies, and compare checksums of heads.
    """
    scratch: torch.Tensor
    """[num_bytes] uint8; a known pattern, written before ``open``, that peers read to prove the
    path.
    """
    layout: KVCacheLayout
    source: KVMemory = field(default_factory=PrivateKVMemory)
    """The memory that KV cache and scratch were allocated from."""


@dataclass(frozen=True, slots=True)
class PeerAgent:
    """Describes a peer's connector, as its handshake tells of it."""

    name: str
    metadata: bytes
    """The peer's address, out of its ``agent_metadata``."""
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class BlockRead:
    """Says which bytes go where: heads ``remote_heads`` of ``remote_blocks[i]`` to heads
    ``local_heads`` of ``local_blocks[i]``.
    """

    local_blocks: Sequence[int]
    remote_blocks: Sequence[int]
    """The blocks to read, as many as local ones."""
    local_heads: range
    """Index within the rank."""
    remote_heads: range
    """Index within the peer's rank; as many as local heads."""
    lease_id: LeaseId = field(default=LeaseId(""))
    reader: ReaderId = field(default=ReaderId(""))
    """The owner of the lease, as in the PullBegin: a prefill side that writes checks both."""
    digest: str = ""
    """Hexadecimal; names the prompt by its content."""


class Read(ABC):
    """Stands for a READ that has been started and not yet released."""

    @abstractmethod
    def poll(self) -> ReadState:
        """Return where the READ stands. After done or failed it writes no more."""

    def parts(self) -> Sequence[ReadPart]:
        """Return, for a pending READ of blocks, when its first blocks are in place for good; empty
        where the device cannot tell.
        """
        return ()

    @abstractmethod
    def seconds(self) -> float:
        """Return how long a READ that is done took from its post to its end."""

    @abstractmethod
    def release(self) -> None:
        """Free a READ that is done or failed. Never raises."""


class PushedRead(Read):
    """Stands for a READ whose bytes the prefill side writes, once it is asked to."""

    target: bytes
    """Tells the peer's connector where to write."""

    @abstractmethod
    def end(self, error: str) -> None:
        """Tell that the prefill side has ended its write, or has died; ``error`` is empty when all
        bytes have landed. ``poll`` says done or failed as soon as nothing can land any more.
        """


class Connection(ABC):
    """Is a way to read one peer's memory, or several ways; see ``paths``."""

    @abstractmethod
    def paths(self) -> Sequence[str]:
        """Return the ways to read this peer, the preferred one first; each is tried with a READ of
        the scratch.
        """

    def use_path(self, path: str) -> None:
        """Send every ``read`` from now on this way; the other paths may be let go."""
        return

    @abstractmethod
    def read(self, blocks: BlockRead) -> Read:
        """Start to read at least one block and head; may block while the bytes are copied, never
        for an answer of the peer: this thread answers that peer's questions, too, and two ranks
        that wait for each other would both stand still. Raises TransferError.

        Until ``poll`` says done or failed the READ may write to the local blocks, whatever else
        happens. The READ of a connector with a ``pusher`` is a ``PushedRead``.
        """

    @abstractmethod
    def read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        """Start to read the peer's scratch into fresh memory, which lives as long as the READ.
        Raises TransferError.

        Where each piece has a cost of its own, it is read in pieces of about the size of a block.
        """

    @abstractmethod
    def close(self) -> None:
        """Forget the peer; the READs have ended and are released. Never raises."""


@dataclass(frozen=True, slots=True)
class PushJob:
    """Names what the prefill side writes for a peer's READ: ``heads`` of ``blocks``, or its scratch
    when there are no blocks.
    """

    target: bytes
    """The target, as in ``PushedRead``."""
    blocks: Sequence[int]
    heads: range
    """Index within this rank."""


class Write(Protocol):
    """Stands for a write to a peer that has begun; it cannot be taken back."""

    def poll(self) -> str | None:
        """Return None while it is pending, "" when all bytes have landed, else why it failed."""


class Pusher(Protocol):
    """A connector whose prefill side writes has one of these."""

    def push(self, job: PushJob) -> Write:
        """Begin to write to a peer; never waits."""


class MemoryMapper(Protocol):
    """A connector whose peers map this rank's memory has one of these."""

    def wait_unmapped(self, timeout_s: float) -> bool:
        """Call this after ``Connector.close``: wait until no peer maps the memory; False when that
        takes longer. Any thread may call.
        """


class Connector(ABC):
    """Moves KV blocks. It may be opened again after ``close``."""

    name: str
    """The name in the settings; ranks whose names differ do not connect."""
    path: str
    """The name of what carries the bytes, for people: ``nixl/UCX``; see ``Connection.paths``."""
    agent_name: str
    """Unique over ranks and incarnations: the pattern of the scratch follows from it, by which
    peers tell this memory from that of a predecessor.
    """

    @property
    def pusher(self) -> Pusher | None:
        """Return what writes to peers; None where they read by themselves."""
        return None

    @property
    def mapper(self) -> MemoryMapper | None:
        """Return what knows who maps this rank's memory; None where nobody does."""
        return None

    @abstractmethod
    def open(self, memory: LocalMemory) -> None:
        """Register the memory, once, and keep it alive until ``close``. Raises TransferError."""

    @abstractmethod
    def agent_metadata(self) -> bytes:
        """Return what a peer needs to connect; the same until ``close``."""

    @abstractmethod
    def connect(self, peer: PeerAgent) -> Connection:
        """Get ready to read from a peer. Raises TransferError."""

    @abstractmethod
    def close(self) -> None:
        """Deregister and let go of everything. READs that are pending are abandoned, and only when
        the process is about to exit: a rank that falls asleep has waited for all of them.
        """


def memory_kind(tensor: torch.Tensor) -> tuple[Literal["DRAM", "VRAM"], int]:
    """Return the kind of a tensor's memory and the index of its device, 0 on a CPU."""
    return ("DRAM", 0) if tensor.device.type == "cpu" else ("VRAM", tensor.get_device())
