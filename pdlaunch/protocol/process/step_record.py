"""Records which requests a rank computes, in memory that outlives the rank, so that the supervisor
knows the last step of a dead rank.

The supervisor makes the record of each rank 0 and keeps it mapped. The rank inherits the descriptor
and writes before each step, without a system call::

    words of 64 bits   number of requests │ request; top bit: it is a suspect │ ..

A request is recorded by the number that the router gave it (``origin``); 0 stands for no number.
"""

import mmap
import os
from array import array
from collections.abc import Sequence

import msgspec

from pdlaunch.protocol.ids import PromptOrigin

SUSPECT_BIT = 1 << 63
MAX_REQUESTS = 8191
_NUM_BYTES = (1 + MAX_REQUESTS) * 8


class LastStep(msgspec.Struct, frozen=True):
    origins: frozenset[PromptOrigin] = frozenset()
    suspects: frozenset[PromptOrigin] = frozenset()  # those already suspects before; one at most


def new_step_record() -> tuple[int, mmap.mmap]:
    """Return a descriptor for the rank, which the caller must close, and its mapped memory."""
    descriptor = os.memfd_create("pdlaunch-step")
    os.ftruncate(descriptor, _NUM_BYTES)
    return descriptor, mmap.mmap(descriptor, _NUM_BYTES, prot=mmap.PROT_READ)


class StepRecord:
    """Writes the record of one rank; closes ``descriptor``, which is negative without a record."""

    def __init__(self, descriptor: int) -> None:
        self._words = memoryview(mmap.mmap(descriptor, _NUM_BYTES)).cast("Q")
        if descriptor >= 0:
            os.close(descriptor)

    def write(self, marks: Sequence[int]) -> None:
        """Write the origin of each request in flight, with ``SUSPECT_BIT`` for a suspect."""
        known = array("Q", marks[:MAX_REQUESTS])
        # The number is written last: if the rank is killed in between, the record has only requests
        # of this step and of the previous step.
        self._words[1 : 1 + len(known)] = known
        self._words[0] = len(known)


def read_step_record(record: mmap.mmap) -> LastStep:
    """Return the last recorded step."""
    words = array("Q", record[:])
    marks = [mark for mark in words[1 : 1 + words[0]] if mark]
    return LastStep(
        frozenset(PromptOrigin(mark & ~SUSPECT_BIT) for mark in marks),
        frozenset(PromptOrigin(mark & ~SUSPECT_BIT) for mark in marks if mark & SUSPECT_BIT),
    )
