"""Questions about a lease that this rank has not been told of yet.

Rank 0 of a TP group lets the answer of a prefill go when it has sent the grants to the other ranks. A reader may be at one of
them before its grant is: the question then waits for it, in order, for a while. Who asks for word of a lease (``AwaitLease``)
does so while the prompt is computed, or before, and waits longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pdlaunch.protocol.side_channel import AwaitLease, ToHolder

GRANT_LAG_S = 2.0
"""A rank hears of a lease at most this long after its readers do; later, and for a lease that never was, they are refused."""
LONGEST_WAIT_S = 60.0
"""For who asked to be told of a lease: the prompt may be far from computed. Then the reader is refused, and comes later."""
MAX_WAITING = 4096
"""Further questions are answered at once."""
MAX_AWAITING = 1024
"""The same for those for word of a lease: they leave room for pulls."""


@dataclass(frozen=True, slots=True)
class _Question:
    identity: bytes
    """Of the reader's socket."""
    message: ToHolder
    deadline_s: float


class EarlyQuestions:
    """Keeps what came too early. The transfer thread owns it."""

    def __init__(self, is_early: Callable[[ToHolder], bool], clock: Callable[[], float]) -> None:
        self._is_early = is_early
        self._clock = clock
        self._waiting: list[_Question] = []

    def sift(self, received: Iterable[tuple[bytes, ToHolder]]) -> list[tuple[bytes, ToHolder]]:
        """What can be answered now: of the earlier questions first, then of those just received."""
        now_s = self._clock()
        questions = [
            *self._waiting,
            *(_Question(identity, message, now_s + _patience_s(message)) for identity, message in received),
        ]
        self._waiting = []
        due: list[tuple[bytes, ToHolder]] = []
        for question in questions:
            limit = MAX_AWAITING if isinstance(question.message, AwaitLease) else MAX_WAITING
            if now_s < question.deadline_s and len(self._waiting) < limit and self._is_early(question.message):
                self._waiting.append(question)
            else:
                due.append((question.identity, question.message))
        return due

    def next_deadline_s(self) -> float:
        """Clock time at which a question will wait no longer."""
        return min((question.deadline_s for question in self._waiting), default=float("inf"))


def _patience_s(message: ToHolder) -> float:
    return LONGEST_WAIT_S if isinstance(message, AwaitLease) else GRANT_LAG_S
