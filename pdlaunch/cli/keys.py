"""Reads single keys from a terminal, and gives it back as it was."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator
from typing import Literal

Key = Literal["up", "down", "left", "right", "enter", "escape"] | str
_SEQUENCES: dict[bytes, Key] = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1b[C": "right",
    b"\x1b[D": "left",
    b"\x1bOA": "up",
    b"\x1bOB": "down",
    b"\x1bOC": "right",
    b"\x1bOD": "left",
    b"\x1b": "escape",
    b"\r": "enter",
    b"\n": "enter",
}


@contextlib.contextmanager
def single_keys(descriptor: int) -> Iterator[None]:
    """Have the terminal give keys at once, and not show them, while the block runs.

    Ctrl-C still interrupts.
    """
    # Imported here: systems without it can still list commands.
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def read_keys(descriptor: int, timeout_s: float) -> list[Key]:
    """Return the keys that are pressed, at the latest after ``timeout_s``; perhaps none.

    Raises EOFError when the terminal is gone.
    """
    if not select.select([descriptor], [], [], timeout_s)[0]:
        return []
    read = os.read(descriptor, 1024)
    if not read:
        raise EOFError("the terminal is gone")
    keys: list[Key] = []
    while read:
        known = next((each for each in _SEQUENCES if read.startswith(each)), None)
        if known is None:
            keys.append(chr(read[0]))
            read = read[1:]
        else:
            keys.append(_SEQUENCES[known])
            # What else begins with an escape is a key that nobody asks for: dropped whole.
            read = b"" if known == b"\x1b" else read[len(known) :]
    return keys
