"""What connectors that write to their readers share: a pool of sender threads at the holder, READs
that wait for an answer.

::

    reader:   start_read ── asked over the side channel ──▶ pending ── end_read ──▶ done, or failed once nothing can land any more
    holder:   start_push ── a thread of the pool writes ──▶ poll_push: "" or why it failed
"""

from __future__ import annotations

import time
from abc import abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

import torch

from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connector,
    LocalMemory,
    PushHandle,
    PushJob,
    ReadHandle,
    ReadState,
)
from pdlaunch.transfer.connectors.device_binding import DeviceBinding


@dataclass(slots=True, eq=False)
class PendingRead:
    """A READ at its reader."""

    target: bytes
    read: BlockRead | None
    """None: of the peer's scratch."""
    landing: torch.Tensor | None = None
    """Memory of a scratch READ."""
    state: ReadState = "pending"
    error: str | None = None
    """Of the holder's write, once it has ended; may still be waited for."""
    begun_s: float = field(default_factory=time.perf_counter)
    ended_s: float = 0.0


class PushingConnector(Connector):
    """Base of connectors whose holder writes. ``open`` binds this thread, and each of the pool
    once, to the KV cache's device.
    """

    pushes = True

    def __init__(
        self, name: str, incarnation: int, *, num_sender_threads: int, binding: DeviceBinding
    ) -> None:
        """``name``: of the rank, ``prefill-0/rank-0``."""
        self.agent_name = f"{name}#{incarnation}"
        self._num_sender_threads = num_sender_threads
        self._binding = binding

    def open(self, memory: LocalMemory) -> None:
        self._memory = memory
        self._binding.capture(memory.kv_cache)
        self._binding.bind()
        self._start(memory)
        self._binding.bind()
        self._senders = ThreadPoolExecutor(
            self._num_sender_threads, "kv-sender", initializer=self._binding.bind
        )

    def push_target(self, handle: ReadHandle) -> bytes:
        return cast(PendingRead, handle).target

    def start_push(self, job: PushJob) -> PushHandle:
        return cast(PushHandle, self._senders.submit(self._write, self._memory, job))

    def poll_push(self, handle: PushHandle) -> str | None:
        future = cast("Future[None]", handle)
        if not future.done():
            return None
        error = future.exception()
        return "" if error is None else f"{self.agent_name}: {error}"

    def end_read(self, handle: ReadHandle, *, error: str) -> None:
        cast(PendingRead, handle).error = error

    def poll(self, handle: ReadHandle) -> ReadState:
        read = cast(PendingRead, handle)
        if read.state == "pending" and read.error is not None:
            read.state = self._settle(read)
            read.ended_s = time.perf_counter()
        return read.state

    def read_s(self, handle: ReadHandle) -> float:
        read = cast(PendingRead, handle)
        return read.ended_s - read.begun_s

    def close(self) -> None:
        self._senders.shutdown(wait=False, cancel_futures=True)
        self._stop()
        del self._memory

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
        """Write from this rank's memory, in a thread of the pool; returns when all bytes have
        landed. Raises TransferError.
        """

    @abstractmethod
    def _settle(self, read: PendingRead) -> ReadState:
        """The holder's write has ended with ``read.error``: what is the READ now?"""

    def _new_landing(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self._memory.kv_cache.device)


def parse_agent_metadata(agent_name: str, metadata: bytes) -> str:
    """Metadata that is a short line of ASCII. Raises TransferError."""
    if not 0 < len(metadata) <= 256 or not metadata.isascii():
        raise TransferError(f"the metadata of agent {agent_name} cannot be read: {metadata[:64]!r}")
    return metadata.decode()
