"""Spawns child processes, notices their end and signals them. Nothing here waits."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pdlaunch.launch.hosts.host import ProcessExited
from pdlaunch.planning.plan import ProcessSpec

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
