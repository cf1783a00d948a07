"""Passes everything on to another connector, but for the faults of a ``FaultPlan``."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.errors import TransferError
from pdlaunch.protocol.transfer import TransferCommand
from pdlaunch.transfer.connectors import opening
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    PeerAgent,
    PushedRead,
    PushJob,
    Read,
    ReadPart,
    ReadState,
)
from pdlaunch.transfer.connectors.faults import Fault, FaultPlan
from pdlaunch.transfer.sides import TransferSetup
from pdlaunch.transfer.thread import TransferThread

_TIMER_SLACK_S = 0.001  # added to a timer: a wake before the report is due would be in vain
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
        self._inner = inner
        self.num_reads = 0
        self.num_probes = 0

    def push(self, job: PushJob) -> Future[None]:
        return self._inner.push(job)

    def wait_unmapped(self, timeout_s: float) -> bool:
        return self._inner.wait_unmapped(timeout_s)

    def open(self, memory: LocalMemory) -> None:
        self._inner.open(memory)
        layout = memory.layout
        shape = memory.kv_cache.shape[0], layout.num_kv_heads, layout.head_bytes
        self.memory = memory.kv_cache.view(torch.uint8).view(shape)

    def agent_metadata(self) -> bytes:
        return self._inner.agent_metadata()

    def connect(self, peer: PeerAgent) -> Connection:
        return FaultyConnection(self, self._inner.connect(peer))

    def close(self) -> None:
        self._inner.close()
        del self.memory

    def begin(
        self,
        fault: Fault | None,
        source: random.Random,
        memory: Sequence[torch.Tensor],
        start: Callable[[], Read],
    ) -> Read:
        """Start a READ with its fault; see ``FaultyRead``."""
        kind = FaultyPushedRead if self.pushes else FaultyRead
        return kind(fault, source, memory, start, self.faults, self.clock)


class FaultyConnection(Connection):
    """Starts READs that meet faults."""

    def __init__(self, connector: FaultyConnector, inner: Connection) -> None:
        self._connector = connector
        self._inner = inner

    def paths(self) -> Sequence[str]:
        return self._inner.paths()

    def use_path(self, path: str) -> None:
        self._inner.use_path(path)

    def close(self) -> None:
        self._inner.close()

    def read(self, blocks: BlockRead) -> Read:
        owner = self._connector
        owner.num_reads += 1
        fault, source = owner.faults.of_read(owner.agent_name, owner.num_reads)
        heads = slice(blocks.local_heads.start, blocks.local_heads.stop)
        memory = [owner.memory[block_id, heads] for block_id in blocks.local_blocks]
        return owner.begin(fault, source, memory, lambda: self._inner.read(blocks))

    def read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        owner = self._connector
        owner.num_probes += 1
        fault, source = owner.faults.of_probe(owner.agent_name, owner.num_probes)
        if fault is Fault.REFUSE:
            raise TransferError("injected: the READ was refused")
        read, landing = self._inner.read_scratch(path)
        return owner.begin(fault, source, [landing.view(1, -1)], lambda: read), landing


class FaultyRead(Read):
    """Runs a READ with its fault."""

    can_start_later = True
    """The READ may be held back, and repeated: nobody else has been asked to write."""

    def __init__(
        self,
        fault: Fault | None,
        source: random.Random,
        memory: Sequence[torch.Tensor],
        start: Callable[[], Read],
        faults: FaultPlan,
        clock: Callable[[], float],
    ) -> None:
        """``memory`` is [num_heads, num_bytes] uint8 of each block that is written; ``start``
        begins the true READ, and again for a duplicate. Raises TransferError.
        """
        self._fault = fault
        self._source = source
        self._memory = memory
        self._start = start
        self._clock = clock
        self._wait_until = 0.0
        """Pending until then: before the start of a delayed READ, after that of a lost one."""
        self._unwritten: torch.Tensor | None = None
        """The bytes that the second half of the last block held before."""
        self._end: ReadState = "pending"
        self._inner: Read | None = None
        match fault:
            case Fault.REFUSE:
                raise TransferError("injected: the READ was refused")
            case Fault.DELAY:
                self._wait_until = clock() + source.uniform(0, faults.slow_s)
                if self.can_start_later:
                    return
            case Fault.LOSE:
                self._wait_until = clock() + source.uniform(0, faults.lost_s)
            case Fault.TRUNCATE:
                self._unwritten = _second_half(memory[-1]).clone()
                _await_device(self._unwritten)
            case _:
                pass
        self._inner = start()

    @property
    def inner(self) -> Read:
        """Return the true READ, once it has started."""
        assert self._inner is not None
        return self._inner

    def poll(self) -> ReadState:
        if self._end == "pending":
            self._end = self._advance()
        return self._end

    def parts(self) -> Sequence[ReadPart]:
        """Return no part of a READ with a fault: its bytes may change up to its end."""
        return () if self._fault is not None or self._inner is None else self._inner.parts()

    def seconds(self) -> float:
        return self.inner.seconds()

    def release(self) -> None:
        if self._inner is not None:
            self._inner.release()

    def _advance(self) -> ReadState:
        if self._clock() < self._wait_until:
            return "pending"
        if self._inner is None:
            try:
                self._inner = self._start()
            except TransferError:
                return "failed"
        state = self._inner.poll()
        return self._finish() if state == "done" else state

    def _finish(self) -> ReadState:
        """Return what the end of the true READ looks like."""
        match self._fault:
            case Fault.FAIL:
                return "failed"
            case Fault.CORRUPT:
                _corrupt(self._memory, self._source)
                _await_device(self._memory[0])
            case Fault.TRUNCATE if self._unwritten is not None:
                _second_half(self._memory[-1]).copy_(self._unwritten)
                _await_device(self._memory[0])
            case Fault.DUPLICATE if self.can_start_later:
                self._fault = None
                self.inner.release()
                self._inner = None
                return self._advance()
            case _:
                pass
        return "done"


class FaultyPushedRead(FaultyRead, PushedRead):
    """Runs a READ that the prefill side writes, with its fault."""

    can_start_later = False

    @property
    def target(self) -> bytes:  # type: ignore[override]
        return self._pushed.target

    def end(self, error: str) -> None:
        self._pushed.end(error)

    @property
    def _pushed(self) -> PushedRead:
        assert isinstance(self.inner, PushedRead)
        return self.inner


class FaultyTransferThread(TransferThread):
    """Drives transfers and cuts leases short."""

    def __init__(self, faults: FaultPlan, setup: TransferSetup) -> None:
        self._faults = faults
        self._agent_name = setup.connector.agent_name
        super().__init__(setup)

    def submit(self, commands: Sequence[TransferCommand]) -> None:
        super().submit(self._faults.on_commands(self._agent_name, commands))


class FaultyOffloadWorker(OffloadWorker):
    """Reports the ends of copies late, and changes a byte of some chunks once their checksums are
    taken.
    """

    def __init__(self, faults: FaultPlan, **setup: Any) -> None:
        super().__init__(**setup)
        self._faults = faults
        self._stores: dict[int, OffloadJob] = {}
        self._late: list[tuple[float, JobFinished]] = []
        """Reports that are held back, with the instants at which they are due."""
        self._num_chunks_stored = 0
        self._num_copies = 0

    def submit(self, jobs: Sequence[OffloadJob]) -> None:
        self._stores |= {job.job_id: job for job in jobs if job.direction == "store"}
        super().submit(jobs)

    def take_finished(self) -> list[JobFinished]:
        for report in super().take_finished():
            self._hold_back(report)
        now = time.monotonic()
        finished = [report for due_at, report in self._late if due_at <= now]
        self._late = [(due_at, report) for due_at, report in self._late if due_at > now]
        if not finished or not self._faults.copies_wait():
            return finished
        for report in finished:
            self._report_in(_WAIT_S, report)
        return []

    def _hold_back(self, report: JobFinished) -> None:
        job = self._stores.pop(report.job_id, None)
        for chunk_id in job.chunk_ids if job is not None and report.ok else ():
            self._spoil(chunk_id)
        self._num_copies += 1
        self._report_in(self._faults.copy_delay_s(self._num_copies), report)

    def _report_in(self, delay_s: float, report: JobFinished) -> None:
        self._late.append((time.monotonic() + delay_s, report))
        timer = threading.Timer(delay_s + _TIMER_SLACK_S, self._wake)
        timer.daemon = True
        timer.start()

    def _spoil(self, chunk_id: int) -> None:
        self._num_chunks_stored += 1
        source = self._faults.of_chunk(self._num_chunks_stored)
        if source is not None:
            self.chunk(chunk_id)[source.randrange(self.block_bytes)] ^= source.randrange(1, 256)


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> FaultyConnector:
    """Make the connector of a rank around the one that ``kv_transfer.faulty.inner`` names."""
    plan = settings.section("faulty")
    assert isinstance(plan, FaultPlan)
    inner = settings.model_copy(update={"connector": plan.inner})
    return FaultyConnector(opening.new_connector(inner, name, incarnation), plan)


def _await_device(memory: torch.Tensor) -> None:
    """Wait for the device, so that the fault is there before anybody hears of the READ's end.

    Checksums are computed on another stream.
    """
    if memory.is_cuda:
        torch.cuda.current_stream(memory.device).synchronize()


def _second_half(block: torch.Tensor) -> torch.Tensor:
    return block[:, block.shape[1] // 2 :]


def _corrupt(memory: Sequence[torch.Tensor], source: random.Random) -> None:
    block = source.choice(memory)
    row, column = source.randrange(block.shape[0]), source.randrange(block.shape[1])
    block[row, column] ^= source.randrange(1, 256)
