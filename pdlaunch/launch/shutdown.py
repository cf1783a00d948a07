"""Ends a launch: drain the router, then the engines; stop them in the same order; terminate, kill.

Every phase has a deadline.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdlaunch.launch.hosts.host import Host
from pdlaunch.launch.instance import Instance
from pdlaunch.launch.states import LaunchPhase, ProcessState
from pdlaunch.protocol.control import Drain, Stop

_ORDER = tuple(LaunchPhase)
_DRAINED_KIND = {LaunchPhase.DRAINING_ROUTER: "router", LaunchPhase.DRAINING_ENGINES: "server"}

_WORKING = (ProcessState.READY, ProcessState.DRAINING)


@dataclass(frozen=True, slots=True)
class Grace:
    """Sets the seconds that each phase of the end may take."""

    drain_s: float = 30.0
    """Time for router and engines together."""
    router_stop_s: float = 1.5
    """Time for the router to end the requests that still run, before their engines are gone."""
    stop_s: float = 5.0
    terminate_s: float = 3.0
    kill_s: float = 5.0
    """A process that the kernel has not removed by then is left to it."""


class LaunchShutdown:
    """Walks the phases from draining to ``STOPPED``; ``advance`` after every event."""

    def __init__(
        self,
        host: Host,
        instances: Sequence[Instance],
        grace: Grace,
        clock: Callable[[], float],
        *,
        close_listeners: Callable[[], None],
    ) -> None:
        self._host = host
        self._instances = instances
        self._grace = grace
        self._clock = clock
        self._close_listeners = close_listeners
        self._drained: set[str] = set()
        self._drain_ends_at = clock() + grace.drain_s
        self.phase = LaunchPhase.READY
        self.ends_at = clock()

    def begin(self, *, drain: bool) -> None:
        """Enter the first phase; processes that wait for a restart are not started again."""
        for instance in self._instances:
            if instance.state in (ProcessState.BACKING_OFF, ProcessState.PLANNED):
                instance.move(ProcessState.EXITED)
        # Without a drain the router ends first, too: it tells clients why while engines are there.
        self._enter(LaunchPhase.DRAINING_ROUTER if drain else LaunchPhase.STOPPING_ROUTER)
        self.advance()

    def hurry(self) -> None:
        """Skip the drain, or kill what does not stop: the user has asked again."""
        draining = self.phase in _DRAINED_KIND
        self._enter(LaunchPhase.STOPPING_ROUTER if draining else LaunchPhase.KILLING)
        self.advance()

    def drained(self, name: str) -> None:
        self._drained.add(name)

    def advance(self) -> None:
        """Leave every phase that is over."""
        while self.phase is not LaunchPhase.STOPPED and self._over():
            # Without processes there is nothing to terminate or kill.
            following = _ORDER[_ORDER.index(self.phase) + 1]
            stopped = self.phase not in _DRAINED_KIND and not self._alive()
            self._enter(LaunchPhase.STOPPED if stopped else following)
        if self.phase not in _DRAINED_KIND or not any(
            i.spec.kind == "router" for i in self._alive()
        ):
            # No other router follows: who connects now is refused instead of left waiting.
            self._close_listeners()

    def _over(self) -> bool:
        if self._clock() >= self.ends_at or not self._alive():
            return True
        if self.phase is LaunchPhase.STOPPING_ROUTER:
            return not self._undrained("router")
        kind = _DRAINED_KIND.get(self.phase)
        return kind is not None and not self._undrained(kind)

    def _enter(self, phase: LaunchPhase) -> None:
        self.phase = phase
        now = self._clock()
        match phase:
            case LaunchPhase.DRAINING_ROUTER | LaunchPhase.DRAINING_ENGINES:
                # Router and engines share one deadline for the drain.
                self.ends_at = self._drain_ends_at
                self._drain(_DRAINED_KIND[phase], max(0.0, self._drain_ends_at - now))
            case LaunchPhase.STOPPING_ROUTER:
                self.ends_at = now + self._grace.router_stop_s
                self._stop(
                    [instance for instance in self._alive() if instance.spec.kind == "router"]
                )
            case LaunchPhase.STOPPING:
                self.ends_at = now + self._grace.stop_s
                self._stop(
                    [instance for instance in self._alive() if instance.spec.kind != "router"]
                )
            case LaunchPhase.TERMINATING:
                self.ends_at = now + self._grace.terminate_s
                self._signal(signal.SIGTERM)
            case LaunchPhase.KILLING:
                self.ends_at = now + self._grace.kill_s
                self._signal(signal.SIGKILL)
            case _:
                self.ends_at = now

    def _drain(self, kind: str, timeout_s: float) -> None:
        """Ask for a drain. A drained server has no request at its ranks: they are not asked."""
        for instance in self._undrained(kind):
            if instance.state is ProcessState.READY:
                instance.move(ProcessState.DRAINING)
            self._host.send(instance.name, Drain(timeout_s=timeout_s))

    def _stop(self, instances: Sequence[Instance]) -> None:
        """Stop ready processes by message; those that still start may be busy loading, and get
        SIGTERM.
        """
        for instance in instances:
            if instance.state in _WORKING:
                self._host.send(instance.name, Stop())
            else:
                self._host.signal(instance.name, signal.SIGTERM)

    def _signal(self, signal_number: int) -> None:
        for instance in self._alive():
            self._host.signal(instance.name, signal_number)

    def _undrained(self, kind: str) -> list[Instance]:
        """Return those that have yet to drain; one that still starts has no work to finish."""
        return [
            i
            for i in self._instances
            if i.spec.kind == kind and i.state in _WORKING and i.name not in self._drained
        ]

    def _alive(self) -> list[Instance]:
        return [instance for instance in self._instances if instance.alive]
