"""Passes everything on to another connector, but for the faults of a ``FaultPlan``."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import HandshakeReply
from pdlaunch.protocol.transfer import TransferCommand
from pdlaunch.transfer.connectors import connector as interface
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    Read,
    ReadState,
)
from pdlaunch.transfer.connectors.faults import Fault, FaultPlan
from pdlaunch.transfer.regions import BlockIds
from pdlaunch.transfer.sides import TransferSetup
from pdlaunch.transfer.thread import TransferThread

_WAIT_S = 0.02  # time between two looks at whether ends may be seen again


class FaultyConnector(Connector):
    """Injects faults around a connector and never breaks the contract: after the end of a READ
    nothing is written.

    No fault touches what is pushed to peers, and who maps the memory.
    """

    def __init__(
        self, inner: Connector, faults: FaultPlan, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = inner.name
        self.path = inner.path
        self.agent_name = inner.agent_name
        self.pushes = inner.pushes
        self.faults = faults
        self.clock = clock
        self.num_reads = 0
        self.num_probes = 0
        self._inner = inner

    def agent_metadata(self) -> bytes:
        return self._inner.agent_metadata()

    def push(self, target: bytes, blocks: BlockIds, heads: range) -> Future[None]:
        return self._inner.push(target, blocks, heads)

    def wait_unmapped(self, timeout_s: float) -> bool:
        return self._inner.wait_unmapped(timeout_s)

    def open(self, memory: LocalMemory) -> None:
        self._inner.open(memory)
        self.kv = memory.kv

    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection | TransferError]:
        return {
            path: each if isinstance(each, TransferError) else FaultyConnection(self, each)
            for path, each in self._inner.connect(peer).items()
        }

    def close(self) -> None:
        self._inner.close()
        del self.kv


class FaultyConnection(Connection):
    def __init__(self, connector: FaultyConnector, inner: Connection) -> None:
        self._connector = connector
        self._inner = inner

    def close(self) -> None:
        self._inner.close()

    def read(self, blocks: BlockRead) -> Read:
        owner = self._connector
        owner.num_reads += 1
        fault = owner.faults.of_read(owner.agent_name, owner.num_reads)
        memory = list(owner.kv.views(blocks.local_blocks, blocks.local_heads))
        return FaultyRead(owner, fault, memory, partial(self._inner.read, blocks))

    def read_scratch(self, landing: torch.Tensor, piece_bytes: int) -> Read:
        owner = self._connector
        owner.num_probes += 1
        fault = owner.faults.of_probe(owner.agent_name, owner.num_probes)
        start = partial(self._inner.read_scratch, landing, piece_bytes)
        return FaultyRead(owner, fault, [landing.view(1, -1)], start)


class FaultyRead(Read):
    def __init__(
        self,
        owner: FaultyConnector,
        fault: tuple[Fault | None, random.Random],
        memory: Sequence[torch.Tensor],
        start: Callable[[], Read],
    ) -> None:
        """``memory`` is [num_heads, num_bytes] uint8 of each piece that is written; ``start``
        begins the true READ. Raises TransferError.
        """
        self._fault, self._source = fault
        self._memory = memory
        self._start = start
        self._clock = owner.clock
        self._inner: Read | None = None
        self._end: ReadState = "pending"
        if self._fault is Fault.REFUSE:
            raise TransferError("injected: the READ was refused")
        longest_s = {Fault.DELAY: owner.faults.slow_s, Fault.LOSE: owner.faults.lost_s}
        late_s = longest_s.get(self._fault, 0.0) if self._fault is not None else 0.0
        # Pending until then: before the start of a delayed READ, after that of a lost one.
        self._wait_until = owner.clock() + self._source.uniform(0, late_s)
        # A peer that writes is asked at once: its READ cannot be held back.
        if self._fault is not Fault.DELAY or owner.pushes:
            self._inner = start()

    @property
    def target(self) -> bytes | None:  # type: ignore[override]
        return None if self._inner is None else self._inner.target

    def end(self, error: str) -> None:
        if self._inner is not None:
            self._inner.end(error)

    def poll(self) -> ReadState:
        if self._end == "pending" and self._clock() >= self._wait_until:
            self._end = self._advance()
        return self._end

    def seconds(self) -> float:
        return 0.0 if self._inner is None else self._inner.seconds()

    def release(self) -> None:
        if self._inner is not None:
            self._inner.release()

    def _advance(self) -> ReadState:
        if self._inner is None:
            try:
                self._inner = self._start()
            except TransferError:
                return "failed"
        state = self._inner.poll()
        if state == "done" and self._fault is Fault.FAIL:
            return "failed"
        if state == "done" and self._fault is Fault.CORRUPT:
            block = self._source.choice(self._memory)
            row, column = (self._source.randrange(size) for size in block.shape)
            block[row, column] ^= self._source.randrange(1, 256)
            if block.is_cuda:
                # Checksums are computed on another stream: the fault must be there before.
                torch.cuda.current_stream(block.device).synchronize()
        return state


class FaultyTransferThread(TransferThread):
    def __init__(self, faults: FaultPlan, setup: TransferSetup) -> None:
        self._faults = faults
        self._agent_name = setup.connector.agent_name
        super().__init__(setup)

    def submit(self, commands: Sequence[TransferCommand]) -> None:
        super().submit([self._faults.on_command(self._agent_name, each) for each in commands])


class FaultyOffloadWorker(OffloadWorker):
    """Changes a byte of some chunks once their checksums are taken, and reports no end of a copy
    while the plan says so.
    """

    def __init__(self, faults: FaultPlan, **setup: Any) -> None:
        super().__init__(**setup)
        self._faults = faults
        self._stores: dict[int, OffloadJob] = {}
        self._held_back: list[JobFinished] = []
        self._num_chunks_stored = 0

    def submit(self, jobs: Sequence[OffloadJob]) -> None:
        self._stores |= {job.job_id: job for job in jobs if job.direction == "store"}
        super().submit(jobs)

    def take_finished(self) -> list[JobFinished]:
        for report in super().take_finished():
            self._spoil_chunks(report)
            self._held_back.append(report)
        if self._held_back and self._faults.copies_wait():
            timer = threading.Timer(_WAIT_S, self._wake)
            timer.daemon = True
            timer.start()
            return []
        finished, self._held_back = self._held_back, []
        return finished

    def _spoil_chunks(self, report: JobFinished) -> None:
        job = self._stores.pop(report.job_id, None)
        for host_id in job.host_ids if job is not None and report.ok else ():
            self._num_chunks_stored += 1
            source = self._faults.of_chunk(self._num_chunks_stored)
            if source is not None:
                block = self.host.block(host_id)
                block[source.randrange(len(block))] ^= source.randrange(1, 256)


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> FaultyConnector:
    """Make the connector of a rank around the one that ``kv_transfer.faulty.inner`` names."""
    plan = settings.section("faulty")
    assert isinstance(plan, FaultPlan)
    inner = settings.model_copy(update={"connector": plan.inner})
    return FaultyConnector(interface.new_connector(inner, name, incarnation), plan)
