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
_Waiting = queue.SimpleQueue[tuple[Any, bytes] | None]


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
    writers: list[tuple[_Waiting, threading.Thread]] = []
    out, err = sys.stdout, sys.stderr
    redirects = ((contextlib.redirect_stdout, out), (contextlib.redirect_stderr, err))
    with contextlib.ExitStack() as stack:
        # A stream is None where it was closed before the command started.
        for redirect, stream in ((how, stream) for how, stream in redirects if stream is not None):
            # One thread for one terminal: lines of both streams stay in order. A reader of standard
            # output that stands still must not keep errors back.
            if not writers or not _is_same(out, err):
                waiting: _Waiting = queue.SimpleQueue()
                writer = threading.Thread(target=_write, args=(waiting,), daemon=True)
                writer.start()
                writers.append((waiting, writer))
            stack.enter_context(redirect(_Steady(stream, writers[-1][0])))
        try:
            yield
        finally:
            for waiting, writer in writers:
                waiting.put(None)
                writer.join(finish_s)


def _is_same(one: TextIO, other: TextIO) -> bool:
    """Tell whether both are the same terminal, pipe or file."""
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except OSError:  # One has no descriptor, as in tests.
        return False


def _write(waiting: _Waiting) -> None:
    """Write what was printed; what a stream does not take, because it is gone, is lost."""
    while (item := waiting.get()) is not None:
        raw, data = item
        with contextlib.suppress(OSError):
            while data:
                num_taken = raw.write(data)
                if num_taken is None:  # Whoever shares the terminal lets no write to it wait.
                    select.select([], [raw], [])
                else:
                    data = data[num_taken:]


class _Steady(io.TextIOBase):
    """Takes what is printed to ``stream``, for a thread to write."""

    def __init__(self, stream: TextIO, waiting: _Waiting) -> None:
        self.isatty = stream.isatty  # type: ignore[method-assign]
        self.fileno = stream.fileno  # type: ignore[method-assign]
        self._encoding = stream.encoding
        # A buffer has a lock, at which the interpreter would find a stuck thread when it exits.
        self._raw: Any = getattr(stream.buffer, "raw", stream.buffer)
        self._waiting = waiting

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def write(self, text: str, /) -> int:
        if self._waiting.qsize() < MAX_WRITES:
            # What the encoding lacks is escaped.
            self._waiting.put((self._raw, text.encode(self._encoding, "backslashreplace")))
        return len(text)
