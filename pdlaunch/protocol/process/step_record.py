"""Records which requests a rank computes, in memory that outlives it, so that the supervisor knows
the last step of a rank that died.

The supervisor makes the record of each rank 0 and keeps it mapped; the rank inherits the descriptor
and writes before each step, without a system call::

    words of 64 bits   number of requests │ request, its top bit: it is a suspect │ ..

Requests stand here by the number that the router gave them (``origin``); 0 is none.
"""

from __future__ import annotations

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
    suspects: frozenset[PromptOrigin] = frozenset()  # of ``origins``, suspects already: one at most


def new_step_record() -> tuple[int, mmap.mmap]:
    """Return a descriptor for the rank, which the caller closes, and the memory behind it."""
    descriptor = os.memfd_create("pdlaunch-step")
    os.ftruncate(descriptor, _NUM_BYTES)
    return descriptor, mmap.mmap(descriptor, _NUM_BYTES, prot=mmap.PROT_READ)


class StepRecord:
    """Writes the record of one rank.

    ``descriptor`` is closed here; negative: nobody reads the record.
    """

    def __init__(self, descriptor: int) -> None:
        self._words = memoryview(mmap.mmap(descriptor, _NUM_BYTES)).cast("Q")
        if descriptor >= 0:
            os.close(descriptor)

    def write(self, marks: Sequence[int]) -> None:
        """Write the origin of each request in flight, with ``SUSPECT_BIT`` for a suspect."""
        known = array("Q", marks[:MAX_REQUESTS])
        # The number last: a rank that is killed in between leaves requests of this step and of the
        # one before, and no others.
        self._words[1 : 1 + len(known)] = known
        self._words[0] = len(known)


def read_step_record(record: mmap.mmap) -> LastStep:
    """Return what was written last."""
    words = array("Q", record[:])
    marks = [mark for mark in words[1 : 1 + words[0]] if mark]
    return LastStep(
        frozenset(PromptOrigin(mark & ~SUSPECT_BIT) for mark in marks),
        frozenset(PromptOrigin(mark & ~SUSPECT_BIT) for mark in marks if mark & SUSPECT_BIT),
    )
