"""Questions about a lease that this rank has not been told of yet.

Rank 0 of a TP group lets the answer of a prefill go when it has sent the grants to the other ranks.
A reader may be at one of them before its grant is: the question then waits for it, in order, for a
while. Who awaits a prompt that is being computed waits longer, for the next of its blocks or for
the lease; a reader has one such question, the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pdlaunch.protocol.ids import ReaderId
from pdlaunch.protocol.side_channel import PullBegin, PullEnd, ToPrefillSide

GRANT_LAG_S = 2.0
"""A rank hears of a lease at most this long after its readers do; later, and for a lease that never
was, they are refused.
"""
LONGEST_WAIT_S = 60.0
"""For who awaits a prompt: it may be far from computed. Then the reader is refused, and comes
later.
"""
MAX_WAITING = 4096
"""Further questions are answered at once."""
MAX_AWAITING = 1024
"""The same for those that await a prompt: they leave room for pulls."""


@dataclass(frozen=True, slots=True)
class _Question:
    identity: bytes
    """Of the reader's socket."""
    message: ToPrefillSide
    deadline_s: float


class EarlyQuestions:
    """Keeps what came too early. The transfer thread owns it."""

    def __init__(
        self, is_early: Callable[[ToPrefillSide], bool], clock: Callable[[], float]
    ) -> None:
        self._is_early = is_early
        self._clock = clock
        self._waiting: list[_Question] = []

    def sift(
        self, received: Iterable[tuple[bytes, ToPrefillSide]]
    ) -> list[tuple[bytes, ToPrefillSide]]:
        """What can be answered now: of the earlier questions first, then of those just received."""
        now_s = self._clock()
        for identity, message in received:
            self._waiting.append(_Question(identity, message, self._deadline_s(message, now_s)))
        questions, self._waiting = self._waiting, []
        due: list[tuple[bytes, ToPrefillSide]] = []
        for question in questions:
            limit = MAX_AWAITING if _awaits(question.message) else MAX_WAITING
            if (
                now_s < question.deadline_s
                and len(self._waiting) < limit
                and self._is_early(question.message)
            ):
                self._waiting.append(question)
            else:
                due.append((question.identity, question.message))
        return due

    def drop_readers(self, is_there: Callable[[ReaderId], bool]) -> None:
        """Who awaited a prompt and is gone shall have no share of its lease. ``is_there``: of a
        reader, by its name.
        """
        self._waiting = [
            question
            for question in self._waiting
            if not (isinstance(question.message, PullBegin) and question.message.awaits)
            or is_there(question.message.reader)
        ]

    def next_deadline_s(self) -> float:
        """Clock time at which the next of them is to be answered in any case."""
        return min((question.deadline_s for question in self._waiting), default=float("inf"))

    def _deadline_s(self, message: ToPrefillSide, now_s: float) -> float:
        """Until when it may wait. One that awaits a prompt goes with the next of its reader, or
        with the end of the pull.
        """
        if not isinstance(message, PullBegin | PullEnd):
            return now_s + GRANT_LAG_S
        earlier = next(
            (question for question in self._waiting if _is_awaited_by(message, question.message)),
            None,
        )
        if earlier is not None:
            self._waiting.remove(earlier)
        if not _awaits(message):
            return now_s + GRANT_LAG_S
        return now_s + LONGEST_WAIT_S if earlier is None else earlier.deadline_s


def _awaits(message: ToPrefillSide) -> bool:
    return isinstance(message, PullBegin) and message.awaits


def _is_awaited_by(message: PullBegin | PullEnd, earlier: ToPrefillSide) -> bool:
    if not (isinstance(earlier, PullBegin) and earlier.awaits):
        return False
    return (earlier.lease_id, earlier.reader) == (message.lease_id, message.reader)
