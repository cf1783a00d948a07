"""Says on the terminal of ``pdlaunch serve`` that it takes requests, then every ten seconds what
the deployment does.

A thread asks the router at the launch's admin socket. Nothing is said while nothing has changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pdlaunch.cli.figures import status_line
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import launch_api, read_status
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

    def __exit__(self, *_: object) -> None:
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
        run, arguments = self._run, (status,)
        self._thread = threading.Thread(target=run, args=arguments, name="status-line", daemon=True)
        self._thread.start()

    def note(self, text: str) -> None:
        self._view.note(text)

    def _run(self, launch: LaunchStatus) -> None:
        while not (self._is_over or self._is_draining):
            if self._takes_requests() and not (self._is_over or self._is_draining):
                self._view.ready(launch)
                break
            self._wake.wait(_READY_POLL_S)
        while not self._is_over:
            self._wake.wait(min(self._every_s, DRAIN_EVERY_S if self._is_draining else EVERY_S))
            self._wake.clear()
            if not self._is_over:
                self.tell()

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
        left = status.in_flight
        line = f"draining: {left} request{'' if left == 1 else 's'} left"
        if not self._is_draining:
            line = status_line(status, self._num_errors)
        self._num_errors = status.errors
        is_unused = not self._said and status.requests == 0 and left == 0
        if line != self._said and not (self._is_over or is_unused):
            self._view.note(line)
        self._said = line


def reader_of(launch_id: str) -> Read:
    """Return what reads the status of this launch, at its admin socket."""

    def read() -> DeploymentStatus:
        for launch in running_launches():
            if launch.card.launch_id == launch_id:
                return read_status(launch_api(launch, READ_TIMEOUT_S))
        raise PdlaunchError("the router does not listen yet")

    return read
