"""Runs processes of a launch on this machine: children, and the control channel to them."""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import zmq

from pdlaunch.errors import ProtocolError
from pdlaunch.launch.hosts.host import MessageReceived, ProcessExited
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import (
    FromSupervisor,
    Progress,
    Register,
    from_supervisor,
    to_supervisor,
)
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.process.step_record import LastStep, new_step_record, read_step_record

logger = logging.getLogger(__name__)

_CANNOT_EXECUTE = 127
HIDDEN_VARIABLES = frozenset(
    {"PDLAUNCH_API_KEY", "PDLAUNCH_ADMIN_API_KEY", "PDLAUNCH_ENGINE_API_KEY"}
)
"""These are not handed on: children get keys on standard input, as their environment can be read by
others.
"""


@dataclass(frozen=True, slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    incarnation: int
    pidfd: int


class Children:
    """Holds the child processes that live.

    Each leads its own session, so that Ctrl-C at the terminal reaches the supervisor alone.

    Spawn from a thread that lives as long as the launch: the kernel's parent-death signal goes by
    thread.
    """

    CLOSE_TIMEOUT_S = 5.0

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._children: dict[str, _Child] = {}
        self._ended = select.epoll()
        """Watches the pidfds of all children."""

    def fileno(self) -> int:
        """Return a descriptor that is readable while there is an ended child to reap."""
        return self._ended.fileno()

    def log_path(self, name: str) -> Path:
        """Return the file that gets standard output and error of all incarnations of a process."""
        return self._log_dir / f"{name.replace('/', '.')}.log"

    def spawn(
        self, spec: ProcessSpec, incarnation: int, first_line: bytes, inherited: Sequence[int] = ()
    ) -> ProcessExited | None:
        """Start a process and give it ``first_line``; return its end when it cannot be started.

        ``inherited``: descriptors of ours that it gets under the same numbers. Its standard input
        stays open: the end of it tells the child that the supervisor is gone.
        """
        with self._open_log(spec.name) as log:
            try:
                process = self._popen(spec, incarnation, log, inherited)
            except OSError as error:
                logger.error("%s cannot be started: %s", spec.name, error)
                with contextlib.suppress(OSError):
                    log.write(f"cannot be started: {error}\n".encode())
                return ProcessExited(spec.name, incarnation, _CANNOT_EXECUTE)
        # Unlike a pid it cannot come to mean another process, and it can be waited for.
        pidfd = os.pidfd_open(process.pid)
        self._children[spec.name] = _Child(process, incarnation, pidfd)
        self._ended.register(pidfd, select.EPOLLIN)
        assert process.stdin is not None
        assert len(first_line) < 32 * 1024, "fits the pipe's buffer: the write cannot block"
        # A child that has died already has an exit that tells of it.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(first_line)
        return None

    def _open_log(self, name: str) -> IO[bytes]:
        """Open the log to append to it.

        A folder that somebody has removed is made again; a launch whose disk is full goes on
        without logs.
        """
        try:
            self._log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self.log_path(name).open("ab", buffering=0)
        except OSError as error:
            logger.error("no log for %s: %s", name, error)
            return Path(os.devnull).open("ab", buffering=0)

    @staticmethod
    def _popen(
        spec: ProcessSpec, incarnation: int, log: IO[bytes], inherited: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        if incarnation > 1:
            with contextlib.suppress(OSError):
                log.write(f"--- incarnation {incarnation}\n".encode())
        return subprocess.Popen(
            spec.command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if name not in HIDDEN_VARIABLES}
            | spec.environment,
            start_new_session=True,
            bufsize=0,
            pass_fds=inherited,
        )

    def reap(self) -> list[ProcessExited]:
        """Bury every child that has ended, and kill what it has left behind in its group."""
        ended = {pidfd for pidfd, _ in self._ended.poll(0)}
        names = [name for name, child in self._children.items() if child.pidfd in ended]
        return [self._bury(name) for name in names]

    def _bury(self, name: str) -> ProcessExited:
        child = self._children.pop(name)
        # Before the wait: until then nobody else can be given the number of the group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        returncode = child.process.wait()
        self._ended.unregister(child.pidfd)
        os.close(child.pidfd)
        if child.process.stdin is not None:
            child.process.stdin.close()
        return ProcessExited(name, child.incarnation, returncode)

    def signal(self, name: str, signal_number: int) -> None:
        """Signal the process and its group; ignored when it is gone."""
        child = self._children.get(name)
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal_number)

    def close(self) -> None:
        """Kill and bury whatever is left, for the way out after an error.

        Waits at most ``CLOSE_TIMEOUT_S`` for each process.
        """
        # All are signalled before the first is waited for.
        for name in list(self._children):
            self.signal(name, signal.SIGKILL)
        for name, child in list(self._children.items()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(self.CLOSE_TIMEOUT_S)
                self._bury(name)
        self._ended.close()


logger = logging.getLogger(__name__)

CONVERSION_POLL_S = 0.25
"""Seconds between two looks: the progress of a conversion is read from its log."""


class LocalHost:
    """This machine as a ``Host``. ``control``: the bound ROUTER socket of the control channel."""

    def __init__(
        self, control: zmq.Socket[bytes], children: Children, engine_ports: EnginePorts
    ) -> None:
        self._control = control
        self._children = children
        self._engine_ports = engine_ports
        self._stillborn: list[ProcessExited] = []
        self._conversions: dict[str, str] = {}
        """The last line of progress by conversion that runs."""
        self._step_records: dict[str, mmap.mmap] = {}
        """The record of rank 0 by engine; it outlives the rank that wrote to it."""

    @property
    def sources(self) -> Sequence[zmq.Socket[bytes] | int]:
        return (self._control, self._children.fileno())

    @property
    def poll_s(self) -> float:
        if self._stillborn:
            return 0.0
        return CONVERSION_POLL_S if self._conversions else math.inf

    def spawn(self, spec: ProcessSpec, incarnation: int, bootstrap: Bootstrap | None) -> None:
        if spec.kind == "convert":
            self._conversions[spec.name] = ""
        inherited: list[int] = []
        if bootstrap is not None and bootstrap.router is not None:
            inherited += bootstrap.router.listeners
        with self._new_step_record(spec) as step_record:
            if bootstrap is not None and step_record is not None:
                inherited.append(step_record)
                # A descriptor has the same number in the child that inherits it.
                bootstrap = msgspec.structs.replace(bootstrap, step_record=step_record)
            if bootstrap is not None and spec.name in self._engine_ports:
                bootstrap = msgspec.structs.replace(bootstrap, port_is_kept=True)
            first_line = b"" if bootstrap is None else msgspec.json.encode(bootstrap) + b"\n"
            stillborn = self._children.spawn(spec, incarnation, first_line, inherited)
        if stillborn is not None:
            self._stillborn.append(stillborn)

    @contextlib.contextmanager
    def _new_step_record(self, spec: ProcessSpec) -> Iterator[int | None]:
        """Yield the descriptor that a rank 0 is to inherit; it takes the place of its predecessor's
        record.
        """
        if spec.kind != "rank" or spec.tp_rank > 0:
            yield None
            return
        descriptor, self._step_records[spec.engine] = new_step_record()
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def signal(self, name: str, signal_number: int) -> None:
        self._children.signal(name, signal_number)

    def send(self, name: str, message: FromSupervisor) -> None:
        self._control.send_multipart([name.encode(), from_supervisor.encode(message)])

    def exits(self) -> list[ProcessExited]:
        stillborn, self._stillborn = self._stillborn, []
        exits = [*stillborn, *self._children.reap()]
        for gone in exits:
            self._conversions.pop(gone.name, None)
        return exits

    def messages(self) -> list[MessageReceived]:
        return [*self._receive(), *self._conversion_progress()]

    def log_path(self, name: str) -> Path:
        return self._children.log_path(name)

    def last_step(self, engine: str) -> LastStep:
        record = self._step_records.get(engine)
        return LastStep() if record is None else read_step_record(record)

    def forget_last_step(self, engine: str) -> None:
        """Drop what its ranks computed before they died."""
        if (record := self._step_records.pop(engine, None)) is not None:
            record.close()

    def forget(self, engine: str) -> None:
        self.forget_last_step(engine)
        self._engine_ports.release(engine)

    def _receive(self) -> Iterator[MessageReceived]:
        while True:
            try:
                identity, *frames = self._control.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                received = MessageReceived(identity.decode(), to_supervisor.decode(frames[0]))
            except (ProtocolError, UnicodeDecodeError, IndexError):
                # A broken child must not end the launch of all.
                logger.warning("malformed message from %r", identity[:80])
                continue
            message = received.message
            if isinstance(message, Register) and message.listens:
                # Before anybody is told the URL. Servers have the names of their engines.
                self._engine_ports.keep(received.name, message.address.http)
            yield received

    def _conversion_progress(self) -> Iterator[MessageReceived]:
        """Yield what conversions print about their progress.

        They print lines such as ``[ 40%] reading weights``; the last one counts.
        """
        for name, before in self._conversions.items():
            line = _last_stage(self.log_path(name))
            if line != before:
                self._conversions[name] = line
                yield MessageReceived(name, _read_progress(line))


def _last_stage(log: Path) -> str:
    """Return the last line such as ``[ 40%] reading weights``; other lines come from libraries, or
    are errors.
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
