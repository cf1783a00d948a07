"""Keeps a command running when its terminal, pipe or file accepts no more output."""

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

MAX_WRITES = 10_000  # most calls of ``print`` that wait for a reader; further ones are lost
FINISH_S = 2.0  # how long the end of a command waits for a reader that does not read

# Not ``queue.Queue``, which has a lock. A finalizer may run at any time and print in the middle of
# another print of the same thread, and would wait for that lock forever.
_Waiting = queue.SimpleQueue[tuple[Any, bytes] | None]


def standard_input() -> int:
    """Return the descriptor of standard input. Raises ConfigError when there is none."""
    if sys.stdin is None:
        raise ConfigError("--stop-on-stdin-eof: standard input is closed already; give it a pipe")
    return 0


@contextlib.contextmanager
def steady_output(finish_s: float = FINISH_S) -> Iterator[None]:
    """Let threads write to standard output and error, so that ``print`` neither waits for a reader
    nor raises OSError.

    At the end, wait up to ``finish_s`` for each reader to take the remaining output.
    """
    writers: list[tuple[_Waiting, threading.Thread]] = []
    out, err = sys.stdout, sys.stderr
    redirects = ((contextlib.redirect_stdout, out), (contextlib.redirect_stderr, err))
    with contextlib.ExitStack() as stack:
        # A stream is None if it was closed before the command started.
        for redirect, stream in ((how, stream) for how, stream in redirects if stream is not None):
            # If both streams are one terminal, one thread keeps their lines in order. Otherwise
            # two threads, so that a stuck reader of standard output does not hold errors back.
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
    """Return True if both are the same terminal, pipe or file."""
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except OSError:  # One has no descriptor, as in tests.
        return False


def _write(waiting: _Waiting) -> None:
    """Write the printed data. Data for a stream that is closed is lost."""
    while (item := waiting.get()) is not None:
        raw, data = item
        with contextlib.suppress(OSError):
            while data:
                num_taken = raw.write(data)
                if num_taken is None:  # The descriptor is non-blocking; another process set that.
                    select.select([], [raw], [])
                else:
                    data = data[num_taken:]


class _Steady(io.TextIOBase):
    """Queues the output to ``stream`` for a thread that writes it."""

    def __init__(self, stream: TextIO, waiting: _Waiting) -> None:
        self.isatty = stream.isatty  # type: ignore[method-assign]
        self.fileno = stream.fileno  # type: ignore[method-assign]
        self._encoding = stream.encoding
        # Raw, because a buffer has a lock: if a stuck thread holds it, the interpreter cannot exit.
        self._raw: Any = getattr(stream.buffer, "raw", stream.buffer)
        self._waiting = waiting

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def write(self, text: str, /) -> int:
        if self._waiting.qsize() < MAX_WRITES:
            # Characters that the encoding lacks are escaped.
            self._waiting.put((self._raw, text.encode(self._encoding, "backslashreplace")))
        return len(text)
