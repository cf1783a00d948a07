"""Base of connectors whose prefill side writes: a pool of sender threads, and READs that wait until
the prefill side reports the end of its write.

::

    decode side:    read ── Push over the side channel ──▶ pending ── end ──▶ done, or failed
                                                                        (no more bytes can land)
    prefill side:   push ── a thread of the pool writes ──▶ its future ends
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from pdlaunch.protocol.side_channel import HandshakeReply
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    Read,
    ReadState,
    bind_device,
)
from pdlaunch.transfer.regions import BlockIds


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
    """

    pushes = True

    def __init__(self, name: str, incarnation: int, num_sender_threads: int) -> None:
        """``name``: of the rank, ``prefill-0/rank-0``."""
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

    @abstractmethod
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
