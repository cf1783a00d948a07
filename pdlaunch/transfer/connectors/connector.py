"""Interfaces of a connector, which copies KV blocks between ranks.

::

    open(memory) ── connect(peer) ──▶ Connection ── read(blocks) ──▶ Read ── poll .. release
      ▲    │                              └─ close, once its READs have ended
      └────┴─ close

Only the thread of ``TransferThread`` uses a connector, its connections and its READs. A READ copies
whole blocks, or heads of blocks, from a peer into local blocks. Connectors know nothing of
requests, leases or proofs.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
    """Holds the memory of a rank that its peers may read."""

    kv: KVRegions  # outlives the connector
    # [num_bytes] uint8, filled with a pattern before ``open``. Peers read it to prove a path.
    scratch: torch.Tensor
    # Allocates the KV cache and the scratch.
    source: KVMemory = field(default_factory=PrivateKVMemory)


@dataclass(frozen=True, slots=True)
class BlockRead:
    """Describes what a READ copies: heads ``remote_heads`` of block ``remote_blocks[g][i]`` to
    heads ``local_heads`` of block ``local_blocks[g][i]``. Heads are indices within their rank.
    """

    # For each KV cache group g, block ids: row numbers in the group's regions.
    local_blocks: BlockIds
    remote_blocks: BlockIds
    local_heads: range
    remote_heads: range
    # ``<digest of the prompt>/<digest of the reader>``: a file name for connectors that use files.
    label: str = ""


class Read(ABC):
    """A READ that has been started and not yet released."""

    # Where the peer's connector must write; None if this side copies the bytes.
    target: bytes | None = None

    @abstractmethod
    def poll(self) -> ReadState:
        """Return the READ's state. A READ that is done or failed does not write any more."""

    @abstractmethod
    def seconds(self) -> float:
        """Return how long a READ that is done took."""

    def end(self, error: str) -> None:  # noqa: B027 - only where the peer writes
        """Record that the peer has ended its write or has died. ``error`` is empty if all bytes
        have landed. Afterwards, ``poll`` returns done or failed once no more bytes can land.
        """

    def release(self) -> None:  # noqa: B027 - most READs hold nothing
        """Free a READ that is done or failed. Never raises."""


class Connection(ABC):
    """One path to one peer's memory."""

    @abstractmethod
    def read(self, blocks: BlockRead) -> Read:
        """Start to read at least one block and head. Until ``poll`` returns done or failed, it may
        write to the local blocks. This call may block while bytes are copied, but must not wait for
        an answer of the peer: this thread also answers that peer's questions, so two ranks would
        wait for each other for good. Raises TransferError.
        """

    @abstractmethod
    def read_scratch(self, landing: torch.Tensor, piece_bytes: int) -> Read:
        """Start to read the beginning of the peer's scratch into ``landing``, [num_bytes] uint8,
        which the caller keeps until the READ has ended. Raises TransferError. A connector that
        copies pieces reads pieces of ``piece_bytes``, the last first: then it cannot merge
        neighbours, so the speed is that of a READ of scattered blocks.
        """

    def named(self, path: str) -> str:
        """Return the path's name for messages, after the first READ over this connection."""
        return path

    def close(self) -> None:  # noqa: B027 - some keep nothing
        """Disconnect. All READs have ended and are released. Never raises."""


class Connector(ABC):
    """Moves KV blocks. It may be opened again after ``close``."""

    name: str  # the name in the settings; both ranks of a pair must have the same
    path: str  # the transport's name for messages: ``nixl/UCX``
    # Unique over ranks and incarnations. The pattern of the scratch is derived from it, so peers
    # notice if they read the memory of an earlier incarnation.
    agent_name: str
    # True: the prefill side writes to the decode side by ``push``, and READs have a ``target``.
    pushes: bool = False

    @abstractmethod
    def open(self, memory: LocalMemory) -> None:
        """Register the memory and keep it alive until ``close``. Raises TransferError."""

    @abstractmethod
    def agent_metadata(self) -> bytes:
        """Return the bytes that a peer needs to connect. They stay the same until ``close``."""

    @abstractmethod
    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection | TransferError]:
        """Prepare READs from a peer. Return the paths to it, the preferred path first, each with a
        connection or an error; the handshake tries all and uses one. The caller closes all
        together. Raises TransferError.
        """

    def push(self, target: bytes, blocks: BlockIds, heads: range) -> Future[None]:
        """Begin to write ``heads`` of ``blocks``, or the scratch if ``blocks`` is empty, to
        ``target``, the ``Read.target`` of a peer. Never waits. A write cannot be cancelled. The
        future ends when all bytes have landed, or raises the reason why not.
        """
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Deregister the memory and release everything. READs may be pending only if the process
        is about to exit: before a rank sleeps, it waits for all READs.
        """

    def wait_unmapped(self, timeout_s: float) -> bool:
        """After ``close``, wait until no peer maps this memory; False after ``timeout_s``."""
        return True


class NoConnector(Connector):
    """The connector of a rank that does not transfer KV blocks."""

    name = path = "none"

    def __init__(self, rank_name: str) -> None:
        self.agent_name = rank_name

    def open(self, memory: LocalMemory) -> None:
        pass

    def agent_metadata(self) -> bytes:
        return b""

    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection | TransferError]:
        raise TransferError(f"{self.agent_name} has no connector, so it cannot pull KV blocks")

    def close(self) -> None:
        pass


@dataclass(slots=True, eq=False)
class PendingRead(Read):
    # Takes the error of the ended write and returns the READ's state. Never raises.
    settle: Callable[[str], ReadState]
    target: bytes
    on_release: Callable[[], object] = lambda: None
    state: ReadState = "pending"
    error: str | None = None  # of the prefill side's write; empty: success, None: not ended
    began_at: float = field(default_factory=time.perf_counter)
    ended_at: float = 0.0

    def poll(self) -> ReadState:
        if self.state == "pending" and self.error is not None:
            self.state = self.settle(self.error)
            self.ended_at = time.perf_counter()
        return self.state

    def seconds(self) -> float:
        return self.ended_at - self.began_at

    def end(self, error: str) -> None:
        self.error = error

    def release(self) -> None:
        self.on_release()


class PushingConnector(Connector):
    """Base of connectors whose prefill side writes. ``open`` makes the KV cache's device the
    current device of this thread and of the pool's threads.

    ::

        decode side:   read ── Push over the side channel ──▶ pending ── end ──▶ done, or failed
                                                                       (no more bytes can land)
        prefill side:  push ── a thread of the pool writes ──▶ its future ends
    """

    pushes = True

    def __init__(self, name: str, incarnation: int, num_sender_threads: int) -> None:
        self.agent_name = f"{name}#{incarnation}"
        self._num_sender_threads = num_sender_threads

    def open(self, memory: LocalMemory) -> None:
        self.memory = memory
        bind_device(memory.scratch.device)
        self._start(memory)
        # Again, because ``_start`` may have changed this thread's device, as Mooncake does. NVLink
        # transfers of ranks other than 0 would fail.
        bind_device(memory.scratch.device)
        self._senders = ThreadPoolExecutor(
            self._num_sender_threads, "kv-sender", bind_device, (memory.scratch.device,)
        )

    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection]:
        return {self.path: _PushingConnection(self, peer)}

    def push(self, target: bytes, blocks: BlockIds, heads: range) -> Future[None]:
        return self._senders.submit(self._write, self.memory, target, blocks, heads)

    def close(self) -> None:
        # No need to wait: no write is under way when a rank goes to sleep, and a rank that closes
        # for good exits its process.
        self._senders.shutdown(wait=False, cancel_futures=True)
        self._stop()
        del self.memory

    @abstractmethod
    def expect(self, peer: HandshakeReply, blocks: BlockRead) -> PendingRead:
        """Begin a READ; the caller asks ``peer`` to write it. Raises TransferError."""

    @abstractmethod
    def expect_scratch(self, peer: HandshakeReply, landing: torch.Tensor) -> PendingRead:
        """Begin a READ of the beginning of the peer's scratch. Raises TransferError."""

    @abstractmethod
    def _start(self, memory: LocalMemory) -> None:
        """Start the library. May change the current CUDA device. Raises TransferError."""

    def _stop(self) -> None:
        """Undo ``_start``. Never raises."""

    @abstractmethod
    def _write(self, memory: LocalMemory, target: bytes, blocks: BlockIds, heads: range) -> None:
        """Write to ``target``, in a thread of the pool. Returns when done. Raises TransferError."""


@dataclass(frozen=True, slots=True)
class _PushingConnection(Connection):
    connector: PushingConnector
    peer: HandshakeReply

    def read(self, blocks: BlockRead) -> Read:
        return self.connector.expect(self.peer, blocks)

    def read_scratch(self, landing: torch.Tensor, piece_bytes: int) -> Read:
        return self.connector.expect_scratch(self.peer, landing)


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> Connector:
    """Make the connector of a rank; other connectors are not imported. Raises ConfigError."""
    what = f"connector {settings.connector}"
    factory = load_named(connector_settings(settings.connector).factory, what)
    connector = factory(settings, name, incarnation)
    if not isinstance(connector, Connector):
        raise ConfigError(f"{what}: {type(connector).__name__} is not a Connector")
    return connector


def pieces_to_read(
    memory: LocalMemory, peer: HandshakeReply, blocks: BlockRead
) -> tuple[Pieces, Pieces]:
    """Return the pieces of memory to write here, and those to read from the peer."""
    groups, geometry = memory.kv.groups, peer.geometry
    # vLLM allocates freed blocks last first. Once sorted, neighbours merge: a READ of 4,096 tokens
    # over NIXL (vLLM on two H200s) takes a few ms instead of 60.
    both = zip(blocks.remote_blocks, blocks.local_blocks, strict=True)
    pairs = [sorted(zip(*group, strict=True)) for group in both]
    theirs, ours = ([[pair[side] for pair in group] for group in pairs] for side in (0, 1))
    here = pieces_of(memory.kv.places, groups, ours, blocks.local_heads)
    return here, pieces_of(geometry.regions, groups, theirs, blocks.remote_heads)


def pieces_of_scratch(
    landing: torch.Tensor, peer: HandshakeReply, piece_bytes: int
) -> tuple[Pieces, Pieces]:
    """Return the pieces of a scratch READ: here, and at the peer."""
    return (
        even_pieces(landing.data_ptr(), landing.numel(), piece_bytes),
        even_pieces(peer.geometry.scratch_address, landing.numel(), piece_bytes),
    )


def bind_device(device: torch.device) -> None:
    """Set this thread's CUDA device to the KV cache's: libraries may have changed it."""
    if device.type != "cpu":
        torch.cuda.set_device(device)


def memory_kind(tensor: torch.Tensor) -> tuple[Literal["DRAM", "VRAM"], int]:
    """Return the kind of a tensor's memory and its device index, 0 on a CPU."""
    return ("DRAM", 0) if tensor.device.type == "cpu" else ("VRAM", tensor.get_device())


def decode_metadata(peer: HandshakeReply, kind: type[T]) -> T:
    """Decode a peer's metadata from msgpack. Raises TransferError."""
    try:
        return msgspec.msgpack.decode(peer.agent_metadata, type=kind)
    except msgspec.MsgspecError as error:
        raise TransferError(
            f"the metadata of agent {peer.agent_name} cannot be read: {error}"
        ) from None
