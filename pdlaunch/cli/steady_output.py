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

# ``queue.Queue`` has a lock, at which a print would wait for itself that interrupts a print: a
# finalizer, at any collection of garbage.
_Waiting = queue.SimpleQueue["tuple[_Stream, bytes] | None"]


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
    waiting: _Waiting | None = None
    before: TextIO | None = None
    with contextlib.ExitStack() as stack:
        for redirect, stream in (
            (contextlib.redirect_stdout, sys.stdout),
            (contextlib.redirect_stderr, sys.stderr),
        ):
            # A stream is None where it was closed before the command started.
            if stream is None:
                continue
            # One thread for one terminal: lines of both streams stay in order. A reader of standard
            # output that stands still must not keep errors back.
            if waiting is None or before is None or not _is_same(before, stream):
                waiting = stack.enter_context(_written(finish_s))
            stack.enter_context(redirect(_Stream(stream, waiting).text(stream.encoding)))
            before = stream
        yield


@contextlib.contextmanager
def _written(finish_s: float) -> Iterator[_Waiting]:
    """Yield a queue whose items a thread writes."""
    waiting: _Waiting = queue.SimpleQueue()
    writer = threading.Thread(target=_write, args=(waiting,), name="steady-output", daemon=True)
    writer.start()
    try:
        yield waiting
    finally:
        waiting.put(None)
        writer.join(finish_s)


def _is_same(one: TextIO, other: TextIO) -> bool:
    """Tell whether both are the same terminal, pipe or file."""
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except OSError:  # One has no descriptor, as in tests.
        return False


def _write(waiting: _Waiting) -> None:
    while (item := waiting.get()) is not None:
        stream, data = item
        stream.send(data)


class _Stream(io.RawIOBase):
    """Takes what is printed to ``stream``, for a thread to write."""

    def __init__(self, stream: TextIO, waiting: _Waiting) -> None:
        self.isatty = stream.isatty  # type: ignore[method-assign]
        self.fileno = stream.fileno  # type: ignore[method-assign]
        # A buffer has a lock, at which the interpreter would find a stuck thread when it exits.
        self._raw: Any = getattr(stream.buffer, "raw", stream.buffer)
        self._waiting = waiting
        self._is_gone = False

    def text(self, encoding: str) -> TextIO:
        """Return what may be printed to; what ``encoding`` lacks is escaped."""
        # typeshed asks for files that can be read, too.
        raw: Any = self
        return io.TextIOWrapper(raw, encoding, errors="backslashreplace", write_through=True)

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        written = bytes(data)
        if not self._is_gone and self._waiting.qsize() < MAX_WRITES:
            self._waiting.put((self, written))
        return len(written)

    def send(self, data: bytes) -> None:
        """Write to the stream, until an OSError says that it takes nothing any more."""
        try:
            while data and not self._is_gone:
                num_taken = self._raw.write(data)
                if num_taken is None:  # Whoever shares the terminal lets no write to it wait.
                    select.select([], [self.fileno()], [])
                else:
                    data = data[num_taken:]
        except OSError:
            self._is_gone = True
