"""Asks by trying whether a port, a folder or a library can be used; never raises."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PortProblem = Literal["busy", "privileged", "not here", "unknown host", "other"]

_PROBLEMS: Mapping[int, PortProblem] = {
    errno.EADDRINUSE: "busy",
    errno.EACCES: "privileged",
    errno.EADDRNOTAVAIL: "not here",
}
IMPORT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class PortState:
    """Says whether an address can be listened on."""

    problem: PortProblem | None = None
    detail: str = ""


def probe_port(host: str, port: int) -> PortState:
    """Return whether an address can be listened on; port 0 (a free one) only asks for the host."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name may have several addresses, and a server listens at all of them.
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                # As servers do: a port whose last connections are still fading away is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except (OSError, UnicodeError, ValueError) as error:
        return why_not_listening(error)
    return PortState()


def why_not_listening(error: OSError | UnicodeError | ValueError) -> PortState:
    """Return what the error says of an address at which nobody could listen."""
    detail = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, OSError) or isinstance(error, socket.gaierror):
        return PortState("unknown host", detail)
    return PortState(_PROBLEMS.get(error.errno or 0, "other"), detail)


def why_not_writable(folder: str) -> str | None:
    """Return what keeps this user from writing to ``folder``; None: nothing. Nothing is left there.

    The folder need not exist yet. It is then not made under its own name, which a launch may be
    about to use, but under another one beside it.
    """
    try:
        path = Path(folder).absolute()
        nearest = next(known for known in (path, *path.parents) if os.path.lexists(known))
        if not nearest.is_dir():
            is_dangling = nearest.is_symlink() and not nearest.exists()
            return f"{nearest} is {'a link to nothing' if is_dangling else 'no folder'}"
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.lstat()  # A name may be too long for its file system.
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    # Asked by trying: root may do anything by its modes, and still nothing can be made in /proc, on
    # a file system that is read-only, or on a full one.
    try:
        with contextlib.ExitStack() as undo:
            made: str | Path = nearest
            if nearest != path:
                made = undo.enter_context(
                    tempfile.TemporaryDirectory(prefix=".pdlaunch-", dir=nearest)
                )
            file = undo.enter_context(tempfile.TemporaryFile(dir=made))
            file.write(b"pdlaunch")
            file.flush()
    except PermissionError:
        return f"this user may not write to {nearest}"
    except OSError as error:
        missing = "" if nearest == path else f"{path} cannot be made: "
        return f"{missing}{nearest} takes nothing new: {error.strerror or error}"
    return None


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
            text=True,
            errors="backslashreplace",
        )
    except subprocess.TimeoutExpired:
        return ProcessOutcome(None, errors=(f"not done after {timeout_s:g} s",))
    except (OSError, ValueError) as error:
        return ProcessOutcome(None, errors=(f"cannot be tried: {error}",))
    lines = (tuple(text.splitlines()) for text in (result.stdout, result.stderr))
    return ProcessOutcome(result.returncode, *lines)


def why_not_importable(path: str, environ: Mapping[str, str]) -> str | None:
    """Return why ``module:attribute`` cannot be imported, tried in a process of its own; None when
    it can.
    """
    module, _, name = path.partition(":")
    program = f"import importlib; getattr(importlib.import_module({module!r}), {name!r})"
    # In a process of its own: a library that crashes at import would take the command with it.
    outcome = run_briefly([sys.executable, "-P", "-c", program], environ, IMPORT_TIMEOUT_S)
    return None if outcome.returncode == 0 else outcome.problem()
