"""Keeps questions that cannot be answered yet.

Rank 0 of a TP group lets the answer of a prefill go when it has sent the grants to the other ranks.
So a decode rank may ask one of them before its grant is there: the question then waits for it, in
order, for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pdlaunch.protocol.side_channel import ToPrefillSide

GRANT_LAG_S = 2.0
"""A rank hears of a lease at most this long after its readers do. Questions that come later, or
about a lease that never was, are refused.
"""
MAX_WAITING = 4096
"""Further questions are answered at once."""


@dataclass(frozen=True, slots=True)
class _Question:
    identity: bytes
    """Names the socket of the decode rank that asks."""
    message: ToPrefillSide
    deadline_at: float


class PendingQuestions:
    """Keeps questions until they can be answered. The transfer thread owns it."""

    def __init__(
        self, must_wait: Callable[[ToPrefillSide], bool], clock: Callable[[], float]
    ) -> None:
        self._must_wait = must_wait
        self._clock = clock
        self._waiting: list[_Question] = []

    def sift(
        self, received: Iterable[tuple[bytes, ToPrefillSide]]
    ) -> list[tuple[bytes, ToPrefillSide]]:
        """Return what can be answered now: first questions that have waited, then those just
        received. The rest waits.
        """
        now = self._clock()
        self._waiting += [_Question(*each, now + GRANT_LAG_S) for each in received]
        # In their order: the end of a pull must not overtake its beginning.
        questions, self._waiting = self._waiting, []
        due: list[tuple[bytes, ToPrefillSide]] = []
        for question in questions:
            if (
                now < question.deadline_at
                and len(self._waiting) < MAX_WAITING
                and self._must_wait(question.message)
            ):
                self._waiting.append(question)
            else:
                due.append((question.identity, question.message))
        return due

    def next_deadline_at(self) -> float | None:
        """Return when the next question is to be answered in any case."""
        return min((question.deadline_at for question in self._waiting), default=None)
