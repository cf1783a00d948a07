"""Asks the Linux kernel for what it knows and grants."""

from __future__ import annotations

import ctypes
from pathlib import Path

SLACK_NS = 1000
_PR_SET_TIMERSLACK = 29


def host_identity(proc: Path = Path("/proc")) -> str:
    """Return a text that is equal in two processes that reach each other's abstract Unix sockets.

    It names the kernel and its network namespace; empty where the kernel does not tell.
    """
    try:
        boot_id = (proc / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id}/{(proc / 'self/ns/net').stat().st_ino}"
    except OSError:
        return ""


def sleep_precisely() -> None:
    """Let short sleeps of the calling thread end on time, and not up to 50 us later.

    No harm is done where the kernel refuses. Source: prctl(2), PR_SET_TIMERSLACK.
    """
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0)
