"""Faults for the transfers of a rank, or a worker of vLLM: which ones, when, and how they show.

Which fault the i-th READ of a rank meets is a pure function of (seed, agent, i); which lease is cut
short, one of (seed, agent, lease).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import HandshakeReply
from pdlaunch.protocol.transfer import GrantLease, TransferCommand
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    Read,
    ReadState,
)
from pdlaunch.transfer.handshake import TransferSetup
from pdlaunch.transfer.thread import TransferThread


class Fault(Enum):
    REFUSE = auto()  # it is refused at its start
    FAIL = auto()  # it writes, and then says that it has failed
    DELAY = auto()  # it starts late, and may write after the pull has ended
    CORRUPT = auto()  # it says done, and one byte is wrong
    TRUNCATE = auto()  # it says done, and the last pieces are missing
    # Its completion comes late, maybe after the end of its lease or the pull's deadline.
    LOSE = auto()


@dataclass(frozen=True, kw_only=True)
class FaultPlan:
    """How often faults come, as shares, and how hard they are."""

    seed: int = 0
    rate: float = 0.2  # of the READs
    lease_rate: float = 0.05  # of the leases, which end early
    chunk_rate: float = 0.05  # of the blocks in host memory, which go bad there
    poison: int | None = None  # a rank crashes in a step with this token
    copies_wait_file: str = ""  # while it exists, no end of a copy to or from host memory is seen
    step_s: float = 0.0  # what each step waits for, as if the model were larger
    slow_s: float = 0.3  # longest delay of a READ
    lost_s: float = 4.0  # longest time until a lost completion is seen after all
    short_lease_s: float = 0.1  # longest life of a lease that ends early, with all extensions

    def of_read(self, agent: str, index: int) -> tuple[Fault | None, random.Random]:
        """Return the fault of an agent's ``index``-th READ, and the source of its details."""
        source = random.Random(f"{self.seed}/read/{agent}/{index}")
        return (source.choice([*Fault]) if source.random() < self.rate else None), source

    def of_chunk(self, index: int) -> random.Random | None:
        """Return the source of the fault of a rank's ``index``-th block in host memory; None when
        it stays sound.
        """
        source = random.Random(f"{self.seed}/chunk/{index}")
        return source if source.random() < self.chunk_rate else None

    def copies_wait(self) -> bool:
        return bool(self.copies_wait_file) and Path(self.copies_wait_file).exists()

    def on_command(self, agent: str, command: TransferCommand) -> TransferCommand:
        if not isinstance(command, GrantLease):
            return command
        source = random.Random(f"{self.seed}/lease/{agent}/{command.lease_id}")
        if source.random() >= self.lease_rate:
            return command
        return msgspec.structs.replace(command, lease_s=source.uniform(0.001, self.short_lease_s))


@Connector.register
class FaultyConnector:
    """Injects faults around a connector and never breaks the contract: after the end of a READ
    nothing is written.

    No fault touches what is pushed to peers, and who maps the memory.
    """

    def __init__(
        self, inner: Connector, faults: FaultPlan, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.faults = faults
        self.clock = clock
        self.num_reads = 0
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open(self, memory: LocalMemory) -> None:
        self._inner.open(memory)
        self.kv = memory.kv

    def connect(self, peer: HandshakeReply) -> Mapping[str, FaultyConnection | TransferError]:
        return {
            path: each if isinstance(each, TransferError) else FaultyConnection(self, each)
            for path, each in self._inner.connect(peer).items()
        }

    def close(self) -> None:
        self._inner.close()
        del self.kv


@Connection.register
class FaultyConnection:
    def __init__(self, connector: FaultyConnector, inner: Connection) -> None:
        self._connector = connector
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read(self, blocks: BlockRead) -> Read:
        owner = self._connector
        owner.num_reads += 1
        fault = owner.faults.of_read(owner.agent_name, owner.num_reads)
        memory = list(owner.kv.views(blocks.local_blocks, blocks.local_heads))
        return FaultyRead(owner, fault, memory, partial(self._inner.read, blocks))


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
        if state == "done" and self._fault in (Fault.CORRUPT, Fault.TRUNCATE):
            block = self._source.choice(self._memory)
            if self._fault is Fault.TRUNCATE:
                for missing in self._memory[len(self._memory) // 2 :]:
                    missing.zero_()
            else:
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
