"""The interface of a connector: what moves the bytes of KV blocks between ranks.

A connector is used by one thread only, that of the ``TransferThread``. It reads whole blocks, or
heads of blocks, of a peer into local blocks, and it knows nothing of requests, leases or proofs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NewType

import torch

from pdlaunch.kvcache.groups import KVCacheLayout
from pdlaunch.memory.kv_memory import KVMemory, PrivateKVMemory
from pdlaunch.protocol.ids import LeaseId, ReaderId
from pdlaunch.protocol.side_channel import Geometry

PeerHandle = NewType("PeerHandle", object)
"""A peer's agent, its memory and connections, as the connector knows them."""
ReadHandle = NewType("ReadHandle", object)
"""A READ that was started and not yet released."""
PushHandle = NewType("PushHandle", object)
"""A write of the holder, for the READ of a peer."""

ReadState = Literal["pending", "done", "failed"]
Landing = tuple[int, torch.cuda.Event]
"""After the event the READ's blocks before this number are there."""


@dataclass(frozen=True, slots=True)
class LocalMemory:
    """What a rank lets others read."""

    kv_cache: torch.Tensor
    """[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous; outlives the
    connector.
    """
    scratch: torch.Tensor
    """[num_bytes] uint8; a known pattern that peers read to prove the path."""
    layout: KVCacheLayout
    source: KVMemory = field(default_factory=PrivateKVMemory)
    """What KV cache and scratch were allocated from."""


@dataclass(frozen=True, slots=True)
class BlockRead:
    """Which bytes go where: heads ``remote_heads`` of ``remote_blocks[i]`` to heads ``local_heads``
    of ``local_blocks[i]``.
    """

    local_blocks: Sequence[int]
    remote_blocks: Sequence[int]
    """As many as local blocks."""
    local_heads: range
    """Index within the rank."""
    remote_heads: range
    """Index within the peer's rank; as many as local heads."""
    lease_id: LeaseId = field(default=LeaseId(""))
    reader: ReaderId = field(default=ReaderId(""))
    """Under whose lease, as in the PullBegin: a holder that writes checks it."""
    digest: str = ""
    """Hexadecimal; names the prompt by its content."""
    memo: dict[PeerHandle, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a connector has worked out ahead of the READ; of a peer that was removed it is worth
    nothing.
    """


@dataclass(frozen=True, slots=True)
class PushJob:
    """What a holder writes for a peer's READ: ``heads`` of ``blocks``, or its scratch when there
    are no blocks.
    """

    target: bytes
    """What the peer's connector has stated."""
    blocks: Sequence[int]
    heads: range
    """Index within this rank."""


class Connector(ABC):
    """Moves KV blocks. Life: ``open``, then peers and READs come and go, then ``close``; then
    perhaps ``open`` again.
    """

    name: str
    """As in the config."""
    path: str
    """What carries the bytes, for people: ``nixl/UCX``; see ``paths``."""
    agent_name: str
    """Unique over ranks and incarnations."""
    pushes: ClassVar[bool] = False
    """The holder writes: ``start_read`` only gets ready, and the holder is asked over the side
    channel, with ``push_target``.
    """

    @abstractmethod
    def open(self, memory: LocalMemory) -> None:
        """Register the memory, once, and keep it alive until ``close``. Raises TransferError."""

    @abstractmethod
    def agent_metadata(self) -> bytes:
        """What a peer needs for ``add_peer``; the same until ``close``."""

    @abstractmethod
    def add_peer(self, agent_name: str, metadata: bytes, geometry: Geometry) -> PeerHandle:
        """Get ready to read from a peer. Raises TransferError."""

    @abstractmethod
    def remove_peer(self, peer: PeerHandle) -> None:
        """Forget a peer and its connections; its READs have ended and are released. Never
        raises.
        """

    def paths(self, peer: PeerHandle) -> Sequence[str]:
        """The ways to read this peer, the preferred one first; each is tried with a READ of the
        scratch.
        """
        return (self.path,)

    def use_path(self, peer: PeerHandle, path: str) -> None:
        """From now on ``start_read`` goes this way; the others may be let go."""
        assert path == self.path

    def prepare_read(self, peer: PeerHandle, read: BlockRead) -> None:
        """This READ is likely to be started soon: what can be done for it now will not delay it
        then. Raises TransferError.
        """
        return

    @abstractmethod
    def start_read(self, peer: PeerHandle, read: BlockRead) -> ReadHandle:
        """Start to read at least one block and head; may block while the bytes are copied. Raises
        TransferError.

        From here until ``poll`` says done or failed the READ may write to the local blocks,
        whatever else happens.
        """

    @abstractmethod
    def start_scratch_read(self, peer: PeerHandle, path: str) -> tuple[ReadHandle, torch.Tensor]:
        """Start to read the peer's scratch into fresh memory, which lives as long as the READ.
        Raises TransferError.

        In pieces of about the size of a block, where a piece has a cost of its own.
        """

    @abstractmethod
    def poll(self, handle: ReadHandle) -> ReadState:
        """Where a READ stands. After done or failed it writes no more."""

    def landings(self, handle: ReadHandle) -> Sequence[Landing]:
        """Of a READ of blocks that is pending: when its parts are there for good, in their order,
        where the device can tell.
        """
        return ()

    @abstractmethod
    def read_s(self, handle: ReadHandle) -> float:
        """Seconds from the post of a READ that is done to its end, as exactly as this connector
        knows them.
        """

    @abstractmethod
    def release(self, handle: ReadHandle) -> None:
        """Free a READ that is done or failed. Never raises."""

    def push_target(self, handle: ReadHandle) -> bytes:
        """Where the holder shall write. Only of a connector that pushes, as all methods down to
        ``end_read``.
        """
        raise NotImplementedError

    def start_push(self, job: PushJob) -> PushHandle:
        """At the holder: begin to write; never waits. A write that has begun cannot be taken
        back.
        """
        raise NotImplementedError

    def poll_push(self, handle: PushHandle) -> str | None:
        """At the holder: None while the write is pending, then "" or why it failed. Done: all bytes
        have landed.
        """
        raise NotImplementedError

    def end_read(self, handle: ReadHandle, *, error: str) -> None:
        """At the reader: the holder has ended its write, ``error`` is empty when all bytes have
        landed, or its process has died.

        ``poll`` then says done or failed as soon as nothing can land any more.
        """
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Deregister and let go of everything. READs that are pending are abandoned: the process is
        about to exit.
        """

    def wait_unmapped(self, timeout_s: float) -> bool:
        """After ``close``: wait until no peer maps this rank's memory; False when that takes
        longer. Any thread may call.
        """
        return True


def memory_kind(tensor: torch.Tensor) -> tuple[Literal["DRAM", "VRAM"], int]:
    """Kind of a tensor's memory and index of its device, 0 on a CPU."""
    return ("DRAM", 0) if tensor.device.type == "cpu" else ("VRAM", tensor.get_device())
