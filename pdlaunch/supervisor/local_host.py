"""This machine as the supervisor's host: child processes, the control channel and signals in one
poll.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from pdlaunch.errors import ProtocolError
from pdlaunch.process.bootstrap import Bootstrap
from pdlaunch.process.step_record import LastStep, new_step_record, read_step_record
from pdlaunch.protocol.control import FromSupervisor, Progress, from_supervisor, to_supervisor
from pdlaunch.resolve.plan import ProcessSpec
from pdlaunch.supervisor.children import Children
from pdlaunch.supervisor.host import Event, MessageReceived, ProcessExited, StopRequested
from pdlaunch.supervisor.signals import SignalInbox

logger = logging.getLogger(__name__)


class Bootstraps(Protocol):
    """Who knows what a child is given."""

    def prepare(self) -> None: ...

    def make(self, spec: ProcessSpec, incarnation: int) -> Bootstrap: ...


class LocalHost:
    """``Host`` and ``EventSource`` of a launch whose processes all run here.

    ``control``: bound ROUTER socket. ``lifeline``: a descriptor whose end asks for a stop, as its
    writer is then gone. ``listeners``: sockets of the public address, which each router inherits.
    """

    CONVERSION_POLL_S = 0.25
    """How often the progress of a conversion is read from its log."""

    def __init__(
        self,
        control: zmq.Socket[bytes],
        bootstraps: Bootstraps,
        children: Children,
        signals: SignalInbox,
        lifeline: int | None = None,
        listeners: Sequence[socket.socket] = (),
    ) -> None:
        self._control = control
        self._bootstraps = bootstraps
        self._children = children
        self._signals = signals
        self._poller = zmq.Poller()
        self._poller.register(control, zmq.POLLIN)
        self._poller.register(signals.fileno(), zmq.POLLIN)
        self._lifeline = lifeline
        if lifeline is not None:
            self._poller.register(lifeline, zmq.POLLIN)
        self._listeners = listeners
        self._stillborn: list[ProcessExited] = []
        self._conversions: dict[str, str] = {}
        self._step_records: dict[str, mmap.mmap] = {}

    def prepare(self) -> None:
        self._bootstraps.prepare()

    def spawn(self, spec: ProcessSpec, incarnation: int) -> None:
        if spec.kind == "convert":
            self._conversions[spec.name] = ""
            stillborn = self._children.spawn(spec, incarnation, b"")
        else:
            bootstrap = self._bootstraps.make(spec, incarnation)
            with self._new_step_record(spec) as step_record:
                inherited = [
                    *step_record,
                    *(() if bootstrap.router is None else bootstrap.router.listeners),
                ]
                for descriptor in step_record:
                    bootstrap = msgspec.structs.replace(bootstrap, step_record=descriptor)
                stillborn = self._children.spawn(
                    spec, incarnation, msgspec.json.encode(bootstrap) + b"\n", inherited
                )
        if stillborn is not None:
            self._stillborn.append(stillborn)
            return
        pidfd = next(fd for fd, name in self._children.pidfds().items() if name == spec.name)
        self._poller.register(pidfd, zmq.POLLIN)

    @contextlib.contextmanager
    def _new_step_record(self, spec: ProcessSpec) -> Iterator[list[int]]:
        """The descriptor that a rank 0 is to inherit; that of its predecessor is of no more use."""
        if spec.kind != "rank" or spec.tp_rank > 0:
            yield []
            return
        descriptor, self._step_records[spec.engine] = new_step_record()
        try:
            yield [descriptor]
        finally:
            os.close(descriptor)

    def signal(self, name: str, signal_number: int) -> None:
        self._children.signal(name, signal_number)

    def last_step(self, engine: str) -> LastStep:
        record = self._step_records.get(engine)
        return LastStep() if record is None else read_step_record(record)

    def send(self, name: str, message: FromSupervisor) -> None:
        self._control.send_multipart([name.encode(), from_supervisor.encode(message)])

    def close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()

    def wait(self, timeout_s: float | None) -> Sequence[Event]:
        """What has happened, causes first: signals, violent deaths, messages, orderly exits."""
        if self._stillborn:
            timeout_s = 0.0
        if self._conversions:
            timeout_s = min(self.CONVERSION_POLL_S, math.inf if timeout_s is None else timeout_s)
        ready: dict[Any, int] = dict(
            self._poller.poll(None if timeout_s is None else math.ceil(timeout_s * 1000))
        )
        exits = [*self._take_stillborn(), *self._reap(ready)]
        return [
            *(StopRequested(number) for number in self._signals.take()),
            *self._feel_lifeline(ready),
            # Ranks that were killed before those that died of it.
            *sorted(
                (gone for gone in exits if gone.returncode < 0), key=lambda gone: gone.by_itself
            ),
            *self._receive(),
            *self._conversion_progress(),
            *(gone for gone in exits if gone.returncode >= 0),
        ]

    def _feel_lifeline(self, ready: dict[Any, int]) -> list[StopRequested]:
        if self._lifeline is None or self._lifeline not in ready or os.read(self._lifeline, 4096):
            return []
        self._poller.unregister(self._lifeline)
        self._lifeline = None
        return [StopRequested(signal.SIGHUP, "whoever started this is gone")]

    def _reap(self, ready: dict[Any, int]) -> list[ProcessExited]:
        gone = {fd: name for fd, name in self._children.pidfds().items() if fd in ready}
        for fd in gone:
            self._poller.unregister(fd)
        for name in gone.values():
            self._conversions.pop(name, None)
        return [self._children.reap(name) for name in gone.values()]

    def _take_stillborn(self) -> list[ProcessExited]:
        stillborn, self._stillborn = self._stillborn, []
        return stillborn

    def _receive(self) -> list[MessageReceived]:
        messages: list[MessageReceived] = []
        while True:
            try:
                identity, *frames = self._control.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                messages.append(MessageReceived(identity.decode(), to_supervisor.decode(frames[0])))
            except (ProtocolError, UnicodeDecodeError, IndexError):
                logger.warning("malformed message from %r", identity[:80])

    def _conversion_progress(self) -> list[MessageReceived]:
        """A conversion prints lines such as ``[ 40%] reading weights``; the last one is its
        progress.
        """
        events = []
        for name, before in self._conversions.items():
            line = _last_stage(self._children.log_path(name))
            if line != before:
                self._conversions[name] = line
                events.append(MessageReceived(name, _read_progress(line)))
        return events


def _last_stage(log: Path) -> str:
    """Its last line such as ``[ 40%] reading weights``; what libraries and errors say is no
    progress.
    """
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.startswith("[")), "")


def _read_progress(line: str) -> Progress:
    percent, bracket, text = line.removeprefix("[").partition("%]")
    if bracket and percent.strip().isdigit():
        return Progress(text=text.strip(), fraction=int(percent) / 100)
    return Progress(text=line[:80])
