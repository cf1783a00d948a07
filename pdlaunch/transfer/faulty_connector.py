"""A connector that injects the faults of a ``FaultPlan`` around any other; see ``faults``."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import Geometry
from pdlaunch.protocol.transfer import TransferCommand
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connector,
    Landing,
    LocalMemory,
    PeerHandle,
    PushHandle,
    PushJob,
    ReadHandle,
    ReadState,
)
from pdlaunch.transfer.faults import Fault, FaultPlan
from pdlaunch.transfer.sides import TransferSetup
from pdlaunch.transfer.thread import TransferThread


@dataclass(slots=True, eq=False)
class _Read:
    fault: Fault | None
    source: random.Random
    start: Callable[[], ReadHandle]
    """Begins the true READ; called again for a duplicate."""
    wait_until_s: float = 0.0
    """Pending until then: before the start of a delayed READ, after that of a lost one."""
    inner: ReadHandle | None = None
    memory: Sequence[torch.Tensor] = ()
    """[num_heads, num_bytes] uint8 of each block that is written."""
    unwritten: torch.Tensor | None = None
    """What the second half of the last block held before."""
    end: ReadState = "pending"


class FaultyConnector(Connector):
    """Passes everything on to ``inner``, but for the faults. Never breaks the contract: after an
    end nothing is written.
    """

    def __init__(
        self, inner: Connector, faults: FaultPlan, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = inner.name
        self.path = inner.path
        self.agent_name = inner.agent_name
        self.pushes = inner.pushes  # type: ignore[misc]
        self._inner = inner
        self._faults = faults
        self._clock = clock
        self._num_reads = 0
        self._num_probes = 0

    def open(self, memory: LocalMemory) -> None:
        self._inner.open(memory)
        layout = memory.layout
        shape = memory.kv_cache.shape[0], layout.num_kv_heads, layout.head_bytes
        self._bytes = memory.kv_cache.view(torch.uint8).view(shape)

    def agent_metadata(self) -> bytes:
        return self._inner.agent_metadata()

    def add_peer(self, agent_name: str, metadata: bytes, geometry: Geometry) -> PeerHandle:
        return self._inner.add_peer(agent_name, metadata, geometry)

    def remove_peer(self, peer: PeerHandle) -> None:
        self._inner.remove_peer(peer)

    def paths(self, peer: PeerHandle) -> Sequence[str]:
        return self._inner.paths(peer)

    def use_path(self, peer: PeerHandle, path: str) -> None:
        self._inner.use_path(peer, path)

    def start_read(self, peer: PeerHandle, read: BlockRead) -> ReadHandle:
        self._num_reads += 1
        fault, source = self._faults.of_read(self.agent_name, self._num_reads)
        heads = slice(read.local_heads.start, read.local_heads.stop)
        memory = [self._bytes[block_id, heads] for block_id in read.local_blocks]
        faulty = _Read(fault, source, lambda: self._inner.start_read(peer, read), memory=memory)
        self._begin(faulty)
        return cast(ReadHandle, faulty)

    def start_scratch_read(self, peer: PeerHandle, path: str) -> tuple[ReadHandle, torch.Tensor]:
        self._num_probes += 1
        fault, source = self._faults.of_probe(self.agent_name, self._num_probes)
        if fault is Fault.REFUSE:
            raise TransferError("injected: the READ was refused")
        inner, landing = self._inner.start_scratch_read(peer, path)
        faulty = _Read(fault, source, lambda: inner, inner=inner, memory=[landing.view(1, -1)])
        return cast(ReadHandle, faulty), landing

    def poll(self, handle: ReadHandle) -> ReadState:
        read = cast(_Read, handle)
        if read.end == "pending":
            read.end = self._advance(read)
        return read.end

    def landings(self, handle: ReadHandle) -> Sequence[Landing]:
        """None of a READ with a fault: its bytes may change up to its end."""
        read = cast(_Read, handle)
        return (
            () if read.fault is not None or read.inner is None else self._inner.landings(read.inner)
        )

    def read_s(self, handle: ReadHandle) -> float:
        return self._inner.read_s(self._true_read(handle))

    def release(self, handle: ReadHandle) -> None:
        read = cast(_Read, handle)
        if read.inner is not None:
            self._inner.release(read.inner)

    def push_target(self, handle: ReadHandle) -> bytes:
        return self._inner.push_target(self._true_read(handle))

    def start_push(self, job: PushJob) -> PushHandle:
        return self._inner.start_push(job)

    def poll_push(self, handle: PushHandle) -> str | None:
        return self._inner.poll_push(handle)

    def end_read(self, handle: ReadHandle, *, error: str) -> None:
        self._inner.end_read(self._true_read(handle), error=error)

    def close(self) -> None:
        self._inner.close()
        del self._bytes

    def wait_unmapped(self, timeout_s: float) -> bool:
        return self._inner.wait_unmapped(timeout_s)

    @staticmethod
    def _true_read(handle: ReadHandle) -> ReadHandle:
        inner = cast(_Read, handle).inner
        assert (
            inner is not None
        )  # the READ of a scratch, or where the holder writes: held back or repeated is none of them
        return inner

    def _begin(self, read: _Read) -> None:
        match read.fault:
            case Fault.REFUSE:
                raise TransferError("injected: the READ was refused")
            case Fault.DELAY:
                read.wait_until_s = self._clock() + read.source.uniform(0, self._faults.slow_s)
                if not self.pushes:
                    return
            case Fault.LOSE:
                read.wait_until_s = self._clock() + read.source.uniform(0, self._faults.lost_s)
            case Fault.TRUNCATE:
                read.unwritten = _second_half(read.memory[-1]).clone()
                _await_device(read.unwritten)
            case _:
                pass
        read.inner = read.start()

    def _advance(self, read: _Read) -> ReadState:
        if self._clock() < read.wait_until_s:
            return "pending"
        if read.inner is None:
            try:
                read.inner = read.start()
            except TransferError:
                return "failed"
        state = self._inner.poll(read.inner)
        return self._finish(read) if state == "done" else state

    def _finish(self, read: _Read) -> ReadState:
        """What the end of a true READ looks like."""
        match read.fault:
            case Fault.FAIL:
                return "failed"
            case Fault.CORRUPT:
                _corrupt(read.memory, read.source)
                _await_device(read.memory[0])
            case Fault.TRUNCATE if read.unwritten is not None:
                _second_half(read.memory[-1]).copy_(read.unwritten)
                _await_device(read.memory[0])
            case Fault.DUPLICATE if not self.pushes:
                return self._repeat(read)
            case _:
                pass
        return "done"

    def _repeat(self, read: _Read) -> ReadState:
        assert read.inner is not None
        read.fault = None
        self._inner.release(read.inner)
        read.inner = None
        return self._advance(read)


class FaultyTransferThread(TransferThread):
    """A ``TransferThread`` whose connector and leases follow a fault plan."""

    def __init__(self, setup: TransferSetup, faults: FaultPlan) -> None:
        self._faults = faults
        self._agent_name = setup.connector.agent_name
        super().__init__(replace(setup, connector=FaultyConnector(setup.connector, faults)))

    def submit(self, commands: Sequence[TransferCommand]) -> None:
        super().submit(self._faults.on_commands(self._agent_name, commands))


def _await_device(memory: torch.Tensor) -> None:
    """The fault is there before anybody hears of the READ's end: checksums are computed on another
    stream.
    """
    if memory.is_cuda:
        torch.cuda.current_stream(memory.device).synchronize()


def _second_half(block: torch.Tensor) -> torch.Tensor:
    return block[:, block.shape[1] // 2 :]


def _corrupt(memory: Sequence[torch.Tensor], source: random.Random) -> None:
    block = source.choice(memory)
    row, column = source.randrange(block.shape[0]), source.randrange(block.shape[1])
    block[row, column] ^= source.randrange(1, 256)
