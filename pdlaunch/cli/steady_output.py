"""Keeps a command running whose terminal, pipe or file takes no more of what it prints."""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from pdlaunch.errors import ConfigError

MAX_WRITES = 10_000  # how many calls of ``print`` wait for a reader; more are lost
FINISH_S = 2.0  # how long the end of a command waits for a reader that stands still


def standard_input() -> int:
    """Return the descriptor of standard input. Raises ConfigError when there is none."""
    if sys.stdin is None:
        raise ConfigError("--stop-on-stdin-eof: standard input is closed already; give it a pipe")
    return 0


@contextlib.contextmanager
def steady_output(finish_s: float = FINISH_S) -> Iterator[None]:
    """Let threads write what is printed to standard output and error, so that nobody else waits for
    their readers, nor sees an OSError of theirs.

    The end waits up to ``finish_s`` for each reader to take what is left.
    """
    writer: _Writer | None = None
    with contextlib.ExitStack() as stack:
        for redirect, stream in (
            (contextlib.redirect_stdout, sys.stdout),
            (contextlib.redirect_stderr, sys.stderr),
        ):
            if stream is None:  # It was closed before the command started.
                continue
            # One thread for one terminal: lines of both streams stay in their order.
            if writer is None or not writer.writes_to(stream):
                writer = _Writer(stream)
                stack.callback(writer.finish, finish_s)
            stack.enter_context(redirect(writer.text(stream.encoding)))
        yield


class _Writer(io.RawIOBase):
    """Has a thread write to ``stream``, until an OSError says that it takes nothing any more."""

    def __init__(self, stream: TextIO) -> None:
        self.isatty = stream.isatty  # type: ignore[method-assign]
        self.fileno = stream.fileno  # type: ignore[method-assign]
        # A buffer has a lock, at which the interpreter would find a stuck thread when it exits.
        self._raw: Any = getattr(stream.buffer, "raw", stream.buffer)
        # ``queue.Queue`` has a lock, at which a print would wait for itself that interrupts a
        # print: a finalizer, at any collection of garbage.
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="steady-output", daemon=True)
        self._thread.start()

    def text(self, encoding: str) -> TextIO:
        """Return what may be printed to instead; what ``encoding`` lacks is escaped."""
        # typeshed asks for files that can be read, too.
        raw: Any = self
        return io.TextIOWrapper(raw, encoding, errors="backslashreplace", write_through=True)

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        written = bytes(data)
        if self._thread.is_alive() and self._queue.qsize() < MAX_WRITES:
            self._queue.put(written)
        return len(written)

    def close(self) -> None:
        """Stay open: the text of one stream that goes first would close that of the other one."""

    def writes_to(self, stream: TextIO) -> bool:
        """Tell whether ``stream`` is the same terminal, pipe or file."""
        try:
            return os.path.sameopenfile(self.fileno(), stream.fileno())
        except OSError:  # It has no descriptor, as in tests.
            return False

    def finish(self, timeout_s: float) -> None:
        """Write what is left, as far as it is taken in time."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while (data := self._queue.get()) is not None:
                while data:
                    num_taken = self._raw.write(data)
                    if num_taken is None:  # Whoever shares the terminal lets no write to it wait.
                        select.select([], [self.fileno()], [])
                    else:
                        data = data[num_taken:]
