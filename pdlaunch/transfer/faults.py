"""Which faults are injected into a rank's transfers, and when: for tests and ``pdlaunch smoke
--chaos`` only.

A plan comes in the environment of the ranks (the setting ``env``), so that no knob for it exists.
Which fault the i-th READ of a rank meets is a pure function of (seed, agent, i), which lease is cut
short one of (seed, agent, request).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from pathlib import Path

import msgspec

from pdlaunch.errors import ConfigError
from pdlaunch.protocol.transfer import GrantLease, TransferCommand

FAULTS_VARIABLE = "PDLAUNCH_CHAOS"


class Fault(Enum):
    """What can happen to one READ."""

    REFUSE = auto()
    """It is refused at its start."""
    FAIL = auto()
    """It writes, and then says that it has failed."""
    DELAY = auto()
    """It starts late."""
    TRUNCATE = auto()
    """It says done, and half of its last block was not written."""
    CORRUPT = auto()
    """It says done, and one byte is wrong."""
    DUPLICATE = auto()
    """It writes twice before it says done."""
    LOSE = auto()
    """Its completion comes late, maybe after the end of its lease or the pull's deadline."""


_PROBE_FAULTS = (Fault.REFUSE, Fault.FAIL, Fault.CORRUPT)


class FaultPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often and how hard."""

    seed: int
    rate: float = 0.2
    """Share of the READs that meet a fault."""
    probe_rate: float = 0.05
    """Share of the handshakes' READs that do."""
    lease_rate: float = 0.05
    """Share of the leases that end early."""
    chunk_rate: float = 0.05
    """Share of the blocks in host memory that go bad there."""
    copy_slow_s: float = 0.05
    """Longest time by which the end of a copy between device and host is seen late."""
    copies_wait_file: str = ""
    """While this file exists, no end of such a copy is seen."""
    slow_s: float = 0.3
    """Longest delay."""
    lost_s: float = 4.0
    """Longest time until a lost completion is seen after all."""
    short_lease_s: float = 0.1
    """Longest life of a lease that ends early, each extension included."""

    def of_read(self, agent: str, index: int) -> tuple[Fault | None, random.Random]:
        """The fault of an agent's ``index``-th READ, and what its details are drawn from."""
        return self._draw(f"read/{agent}/{index}", self.rate, tuple(Fault))

    def of_probe(self, agent: str, index: int) -> tuple[Fault | None, random.Random]:
        """The same for the READs of handshakes."""
        return self._draw(f"probe/{agent}/{index}", self.probe_rate, _PROBE_FAULTS)

    def of_chunk(self, index: int) -> random.Random | None:
        """What the fault of a rank's ``index``-th block in host memory is drawn from; None: it is
        sound.
        """
        source = random.Random(f"{self.seed}/chunk/{index}")
        return source if source.random() < self.chunk_rate else None

    def copy_delay_s(self, index: int) -> float:
        """By how much the end of a rank's ``index``-th copy between device and host is seen
        late.
        """
        return random.Random(f"{self.seed}/copy/{index}").uniform(0, self.copy_slow_s)

    def copies_wait(self) -> bool:
        """No end of a copy between device and host is to be seen now."""
        return bool(self.copies_wait_file) and Path(self.copies_wait_file).exists()

    def on_commands(self, agent: str, commands: Sequence[TransferCommand]) -> list[TransferCommand]:
        """Cut some of the leases short."""
        return [
            self._on_lease(agent, command) if isinstance(command, GrantLease) else command
            for command in commands
        ]

    def _on_lease(self, agent: str, command: GrantLease) -> GrantLease:
        source = random.Random(f"{self.seed}/lease/{agent}/{command.lease_id}")
        if source.random() >= self.lease_rate:
            return command
        return msgspec.structs.replace(command, lease_s=source.uniform(0.001, self.short_lease_s))

    def _draw(
        self, name: str, rate: float, faults: Sequence[Fault]
    ) -> tuple[Fault | None, random.Random]:
        source = random.Random(f"{self.seed}/{name}")
        return (source.choice(faults) if source.random() < rate else None), source


def read_fault_plan(environ: Mapping[str, str]) -> FaultPlan | None:
    """The plan in a rank's environment, as JSON; None: no faults. Raises ConfigError."""
    text = environ.get(FAULTS_VARIABLE)
    if not text:
        return None
    try:
        return msgspec.json.decode(text, type=FaultPlan)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{FAULTS_VARIABLE} is not a fault plan: {error}") from None
