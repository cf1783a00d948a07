"""Keeps questions that cannot be answered yet.

Rank 0 of a TP group lets the answer of a prefill go when it has sent the grants to the other ranks.
So a decode rank may ask one of them before its grant is there: the question then waits for it, in
order, for a while. A reader that awaits a prompt which is still being computed waits longer, for
the next of its blocks or for the lease; it has one such question here, its latest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from pdlaunch.protocol.ids import EngineId, engine_of_reader
from pdlaunch.protocol.side_channel import LONGEST_WAIT_S, PullBegin, PullEnd, ToPrefillSide

GRANT_LAG_S = 2.0
"""A rank hears of a lease at most this long after its readers do. Questions that come later, or
about a lease that never was, are refused.
"""
MAX_WAITING = 4096
"""Further questions are answered at once."""
MAX_AWAITING = 1024
"""Limit for questions that await a prompt; it is lower, so that they leave room for those of pulls.
"""


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
        for identity, message in received:
            self._waiting.append(_Question(identity, message, self._deadline_at(message, now)))
        # In their order: the end of a pull must not overtake its beginning.
        questions, self._waiting = self._waiting, []
        due: list[tuple[bytes, ToPrefillSide]] = []
        for question in questions:
            limit = MAX_AWAITING if _awaits(question.message) else MAX_WAITING
            if (
                now < question.deadline_at
                and len(self._waiting) < limit
                and self._must_wait(question.message)
            ):
                self._waiting.append(question)
            else:
                due.append((question.identity, question.message))
        return due

    def drop_readers_but_of(self, engine_ids: Collection[EngineId]) -> None:
        """Drop the questions that await a prompt of readers whose engine left the registry: they
        must not take a share of its lease.
        """
        self._waiting = [
            question
            for question in self._waiting
            if not (isinstance(question.message, PullBegin) and question.message.awaits)
            or engine_of_reader(question.message.reader) in engine_ids
        ]

    def next_deadline_at(self) -> float | None:
        """Return when the next question is to be answered in any case."""
        return min((question.deadline_at for question in self._waiting), default=None)

    def _deadline_at(self, message: ToPrefillSide, now: float) -> float:
        """Return until when a question may wait. A reader's question that awaits a prompt is
        dropped here for its next one, which keeps the deadline, or for the end of its pull.
        """
        if not isinstance(message, PullBegin | PullEnd):
            return now + GRANT_LAG_S
        earlier = next(
            (question for question in self._waiting if _is_awaited_by(message, question.message)),
            None,
        )
        if earlier is not None:
            self._waiting.remove(earlier)
        if not _awaits(message):
            return now + GRANT_LAG_S
        return now + LONGEST_WAIT_S if earlier is None else earlier.deadline_at


def _awaits(message: ToPrefillSide) -> bool:
    return isinstance(message, PullBegin) and message.awaits


def _is_awaited_by(message: PullBegin | PullEnd, earlier: ToPrefillSide) -> bool:
    if not (isinstance(earlier, PullBegin) and earlier.awaits):
        return False
    return (earlier.lease_id, earlier.reader) == (message.lease_id, message.reader)
