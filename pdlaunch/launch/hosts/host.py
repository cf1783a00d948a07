"""Defines what the supervisor asks of a machine on which processes run, and what it hears from it.

``LocalHost`` is this machine. ``HostGroup`` adds machines elsewhere, each with an agent.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import zmq

from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import FromSupervisor, ToSupervisor
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.step_record import LastStep

# Signals that a process causes by its own fault; other signals are sent to it.
_OWN_SIGNALS = frozenset(
    getattr(signal, f"SIG{name}") for name in ("SEGV", "ABRT", "BUS", "FPE", "ILL", "TRAP", "SYS")
)

_NOTHING = LastStep()


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A process has sent a message."""

    name: str
    message: ToSupervisor


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """A process has ended, and with it all processes of its group."""

    name: str
    incarnation: int
    returncode: int  # exit code; negative: the signal that killed the process
    lost_with: str = ""  # the host that is lost, and why; empty: the process itself was seen to end
    last_step: LastStep = _NOTHING  # what the engine of a rank computed; empty for others

    @property
    def by_itself(self) -> bool:
        """Return whether nobody else ended it: no person, nor the kernel for lack of memory."""
        return self.returncode >= 0 or -self.returncode in _OWN_SIGNALS

    def how(self) -> str:
        """Say in words how the process ended."""
        if self.lost_with:
            return f"was lost with its host {self.lost_with}"
        if self.returncode >= 0:
            return f"ended with exit code {self.returncode}"
        number = -self.returncode
        known = number in signal.valid_signals() and number < signal.SIGRTMIN
        hint = ", perhaps for lack of memory" if number == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(number).name if known else f'signal {number}'}{hint}"


class Host(Protocol):
    """Runs processes of a launch on one machine. No method blocks."""

    def spawn(
        self, spec: ProcessSpec, incarnation: int, bootstrap: Bootstrap
    ) -> ProcessExited | None:
        """Start a process with ``bootstrap`` on its standard input.

        Returns its end when it cannot be started.
        """

    def signal(self, name: str, signal_number: int) -> None:
        """Send a signal to the process and all that it has started; ignored when it is gone."""

    def send(self, name: str, message: FromSupervisor) -> None:
        """Queue a message; it is lost when the process is not connected."""

    def exits(self) -> list[ProcessExited]:
        """Return the processes that have ended since the last call."""

    def messages(self) -> list[MessageReceived]:
        """Return the messages since the last call, oldest first.

        A process that is in ``exits`` has none left after the next call of this.
        """

    def log_path(self, name: str) -> Path:
        """Return the file that gets what all incarnations of a process print."""

    def forget(self, engine: str) -> None:
        """Drop what is kept of an engine that is gone for good."""

    @property
    def sources(self) -> Sequence[zmq.Socket[bytes] | int]:
        """Return what becomes readable with an exit or a message; always the same."""
