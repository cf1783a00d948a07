"""Says what people are shown of a launch: its state, in immutable snapshots, and its failure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pdlaunch.observe.causes import find_cause, known_fix
from pdlaunch.protocol.control import PairReady

MAX_LINES = 20
MAX_WIDTH = 300
# The most lines of the supervisor's own; the rest is left to the process's own words
_MAX_OWN_LINES = 12
_TAIL_BYTES = 256 * 1024


class ProcessState(StrEnum):
    """Says where one process is in its life."""

    PLANNED = "planned"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # it takes no new work and finishes what runs
    EXITED = "exited"  # it ended because it was asked to
    FAILED = "failed"  # it ended by itself, or was killed by somebody else
    BACKING_OFF = "backing-off"  # it waits to be started under the next incarnation
    GIVEN_UP = "given-up"  # its engine died too often and is left alone for a while


class LaunchPhase(StrEnum):
    """Says where the launch is; it only moves down this list, and may skip."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # the router finishes the requests that run
    # The router ends the requests that still run, while their engines are still there
    STOPPING_ROUTER = "stopping the router"
    STOPPING = "stopping"  # ready processes get Stop, the others SIGTERM
    KILLING = "killing"  # processes that are left get SIGKILL
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """Shows one process."""

    name: str
    kind: str
    host: str
    state: ProcessState
    doing: str = ""  # words of the process about what it is doing, or why it died
    fraction: float | None = None  # share of what it is doing that is done


@dataclass(frozen=True, slots=True)
class LaunchStatus:
    """Shows the launch."""

    phase: LaunchPhase
    processes: tuple[ProcessStatus, ...]
    pairs: tuple[PairReady, ...] = ()
    num_missing_pairs: int = 0
    url: str = ""  # URL of the router; empty until it has registered


class Observer(Protocol):
    """Shows a user what happens to a launch."""

    def changed(self, status: LaunchStatus) -> None:
        """Take in the status after an event that changed something."""

    def ready(self, status: LaunchStatus) -> None:
        """Take in, once, that the deployment serves."""

    def note(self, text: str) -> None:
        """Show something that a user should read once: a death, a restart, a drain."""


@dataclass(slots=True)
class Failure:
    """Keeps the earliest failure of a launch; later ones are taken for its consequences."""

    summary: str
    process: str | None = None
    said: str = ""  # words of the process itself (``Failed``), which may arrive after its end
    details: Sequence[str] = ()

    def report(self, log: Path | None) -> list[str]:
        """Return at most ``MAX_LINES`` lines: what failed, why, and where to read on.

        ``log``: the log file of the process.
        """
        lines = _cut("\n".join([self.summary, *self.details]).splitlines(), _MAX_OWN_LINES)
        if log is not None:
            reason = _with_fix(self.said.strip()) or _why(_tail(log))
            lines += [
                *(f"  {line}" for line in _cut(reason, MAX_LINES - 1 - len(lines))),
                f"log: {log}",
            ]
        return [line[:MAX_WIDTH] for line in lines]


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(-min(_TAIL_BYTES, os.fstat(file.fileno()).st_size), os.SEEK_END)
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _why(lines: Sequence[str]) -> list[str]:
    """Return the cause with its fix, else the last lines."""
    cause = find_cause(lines)
    if cause is None:
        return list(lines[-10:])
    return [cause.error, *([f"fix: {cause.fix}"] if cause.fix else [])]


def _with_fix(said: str) -> list[str]:
    fix = known_fix(said)
    return [*said.splitlines(), *([f"fix: {fix}"] if fix else [])]


def _cut(lines: Sequence[str], num_lines: int) -> list[str]:
    if len(lines) <= num_lines:
        return list(lines)
    return [*lines[: num_lines - 1], f"… and {len(lines) - num_lines + 1} more lines"]


def startup_timeout(
    status: LaunchStatus, timeout_s: float, missing_pairs: Sequence[str]
) -> Failure:
    """Describe a launch that did not get ready in time by what it still waits for.

    ``missing_pairs``: in words; they matter once all processes are ready.
    """
    done = (ProcessState.READY, ProcessState.EXITED)
    slow = [process for process in status.processes if process.state not in done]
    waiting = [
        f"  {each.name} is {each.state}" + (f": {each.doing}" if each.doing else "")
        for each in slow
    ]
    return Failure(
        f"not ready after {timeout_s:g} s (startup_timeout_s):",
        process=next((each.name for each in slow), None),
        details=waiting or [f"  {missing}" for missing in missing_pairs],
    )
