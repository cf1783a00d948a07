"""Says on the terminal of ``pdlaunch serve`` that it takes requests, then every ten seconds what
the deployment does.

A thread asks the router at the launch's admin socket. Nothing is said while nothing has changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from pdlaunch.cli.figures import amount, percent
from pdlaunch.config.roles import ROLES
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.requests import read_status
from pdlaunch.launch.status import LaunchPhase, LaunchStatus, Observer
from pdlaunch.protocol.process.run_dirs import running_launches
from pdlaunch.protocol.status import DeploymentStatus

EVERY_S = 10.0
DRAIN_EVERY_S = 2.0
READ_TIMEOUT_S = 5.0
_READY_POLL_S = 0.02
_DRAINS = (LaunchPhase.DRAINING_ROUTER, LaunchPhase.DRAINING_ENGINES)

Read = Callable[[], DeploymentStatus]


class StatusLine:
    """Is an observer that passes everything on to ``view``, to which it adds lines of its own.

    ``read`` returns the status, or raises PdlaunchError.
    """

    def __init__(self, view: Observer, read: Read, every_s: float = EVERY_S) -> None:
        self._view = view
        self._read = read
        self._every_s = every_s
        self._wake = threading.Event()
        self._is_draining = False
        self._is_over = False
        self._num_errors = 0
        self._said = ""
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over = True
        self._wake.set()

    def changed(self, status: LaunchStatus) -> None:
        self._view.changed(status)
        if status.phase in _DRAINS and not self._is_draining:
            self._is_draining = True
            self._wake.set()
        elif self._is_draining and status.phase not in _DRAINS:
            self._is_over = True

    def ready(self, status: LaunchStatus) -> None:
        # In its thread: the router is just being told, and the supervisor waits for nobody.
        self._thread = threading.Thread(
            target=self._run, args=(status,), name="status-line", daemon=True
        )
        self._thread.start()

    def note(self, text: str) -> None:
        self._view.note(text)

    def _run(self, launch: LaunchStatus) -> None:
        self._say_ready(launch)
        while not self._is_over:
            self._wake.wait(min(self._every_s, DRAIN_EVERY_S if self._is_draining else EVERY_S))
            self._wake.clear()
            if not self._is_over:
                self.tell()

    def _say_ready(self, launch: LaunchStatus) -> None:
        """Show that a launch is ready once its router takes requests."""
        while not (self._is_over or self._is_draining):
            if self._takes_requests() and not (self._is_over or self._is_draining):
                self._view.ready(launch)
                return
            self._wake.wait(_READY_POLL_S)

    def _takes_requests(self) -> bool:
        try:
            return self._read().state == "ok"
        except PdlaunchError:
            return False

    def tell(self) -> None:
        """Say what has changed since the last time, if anything has."""
        try:
            status = self._read()
        except PdlaunchError:
            # A router that is restarted; what happened to it is told without this.
            return
        line = drain_line(status) if self._is_draining else status_line(status, self._num_errors)
        self._num_errors = status.errors
        if line != self._said and not (self._is_over or (not self._said and _is_idle(status))):
            self._view.note(line)
        self._said = line


def reader_of(launch_id: str) -> Read:
    """Return what reads the status of this launch, at its admin socket."""

    def read() -> DeploymentStatus:
        for launch in running_launches():
            if launch.card.launch_id == launch_id:
                socket = launch.admin_socket
                return read_status(
                    Api("http://launch", timeout_s=READ_TIMEOUT_S, socket_path=socket)
                )
        raise PdlaunchError("the router does not listen yet")

    return read


def drain_line(status: DeploymentStatus) -> str:
    """Say how many requests a drain waits for."""
    left = status.in_flight
    return f"draining: {left} request{'' if left == 1 else 's'} left"


def status_line(status: DeploymentStatus, num_errors: int) -> str:
    """Say in one line what the deployment does; ``num_errors``: those that were told before."""
    rates = status.rates
    readings = [engine.reading for engine in status.engines if engine.reading is not None]
    pulled = sum(reading.pulled_bytes_per_s for reading in readings)
    parts = [
        f"{amount(rates.requests_per_s)} requests/s",
        f"{amount(rates.output_tokens_per_s)} tokens/s",
        f"{sum(reading.running for reading in readings)} running",
        f"{sum(reading.waiting for reading in readings)} waiting",
        f"KV {_usage_by_role(status)}",
        f"pulls {pulled / 1e9:.2f} GB/s",
    ]
    new_errors = status.errors - num_errors
    parts.append(f"{max(0, new_errors)} error{'' if new_errors == 1 else 's'}")
    down = [engine.name for engine in status.engines if engine.is_down]
    down += [engine.name for engine in status.gone]
    if down:
        parts.append(f"down: {_listed(down)}")
    return ", ".join(parts)


def _usage_by_role(status: DeploymentStatus) -> str:
    found = []
    for role in ROLES:
        usages = [
            engine.reading.kv_usage
            for engine in status.engines
            if engine.role == role and engine.reading is not None
        ]
        if usages:
            found.append(f"{role} {percent(sum(usages) / len(usages))}")
    return " ".join(found) or "-"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_idle(status: DeploymentStatus) -> bool:
    return status.requests == 0 and status.in_flight == 0
