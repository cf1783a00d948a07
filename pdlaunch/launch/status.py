"""Names the states of processes and launches, and shows them to views in immutable snapshots."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from pdlaunch.protocol.control import PairReady


class ProcessState(StrEnum):
    """Says where one process is in its life."""

    PLANNED = "planned"
    CONVERTING = "converting"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """It takes no new work and finishes what runs."""
    EXITED = "exited"
    """It ended because it was asked to, or is a conversion that is done."""
    FAILED = "failed"
    """It ended by itself, or was killed by somebody else."""
    BACKING_OFF = "backing-off"
    """It waits to be started under the next incarnation."""
    GIVEN_UP = "given-up"
    """Its engine died too often and is left alone for a while."""


class LaunchPhase(StrEnum):
    """Says where the launch is; it only moves down this list, and may skip."""

    PREPARING = "preparing"
    """Models are converted."""
    STARTING = "starting"
    READY = "ready"
    DRAINING_ROUTER = "draining the router"
    DRAINING_ENGINES = "draining the engines"
    STOPPING_ROUTER = "stopping the router"
    """The router ends the requests that still run, while their engines are still there."""
    STOPPING = "stopping"
    """Ready processes get Stop, the others SIGTERM."""
    TERMINATING = "terminating"
    """Processes that are left get SIGTERM."""
    KILLING = "killing"
    """Processes that are left get SIGKILL."""
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """Shows one process."""

    name: str
    kind: str
    host: str
    state: ProcessState
    incarnation: int
    pid: int | None = None
    """Process id; None until it has registered."""
    doing: str = ""
    """Words of the process about what it is doing, or why it died."""
    fraction: float | None = None
    """Share of what it is doing that is done."""
    info: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LaunchStatus:
    """Shows the launch."""

    phase: LaunchPhase
    processes: tuple[ProcessStatus, ...]
    pairs: tuple[PairReady, ...] = ()
    num_missing_pairs: int = 0
    url: str = ""
    """URL of the router; empty until it has registered."""


class Observer(Protocol):
    """Shows a user what happens to a launch."""

    def changed(self, status: LaunchStatus) -> None:
        """Take in the status after an event that changed something."""

    def ready(self, status: LaunchStatus) -> None:
        """Take in, once, that the deployment serves."""

    def note(self, text: str) -> None:
        """Show something that a user should read once: a death, a restart, a drain."""
