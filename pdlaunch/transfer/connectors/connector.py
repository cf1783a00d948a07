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
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

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
    metadata: bytes  # the peer's address, out of its ``agent_metadata``
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class BlockRead:
    """Says which bytes go where: heads ``remote_heads`` of ``remote_blocks[i]`` to heads
    ``local_heads`` of ``local_blocks[i]``. Heads are indices within their rank.
    """

    local_blocks: Sequence[int]
    remote_blocks: Sequence[int]
    local_heads: range
    remote_heads: range
    lease_id: LeaseId = field(default=LeaseId(""))
    reader: ReaderId = field(default=ReaderId(""))
    """The owner of the lease, as in the PullBegin: a prefill side that writes checks both."""
    digest: str = ""  # hexadecimal; names the prompt by its content


@dataclass(frozen=True, slots=True)
class PushJob:
    """Names what the prefill side writes for a peer's READ: ``heads`` of ``blocks``, or its scratch
    when there are no blocks.
    """

    target: bytes  # the target, as in ``PushedRead``
    blocks: Sequence[int]
    heads: range  # index within this rank


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

    def release(self) -> None:  # noqa: B027 - most READs hold nothing
        """Free a READ that is done or failed. Never raises."""


class PushedRead(Read):
    """Stands for a READ whose bytes the prefill side writes, once it is asked to."""

    target: bytes  # tells the peer's connector where to write

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

    def use_path(self, path: str) -> None:  # noqa: B027 - most have a single one
        """Send every ``read`` from now on this way."""

    @abstractmethod
    def read(self, blocks: BlockRead) -> Read:
        """Start to read at least one block and head; may block while the bytes are copied, never
        for an answer of the peer: this thread answers that peer's questions, too, and two ranks
        that wait for each other would both stand still. Raises TransferError.

        Until ``poll`` says done or failed the READ may write to the local blocks, whatever else
        happens. The READ of a connector that ``pushes`` is a ``PushedRead``.
        """

    @abstractmethod
    def read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        """Start to read the peer's scratch into fresh memory, which lives as long as the READ.
        Raises TransferError.

        Where each piece has a cost of its own, it is read in pieces of about the size of a block.
        """

    def close(self) -> None:  # noqa: B027 - some keep nothing
        """Forget the peer; the READs have ended and are released. Never raises."""


class Connector(ABC):
    """Moves KV blocks. It may be opened again after ``close``."""

    name: str  # the name in the settings; ranks whose names differ do not connect
    path: str
    """The name of what carries the bytes, for people: ``nixl/UCX``; see ``Connection.paths``."""
    agent_name: str
    """Unique over ranks and incarnations: the pattern of the scratch follows from it, by which
    peers tell this memory from that of a predecessor.
    """
    pushes: bool = False  # the prefill side writes to its readers, by ``push``

    @abstractmethod
    def open(self, memory: LocalMemory) -> None:
        """Register the memory, once, and keep it alive until ``close``. Raises TransferError."""

    @abstractmethod
    def agent_metadata(self) -> bytes:
        """Return what a peer needs to connect; the same until ``close``."""

    @abstractmethod
    def connect(self, peer: PeerAgent) -> Connection:
        """Get ready to read from a peer. Raises TransferError."""

    def push(self, job: PushJob) -> Future[None]:
        """Begin to write to a peer, which cannot be taken back; never waits. The future ends when
        all bytes have landed, or with the reason why not.
        """
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Deregister and let go of everything. READs that are pending are abandoned, and only when
        the process is about to exit: a rank that falls asleep has waited for all of them.
        """

    def wait_unmapped(self, timeout_s: float) -> bool:
        """Wait, after ``close``, until no peer maps this rank's memory; False when that takes
        longer. Any thread may call.
        """
        return True


def memory_kind(tensor: torch.Tensor) -> tuple[Literal["DRAM", "VRAM"], int]:
    """Return the kind of a tensor's memory and the index of its device, 0 on a CPU."""
    return ("DRAM", 0) if tensor.device.type == "cpu" else ("VRAM", tensor.get_device())


def bind_device(device: torch.device) -> None:
    """Make the KV cache's CUDA device that of the calling thread: the current device is
    thread-local, and libraries change it.
    """
    if device.type != "cpu":
        torch.cuda.set_device(device)
