"""Runs an engine's command as a child that does not outlive this process."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from pdlaunch.errors import StartupError

_PR_SET_PDEATHSIG = 1
_GUARD = "trap '' HUP INT TERM; read _; kill -9 0"
_libc = ctypes.CDLL(None)


class EngineChild:
    """Holds the process of an engine; belongs to the event loop.

    It stays in the process group of the sidecar, so that the supervisor's signals reach it and
    nothing of it is left when the sidecar is buried. Its output goes where the sidecar's goes.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str]) -> EngineChild:
        """Start the command; ``environment`` goes over this process's. Raises StartupError."""
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, **environment},
                # Forked by the main thread, which lives as long as the sidecar: the kernel sends
                # the signal when that thread ends.
                preexec_fn=die_with_thread,
            )
        except OSError as error:
            raise StartupError(
                f"{command[0]} cannot be started: {os.strerror(error.errno or 0)}; set "
                "engine_command to the executable of vLLM, or put it on PATH"
            ) from None
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ended(self) -> str:
        """Wait for the end of the process; return how it ended, in words."""
        code = await self._process.wait()
        return (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"exited with status {code}"
        )

    async def stop(self, timeout_s: float) -> None:
        """Ask it to end; kill it when it has not within ``timeout_s``."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            try:
                await asyncio.wait_for(self._process.wait(), timeout_s)
            except TimeoutError:
                continue
            return


def guard_group() -> subprocess.Popen[bytes]:
    """Have all processes of this one's group killed as soon as this one is gone.

    A signal at a parent's death reaches children alone: the server of an engine would go, and the
    processes that it has started, which compute and hold the memory, would stay.
    """
    assert os.getpgid(0) == os.getpid(), "it leads its own group"
    # The other end is open for as long as this process lives.
    read_end, _ = os.pipe()
    try:
        return subprocess.Popen(("sh", "-c", _GUARD), stdin=read_end, stdout=subprocess.DEVNULL)
    finally:
        os.close(read_end)


def die_with_thread() -> None:
    """Have the kernel kill this process when the thread that has forked it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
