"""Is the base of connectors whose prefill side writes: a pool of sender threads, and READs that
wait to hear of the end.

::

    decode side:    read ── Push over the side channel ──▶ pending ── end ──▶ done, or failed
                                                                              (nothing can land now)
    prefill side:   push ── a thread of the pool writes ──▶ its future ends
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connector,
    LocalMemory,
    PeerAgent,
    PushedRead,
    PushJob,
    ReadState,
    bind_device,
)


@dataclass(slots=True, eq=False)
class PendingRead(PushedRead):
    """Waits on the decode side for what the prefill side writes."""

    target: bytes
    settle: Callable[[PendingRead], ReadState]
    """Returns the state of the READ once ``error`` is known; never raises."""
    blocks: BlockRead | None  # none for a READ of the peer's scratch
    landing: torch.Tensor | None = None  # memory of a scratch READ
    release: Callable[[], None] = lambda: None
    state: ReadState = "pending"
    error: str | None = None  # the outcome of the prefill side's write; None until that is known
    began_at: float = field(default_factory=time.perf_counter)
    ended_at: float = 0.0

    def poll(self) -> ReadState:
        if self.state == "pending" and self.error is not None:
            self.state = self.settle(self)
            self.ended_at = time.perf_counter()
        return self.state

    def seconds(self) -> float:
        return self.ended_at - self.began_at

    def end(self, error: str) -> None:
        self.error = error


class PushingConnector(Connector):
    """Is the base of connectors whose prefill side writes. ``open`` binds this thread, and each of
    the pool once, to the KV cache's device.
    """

    pushes = True

    def __init__(self, name: str, incarnation: int, *, num_sender_threads: int) -> None:
        """``name`` is the rank's, ``prefill-0/rank-0``."""
        self.agent_name = f"{name}#{incarnation}"
        self._num_sender_threads = num_sender_threads

    def open(self, memory: LocalMemory) -> None:
        self.memory = memory
        bind_device(memory.kv_cache.device)
        self._start(memory)
        # Once more: what was just built may have changed this thread's device (Mooncake does), and
        # NVLink transfers of ranks other than 0 would fail.
        bind_device(memory.kv_cache.device)
        self._senders = ThreadPoolExecutor(
            self._num_sender_threads, "kv-sender", bind_device, (memory.kv_cache.device,)
        )

    def push(self, job: PushJob) -> Future[None]:
        return self._senders.submit(self._write, self.memory, job)

    def close(self) -> None:
        # Without waiting: a rank falls asleep only when no write is under way, and one that ends
        # leaves the process.
        self._senders.shutdown(wait=False, cancel_futures=True)
        self._stop()
        del self.memory

    @abstractmethod
    def _start(self, memory: LocalMemory) -> None:
        """Build what moves the bytes; may change this thread's CUDA device. Raises
        TransferError.
        """

    @abstractmethod
    def _stop(self) -> None:
        """Let go of it. Never raises."""

    @abstractmethod
    def _write(self, memory: LocalMemory, job: PushJob) -> None:
        """Write from this rank's memory, in a thread of the pool; return when all bytes have
        landed. Raises TransferError.
        """

    def new_landing(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self.memory.kv_cache.device)


def parse_agent_metadata(peer: PeerAgent) -> str:
    """Return metadata that is a short line of ASCII. Raises TransferError when it is not."""
    metadata = peer.metadata
    if not 0 < len(metadata) <= 256 or not metadata.isascii():
        raise TransferError(f"the metadata of agent {peer.name} cannot be read: {metadata[:64]!r}")
    return metadata.decode()
