"""What the supervisor sees of the world (events) and does to it (``Host``); tests put fakes in its
place.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Protocol

from pdlaunch.process.step_record import LastStep
from pdlaunch.protocol.control import FromSupervisor, ToSupervisor
from pdlaunch.resolve.plan import ProcessSpec
from pdlaunch.supervisor.status import LaunchStatus

_OWN_SIGNALS = frozenset(
    {
        signal.SIGSEGV,
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGSYS,
    }
)


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A child has said something."""

    name: str
    message: ToSupervisor


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """A child is gone, and with it all processes of its session's group."""

    name: str
    incarnation: int
    returncode: int
    """Negative: the signal that killed it."""

    @property
    def by_itself(self) -> bool:
        """Nobody else has ended it, neither a person nor the kernel for lack of memory."""
        return self.returncode >= 0 or -self.returncode in _OWN_SIGNALS

    def how(self) -> str:
        if self.returncode >= 0:
            return f"ended with exit code {self.returncode}"
        number = -self.returncode
        known = number in signal.valid_signals() and number < signal.SIGRTMIN
        hint = ", perhaps for lack of memory" if number == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(number).name if known else f'signal {number}'}{hint}"


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The user or the system wants the launch to end."""

    signal_number: int
    reason: str = ""
    """For people; empty: the signal itself."""


Event = MessageReceived | ProcessExited | StopRequested


class Host(Protocol):
    """Where processes run. No method blocks."""

    def prepare(self) -> None:
        """All models are in place: work out what servers, ranks and router are given. Raises
        PdlaunchError.
        """

    def spawn(self, spec: ProcessSpec, incarnation: int) -> None:
        """Start a process; its end arrives as ``ProcessExited``. Raises OSError when the system
        refuses.
        """

    def signal(self, name: str, signal_number: int) -> None:
        """Send a signal to the process and all that it has started; ignored when it is gone."""

    def last_step(self, engine: str) -> LastStep:
        """Return what the ranks of an engine computed when one of them died."""

    def send(self, name: str, message: FromSupervisor) -> None:
        """Queue a message; lost when the process is not connected."""

    def close_listeners(self) -> None:
        """No router will accept a connection any more: let them be refused; once is as good as
        twice.
        """


class Observer(Protocol):
    """Who shows what happens."""

    def changed(self, status: LaunchStatus) -> None:
        """Called after every event that changed something."""

    def ready(self, status: LaunchStatus) -> None:
        """Called once, when the deployment serves."""

    def note(self, text: str) -> None:
        """Something that a user should read once: a death, a restart, a drain."""
