"""Collects the events of a launch. Signal handlers only append; the supervisor's loop acts."""

import contextlib
import math
import os
import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import zmq

from pdlaunch.launch.hosts.local import LocalHost, MessageReceived, ProcessExited
from pdlaunch.protocol.process.run_dirs import CONTROL_SOCKET


@dataclass(frozen=True, slots=True)
class StopRequested:
    signal_number: int
    reason: str = ""  # shown to users; empty: show the name of the signal


@dataclass(frozen=True, slots=True)
class FolderLost:
    path: Path
    is_logs: bool  # True: the log folder, which is created again; False: the run folder


Event = MessageReceived | ProcessExited | StopRequested | FolderLost
FOLDER_CHECK_S = 2.0


class SignalInbox:
    """Collects stop signals between ``__enter__`` and ``__exit__``.

    ``fileno`` becomes readable with each signal. Only the main thread can install handlers: in
    other threads the inbox stays empty.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # The interpreter writes the number of each signal with a handler to this socket.
            wakeup = self._writer.fileno()
            self._wakeup_before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
            wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
            if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
                wanted.remove(signal.SIGHUP)  # ignored by `nohup`: keep it ignored
            self._before = {number: signal.signal(number, lambda *_: None) for number in wanted}
        return self

    def __exit__(self, *error: object) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        return self._reader.fileno()

    def take(self) -> list[int]:
        with contextlib.suppress(BlockingIOError):
            return [number for number in self._reader.recv(4096) if number in self._before]
        return []


@dataclass(eq=False)
class EventQueue:
    host: LocalHost
    signals: SignalInbox
    lifeline: int | None = None  # a pipe that ends when the process that started the launch is gone
    run_dir: Path | None = None  # the removal of these folders is reported
    log_dir: Path | None = None

    def __post_init__(self) -> None:
        self._poller = zmq.Poller()
        for source in (*self.host.sources, self.signals.fileno(), self.lifeline):
            if source is not None:
                self._poller.register(source, zmq.POLLIN)

    def wait(self, timeout_s: float) -> Sequence[Event]:
        readable = dict(self._poller.poll(math.ceil(min(timeout_s, FOLDER_CHECK_S) * 1000)))
        stops = [StopRequested(number) for number in self.signals.take()]
        lifeline = self.lifeline
        if lifeline is not None and lifeline in readable and not os.read(lifeline, 4096):
            # A pipe at its end of file stays readable: the loop would spin.
            self._poller.unregister(lifeline)
            stops.append(StopRequested(signal.SIGHUP, "the process that started this is gone"))
        lost = []
        if self.run_dir is not None and not (self.run_dir / CONTROL_SOCKET).exists():
            lost.append(FolderLost(self.run_dir, is_logs=False))
            self.run_dir = None
        if self.log_dir is not None and not self.log_dir.exists():
            with contextlib.suppress(OSError):
                self.log_dir.mkdir(mode=0o700, parents=True)
                lost.append(FolderLost(self.log_dir, is_logs=True))
        # Read exits before messages: after its exit, all messages of a process have arrived.
        exits = self.host.exits()
        return [*lost, *causes_first(stops, exits, self.host.messages())]


def causes_first(
    stops: Sequence[StopRequested],
    exits: Sequence[ProcessExited],
    messages: Sequence[MessageReceived],
) -> list[Event]:
    """Return simultaneous events in an order that puts causes before their consequences.

    The first failure is reported as the root cause. Processes killed from outside come first, then
    those that crashed (as ranks do if a rank of their group is gone), then messages, which may
    report errors, and then exit codes.
    """
    # Negative exit codes are signals. ``by_itself`` is False for signals from outside.
    killed = [gone for gone in exits if gone.returncode < 0]
    left = [gone for gone in exits if gone.returncode >= 0]
    return [*stops, *sorted(killed, key=lambda gone: gone.by_itself), *messages, *left]
