"""Runs processes of a launch on this machine as children, with a control channel to them."""

import contextlib
import logging
import mmap
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import zmq

from pdlaunch.errors import ProtocolError
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import (
    FromSupervisor,
    Register,
    ToSupervisor,
    from_supervisor,
    to_supervisor,
)
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.process.step_record import LastStep, new_step_record, read_step_record
from pdlaunch.protocol.wire import Message

logger = logging.getLogger(__name__)

_CANNOT_EXECUTE = 127
# Removed from children's environment, which others can read: children get keys on stdin.
HIDDEN_VARIABLES = frozenset(
    {"PDLAUNCH_API_KEY", "PDLAUNCH_ADMIN_API_KEY", "PDLAUNCH_ENGINE_API_KEY"}
)
# Signals caused by a fault of the process itself; other signals are sent from outside.
_OWN_SIGNALS = frozenset(
    getattr(signal, f"SIG{name}") for name in ("SEGV", "ABRT", "BUS", "FPE", "ILL", "TRAP", "SYS")
)


@dataclass(frozen=True, slots=True)
class MessageReceived:
    name: str
    message: ToSupervisor


class ProcessExited(Message):
    """A process has ended; the rest of its process group is killed. Agents send this, too."""

    name: str
    incarnation: int
    returncode: int  # exit code; negative: the signal that killed the process
    lost_with: str = ""  # the lost host and the reason; empty: the process itself was seen to end
    last_step: LastStep = LastStep()  # last step of a rank's engine; empty for other processes

    @property
    def by_itself(self) -> bool:
        """Return True unless it was killed from outside, by a user or the out-of-memory killer."""
        return self.returncode >= 0 or -self.returncode in _OWN_SIGNALS

    def how(self) -> str:
        if self.lost_with:
            return f"was lost with its host {self.lost_with}"
        if self.returncode >= 0:
            return f"ended with exit code {self.returncode}"
        number = -self.returncode
        known = number in signal.valid_signals() and number < signal.SIGRTMIN
        hint = ", perhaps for lack of memory" if number == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(number).name if known else f'signal {number}'}{hint}"


@dataclass(frozen=True, slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    incarnation: int
    pidfd: int


class LocalHost:
    """Runs processes of a launch on this machine as children, with a control channel to them. Only
    ``close`` blocks. ``HostGroup`` adds other hosts, each with an agent.

    Each child leads its own session, so Ctrl-C at the terminal reaches only the supervisor. Call
    ``spawn`` in a thread that lives as long as the launch: the kernel sends the parent-death signal
    when the thread ends.
    """

    CLOSE_TIMEOUT_S = 5.0

    def __init__(self, control: zmq.Socket[bytes], log_dir: Path, ports: EnginePorts) -> None:
        self._control = control
        self._log_dir = log_dir
        self._engine_ports = ports
        self._children: dict[str, _Child] = {}  # running processes, by name
        # By engine: the step record of rank 0, in shared memory that outlives the rank.
        self._step_records: dict[str, mmap.mmap] = {}
        self._ended = select.epoll()  # watches the pidfds of all children

    @property
    def sources(self) -> Sequence[zmq.Socket[bytes] | int]:
        """Return the sockets and descriptors that an exit or a message makes readable; constant."""
        return (self._control, self._ended.fileno())

    def log_path(self, name: str) -> Path:
        return self._log_dir / f"{name.replace('/', '.')}.log"

    def spawn(
        self, spec: ProcessSpec, incarnation: int, bootstrap: Bootstrap
    ) -> ProcessExited | None:
        """Start a process with ``bootstrap`` on its standard input; return an exit if it fails."""
        inherited: list[int] = []  # descriptors that the child gets with the same numbers
        step_record = None
        if bootstrap.router is not None:
            inherited += bootstrap.router.listeners
        if spec.kind == "rank" and spec.tp_rank == 0:
            step_record, self._step_records[spec.engine] = new_step_record()
            inherited.append(step_record)
            bootstrap = msgspec.structs.replace(bootstrap, step_record=step_record)
        if spec.name in self._engine_ports:
            bootstrap = msgspec.structs.replace(bootstrap, port_is_kept=True)
        shown = {name: os.environ[name] for name in os.environ.keys() - HIDDEN_VARIABLES}
        with self._open_log(spec.name) as log:
            try:
                if incarnation > 1:
                    with contextlib.suppress(OSError):
                        log.write(f"--- incarnation {incarnation}\n".encode())
                process = subprocess.Popen(
                    spec.command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=shown | spec.environment,
                    start_new_session=True,
                    bufsize=0,
                    pass_fds=inherited,
                )
            except OSError as error:
                logger.error("%s cannot be started: %s", spec.name, error)
                with contextlib.suppress(OSError):
                    log.write(f"cannot be started: {error}\n".encode())
                return ProcessExited(spec.name, incarnation, _CANNOT_EXECUTE)
            finally:
                if step_record is not None:
                    os.close(step_record)
        # Unlike a pid, a pidfd is never reused for another process, and can be polled.
        pidfd = os.pidfd_open(process.pid)
        self._children[spec.name] = _Child(process, incarnation, pidfd)
        self._ended.register(pidfd, select.EPOLLIN)
        assert process.stdin is not None
        first_line = msgspec.json.encode(bootstrap) + b"\n"
        assert len(first_line) < 32 * 1024, "fits the pipe's buffer: the write cannot block"
        # If the child is dead already, ``exits`` reports it.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(first_line)
        return None

    def _open_log(self, name: str) -> IO[bytes]:
        """Open the log for appending, or /dev/null if that fails: a full disk ends no launch."""
        try:
            # The folder may have been removed.
            self._log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self.log_path(name).open("ab", buffering=0)
        except OSError as error:
            logger.error("no log for %s: %s", name, error)
            return Path(os.devnull).open("ab", buffering=0)

    def signal(self, name: str, signal_number: int) -> None:
        child = self._children.get(name)
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal_number)

    def send(self, name: str, message: FromSupervisor) -> None:
        """Queue a message; it is lost if the process is not connected."""
        self._control.send_multipart([name.encode(), from_supervisor.encode(message)])

    def exits(self) -> list[ProcessExited]:
        ended = {pidfd for pidfd, _ in self._ended.poll(0)}
        children = list(self._children.items())
        return [self._bury(name) for name, child in children if child.pidfd in ended]

    def _bury(self, name: str) -> ProcessExited:
        """Kill the rest of an ended child's process group, and reap the child."""
        # Before the wait: until then, the id of the group cannot be reused.
        self.signal(name, signal.SIGKILL)
        child = self._children.pop(name)
        returncode = child.process.wait()
        self._ended.unregister(child.pidfd)
        os.close(child.pidfd)
        if child.process.stdin is not None:
            child.process.stdin.close()
        # Rank 0 records the step of all ranks, whichever of them dies.
        engine, _, rank = name.partition("/")
        record = self._step_records.get(engine) if rank else None
        last_step = LastStep() if record is None else read_step_record(record)
        return ProcessExited(name, child.incarnation, returncode, last_step=last_step)

    def messages(self) -> list[MessageReceived]:
        """Return the messages since the last call, oldest first. The call after ``exits`` returns
        the last messages of the processes that have ended.
        """
        found: list[MessageReceived] = []
        while True:
            try:
                identity, *frames = self._control.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return found
            try:
                received = MessageReceived(identity.decode(), to_supervisor.decode(frames[0]))
            except (ProtocolError, UnicodeDecodeError, IndexError):
                # A faulty child must not end the launch.
                logger.warning("malformed message from %r", identity[:80])
                continue
            message = received.message
            if isinstance(message, Register) and message.listens:
                # Hold the port before others get the URL. A server has its engine's name.
                self._engine_ports.keep(received.name, message.address.http)
            found.append(received)

    def forget(self, engine: str) -> None:
        if (record := self._step_records.pop(engine, None)) is not None:
            record.close()
        self._engine_ports.release(engine)

    def close(self) -> None:
        """Kill and reap all remaining processes; needed after an error."""
        # Signal all processes before waiting for the first.
        for name in list(self._children):
            self.signal(name, signal.SIGKILL)
        for name, child in list(self._children.items()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(self.CLOSE_TIMEOUT_S)
                self._bury(name)
        self._ended.close()
