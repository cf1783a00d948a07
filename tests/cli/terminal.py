"""A pseudo-terminal on which a command of pdlaunch runs, whose screen pyte keeps as a terminal
would.
"""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pyte

ROOT = Path(__file__).parents[2]
ENTER_SCREEN, LEAVE_SCREEN, SHOW_CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"


def _begin_session() -> None:
    # Ctrl-C is typed: the terminal makes a signal of it.
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # Tests under nohup would hand down that it is ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Terminal:
    """Runs ``pdlaunch top`` on a terminal of a size; ``screen`` is what a person sees."""

    def __init__(
        self,
        *arguments: str,
        columns: int = 80,
        rows: int = 24,
        **environ: str,
    ) -> None:
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.written = b""
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._theirs = theirs
        self.before = termios.tcgetattr(theirs)
        known = {name: value for name, value in os.environ.items() if not name.startswith("PDL")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pdlaunch", "top", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_begin_session,
            env=known | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)} | environ,
        )

    def until(self, condition: Callable[[str], object]) -> str:
        until_at = time.monotonic() + 180
        while not condition("\n".join(self.screen.display)):
            assert time.monotonic() < until_at, "\n".join(self.screen.display)
            self.read(0.2)
        return "\n".join(self.screen.display)

    def read(self, timeout_s: float) -> None:
        if select.select([self._ours], [], [], timeout_s)[0]:
            written = os.read(self._ours, 65536)
            self.written += written
            self._stream.feed(written)

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def end(self) -> int:
        while self.process.poll() is None:
            self.read(0.1)
        while select.select([self._ours], [], [], 0.2)[0]:
            self.read(0.0)
        return self.process.returncode

    def is_restored(self) -> bool:
        left = self.written.rfind(LEAVE_SCREEN) > self.written.rfind(ENTER_SCREEN)
        shown = self.written.rfind(SHOW_CURSOR) > self.written.rfind(b"\x1b[?25l")
        return left and shown and termios.tcgetattr(self._theirs) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)
