"""How late the kernel may wake a thread that sleeps."""

from __future__ import annotations

import ctypes

_PR_SET_TIMERSLACK = 29
SLACK_NS = 1000


def sleep_precisely() -> None:
    """Short sleeps of the calling thread end on time, and not up to 50 us later; no harm where the
    kernel refuses.

    Source: prctl(2), PR_SET_TIMERSLACK.
    """
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0)
