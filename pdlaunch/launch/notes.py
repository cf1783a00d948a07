"""Tells people what happens to a launch: on the terminal, in the log, and through the router."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import msgspec

from pdlaunch.launch.hosts.host import Host
from pdlaunch.launch.processes import LaunchProcesses
from pdlaunch.launch.status import Observer
from pdlaunch.protocol.control import Happened

logger = logging.getLogger(__name__)

MAX_NOTES = 100


class Notes:
    """Passes each note on, and keeps the last ones for the next router."""

    def __init__(
        self,
        observer: Observer,
        host: Host,
        processes: LaunchProcesses,
        clock: Callable[[], float],
    ) -> None:
        self._observer = observer
        self._host = host
        self._processes = processes
        self._clock = clock
        self._kept: deque[tuple[float, Happened]] = deque(maxlen=MAX_NOTES)

    def add(self, text: str, *, prefill: str = "", decode: str = "") -> None:
        """Tell of something that a user should read once: a death, a restart, a drain.

        ``prefill``, ``decode``: the engines of a pair that has failed.
        """
        logger.info("%s", text)
        self._observer.note(text)
        happened = Happened(text=text, prefill=prefill, decode=decode)
        self._kept.append((self._clock(), happened))
        for instance in self._processes:
            if instance.spec.kind == "router" and instance.registration is not None:
                self._host.send(instance.name, happened)

    def show(self, line: str) -> None:
        """Show a line of the router's log, which keeps it."""
        self._observer.note(line)

    def repeat(self, router: str) -> None:
        """Tell a router that has just registered what has happened before."""
        for at, happened in self._kept:
            ago_s = self._clock() - at
            self._host.send(router, msgspec.structs.replace(happened, ago_s=ago_s))
