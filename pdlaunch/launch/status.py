"""Defines what users see of a launch: immutable snapshots of its state, and its failure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pdlaunch.observe.causes import find_cause, known_fix, last_lines
from pdlaunch.protocol.control import PairReady

MAX_LINES = 20
MAX_WIDTH = 300
# Largest number of lines by the supervisor; the others are for the error of the process
_MAX_OWN_LINES = 12


class ProcessState(StrEnum):
    PLANNED = "planned"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # it takes no new work and finishes running requests
    EXITED = "exited"  # it ended as requested
    FAILED = "failed"  # it ended by itself, or was killed from outside
    BACKING_OFF = "backing-off"  # its next incarnation will be started after a wait
    GIVEN_UP = "given-up"  # its engine died too often and is started again after a long wait


class LaunchPhase(StrEnum):
    """Phases of a launch, in order; phases may be skipped but never return."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # the router finishes running requests
    # The router ends the requests that still run, while engines are still running
    STOPPING_ROUTER = "stopping the router"
    STOPPING = "stopping"  # ready processes get Stop, the others SIGTERM
    KILLING = "killing"  # remaining processes get SIGKILL
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    name: str
    host: str
    state: ProcessState
    doing: str = ""  # the current task in the words of the process, or why it died
    fraction: float | None = None  # completed share of the current task


@dataclass(frozen=True, slots=True)
class LaunchStatus:
    phase: LaunchPhase
    processes: tuple[ProcessStatus, ...]
    pairs: tuple[PairReady, ...] = ()
    num_missing_pairs: int = 0
    url: str = ""  # URL of the router; empty until it has registered


class Observer(Protocol):
    def changed(self, status: LaunchStatus) -> None:
        """Show a new status; called after each change."""

    def ready(self, status: LaunchStatus) -> None:
        """Show that the deployment serves; called once."""

    def note(self, text: str) -> None:
        """Show a message once, such as a death, a restart or a drain."""


@dataclass(slots=True)
class Failure:
    """Describes the first failure of a launch; later ones count as its consequences."""

    summary: str
    process: str | None = None
    said: str = ""  # the error that the process sent (``Failed``), perhaps after its exit
    details: Sequence[str] = ()

    def report(self, log: Path | None) -> list[str]:
        """Return at most ``MAX_LINES`` lines: what failed, why, and the path of the log."""
        lines = _cut("\n".join([self.summary, *self.details]).splitlines(), _MAX_OWN_LINES)
        if log is not None:
            reason = _cut(_reason(self.said.strip(), log), MAX_LINES - 1 - len(lines))
            lines += [*(f"  {line}" for line in reason), f"log: {log}"]
        return [line[:MAX_WIDTH] for line in lines]


def _reason(said: str, log: Path) -> list[str]:
    """Return the error of a process, or the cause in its log, with the fix; else the log's end."""
    error, fix = said, known_fix(said)
    if not said:
        tail = [line.rstrip() for line in last_lines(log) if line.strip()]
        if (cause := find_cause(tail)) is None:
            return tail[-10:]
        error, fix = cause
    return [*error.splitlines(), *([f"fix: {fix}"] if fix else [])]


def _cut(lines: Sequence[str], num_lines: int) -> list[str]:
    if len(lines) <= num_lines:
        return list(lines)
    return [*lines[: num_lines - 1], f"… and {len(lines) - num_lines + 1} more lines"]


def startup_timeout(
    status: LaunchStatus, timeout_s: float, missing_pairs: Sequence[str]
) -> Failure:
    """Return the failure of a launch that was not ready in time, with what it waits for."""
    done = (ProcessState.READY, ProcessState.EXITED)
    slow = [each for each in status.processes if each.state not in done]
    waiting = [
        f"  {each.name} is {each.state}" + (f": {each.doing}" if each.doing else "")
        for each in slow
    ]
    return Failure(
        f"not ready after {timeout_s:g} s (startup_timeout_s):",
        process=next((each.name for each in slow), None),
        details=waiting or [f"  {missing}" for missing in missing_pairs],
    )
