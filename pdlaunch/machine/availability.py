"""Asks by trying whether a port, a folder or a library can be used; never raises."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdlaunch.machine.facts import PortState

RESOLVE_TIMEOUT_S = 0.3

_PROBLEMS = {errno.EADDRINUSE: "busy", errno.EACCES: "privileged", errno.EADDRNOTAVAIL: "not here"}
IMPORT_TIMEOUT_S = 60.0


def probe_port(host: str, port: int) -> PortState | None:
    """Return whether an address can be listened on; port 0 (a free one) only asks for the host.

    None: the name of the host was not resolved in time.
    """
    found = _resolve(host, port)
    if found is None or isinstance(found, PortState):
        return found
    for family, kind, protocol, _, address in found:
        state = _try_to_bind(family, kind, protocol, address)
        if state.problem:
            return state
    return PortState()


def _try_to_bind(family: int, kind: int, protocol: int, address: Any) -> PortState:
    try:
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: a port whose last connections are still fading away is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return why_not_listening(error)
    return PortState()


def why_not_listening(error: OSError | UnicodeError | ValueError) -> PortState:
    """Return what the error says of an address at which nobody could listen."""
    detail = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, OSError) or isinstance(error, socket.gaierror):
        return PortState("unknown host", detail)
    match _PROBLEMS.get(error.errno or 0):
        case "busy":
            return PortState("busy", detail)
        case "privileged":
            return PortState("privileged", detail)
        case "not here":
            return PortState("not here", detail)
        case _:
            return PortState("other", detail)


def _resolve(host: str, port: int) -> list[tuple[Any, ...]] | PortState | None:
    """Resolve in a thread: a name server that does not answer must not hold up the check.

    Numbers need no name server, and no time that a busy machine may take for a thread.
    """
    flags = socket.AI_PASSIVE
    with contextlib.suppress(OSError, UnicodeError, ValueError):
        return list(
            socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=flags | socket.AI_NUMERICHOST
            )
        )
    answers: queue.SimpleQueue[list[tuple[Any, ...]] | PortState] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)))
        except (OSError, UnicodeError, ValueError) as error:
            answers.put(why_not_listening(error))

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        return answers.get(timeout=RESOLVE_TIMEOUT_S)
    except queue.Empty:
        return None


def why_not_writable(folder: str) -> str | None:
    """Return what keeps this user from writing to ``folder``; None: nothing. Nothing is left there.

    The folder need not exist yet. It is then not made under its own name, which a launch may be
    about to use, but under another one beside it.
    """
    try:
        path = Path(folder).absolute()
        nearest = next(known for known in (path, *path.parents) if os.path.lexists(known))
        if not nearest.is_dir():
            what = (
                "a link to nothing"
                if nearest.is_symlink() and not nearest.exists()
                else "no folder"
            )
            return f"{nearest} is {what}"
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.lstat()  # A name may be too long for its file system.
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    # Asked by trying: root may do anything by its modes, and still nothing can be made in /proc, on
    # a file system that is read-only, or on a full one.
    try:
        if nearest == path:
            _try_to_write(path)
        else:
            with tempfile.TemporaryDirectory(prefix=".pdlaunch-", dir=nearest) as made:
                _try_to_write(made)
    except PermissionError:
        return f"this user may not write to {nearest}"
    except OSError as error:
        missing = "" if nearest == path else f"{path} cannot be made: "
        return f"{missing}{nearest} takes nothing new: {error.strerror or error}"
    return None


def _try_to_write(folder: str | Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"pdlaunch")
        file.flush()


@dataclass(frozen=True, slots=True)
class ProcessOutcome:
    """Holds what a short-lived process has left."""

    returncode: int | None  # none: it could not be started, or was killed at its deadline
    output: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    """Lines of stdout and stderr, or why it could not be started, or how long it was waited for."""

    def problem(self) -> str:
        """Return in one line why it failed."""
        last = next((line.strip() for line in reversed(self.errors) if line.strip()), "")
        return last[:200] or f"exit code {self.returncode}"


def run_briefly(
    command: Sequence[str], environ: Mapping[str, str], timeout_s: float
) -> ProcessOutcome:
    """Run a process with this environment alone, and kill it at its deadline; never raises."""
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environ,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ProcessOutcome(None, errors=(f"not done after {timeout_s:g} s",))
    except (OSError, ValueError) as error:
        return ProcessOutcome(None, errors=(f"cannot be tried: {error}",))
    return ProcessOutcome(result.returncode, _lines(result.stdout), _lines(result.stderr))


def why_not_importable(path: str, environ: Mapping[str, str]) -> str | None:
    """Return why ``module:attribute`` cannot be imported, tried in a process of its own; None when
    it can.
    """
    module, _, name = path.partition(":")
    program = f"import importlib; getattr(importlib.import_module({module!r}), {name!r})"
    outcome = run_briefly([sys.executable, "-P", "-c", program], environ, IMPORT_TIMEOUT_S)
    return None if outcome.returncode == 0 else outcome.problem()


def _lines(text: bytes) -> tuple[str, ...]:
    return tuple(text.decode(errors="backslashreplace").splitlines())
