"""Decides which faults the connector ``faulty`` injects into a rank's transfers, and when.

It wraps the connector that ``kv_transfer.faulty.inner`` names; tests and the soaks use it. Which
fault the i-th READ of a rank meets is a pure function of (seed, agent, i); which lease is cut
short, one of (seed, agent, lease).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import Enum, auto
from pathlib import Path

import msgspec
from pydantic import Field, field_validator

from pdlaunch.config.connectors import ConnectorSettings, check_connector_name
from pdlaunch.protocol.transfer import GrantLease, TransferCommand


class Fault(Enum):
    REFUSE = auto()  # it is refused at its start
    FAIL = auto()  # it writes, and then says that it has failed
    DELAY = auto()  # it starts late, and may write after the pull has ended
    CORRUPT = auto()  # it says done, and one byte is wrong
    # Its completion comes late, maybe after the end of its lease or the pull's deadline.
    LOSE = auto()


_PROBE_FAULTS = (Fault.REFUSE, Fault.FAIL, Fault.CORRUPT)


class FaultPlan(ConnectorSettings):
    """Sets how often faults come and how hard they are: around another connector, in the leases and
    in the host tier.
    """

    factory = "pdlaunch.transfer.connectors.faulty:new_connector"
    stand_ins = {
        "TransferThread": "pdlaunch.transfer.connectors.faulty:FaultyTransferThread",
        "OffloadWorker": "pdlaunch.transfer.connectors.faulty:FaultyOffloadWorker",
    }

    # fmt: off
    inner: str = Field("nixl", description="The connector that moves the bytes.")
    seed: int = Field(0, description="What all faults are drawn from.")
    rate: float = Field(0.2, ge=0, le=1, description="Share of the READs that meet a fault.")
    probe_rate: float = Field(
        0.05, ge=0, le=1, description="Share of the handshakes' READs that meet a fault.")
    lease_rate: float = Field(0.05, ge=0, le=1, description="Share of the leases that end early.")
    chunk_rate: float = Field(
        0.05, ge=0, le=1, description="Share of the blocks in host memory that go bad there.")
    copies_wait_file: str = Field(
        "", description="While this file exists, no end of a copy to or from host memory is seen.")
    slow_s: float = Field(0.3, ge=0, description="Longest delay of a READ.")
    lost_s: float = Field(
        4.0, ge=0, description="Longest time until a lost completion is seen after all.")
    short_lease_s: float = Field(
        0.1, gt=0,
        description="Longest life of a lease that ends early, each extension included.")
    # fmt: on

    @property
    def wraps(self) -> str:
        return self.inner

    @field_validator("inner")
    @classmethod
    def _is_another_connector(cls, value: str) -> str:
        if value == "faulty":
            raise ValueError("faulty cannot wrap itself")
        return check_connector_name(value)

    def of_read(self, agent: str, index: int) -> tuple[Fault | None, random.Random]:
        """Return the fault of an agent's ``index``-th READ, and the source of its details."""
        return self._draw(f"read/{agent}/{index}", self.rate, tuple(Fault))

    def of_probe(self, agent: str, index: int) -> tuple[Fault | None, random.Random]:
        """Return the same for the READs of handshakes."""
        return self._draw(f"probe/{agent}/{index}", self.probe_rate, _PROBE_FAULTS)

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

    def _draw(
        self, name: str, rate: float, faults: Sequence[Fault]
    ) -> tuple[Fault | None, random.Random]:
        source = random.Random(f"{self.seed}/{name}")
        return (source.choice(faults) if source.random() < rate else None), source
