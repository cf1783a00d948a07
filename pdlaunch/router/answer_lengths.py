"""Remembers how long answers are, as far as estimates need it."""

from __future__ import annotations

WEIGHT = 1 / 32
"""Weight of the latest answer; of the first ones, all count the same."""
SHORT_BY = 2.0
"""A short answer has so many usual deviations fewer tokens than the usual one.

Where lengths vary as much as those of chats do, it may have a single token; where all answers have
the same length, it has that.
"""


class AnswerLengths:
    """Keeps the mean of the latest answers' lengths, and of their deviations from it."""

    def __init__(self) -> None:
        self._num_answers = 0
        self._mean = 0.0
        self._deviation = 0.0

    def add(self, num_tokens: float) -> None:
        """Take the length of an answer."""
        self._num_answers += 1
        if self._num_answers > 1:
            weight = max(WEIGHT, 1 / (self._num_answers - 1))
            self._deviation += weight * (abs(num_tokens - self._mean) - self._deviation)
        self._mean += max(WEIGHT, 1 / self._num_answers) * (num_tokens - self._mean)

    @property
    def usual_tokens(self) -> float | None:
        """Return the usual length; None before the first answer."""
        return self._mean if self._num_answers else None

    @property
    def least_tokens(self) -> float | None:
        """Return the length of a short answer; None before two are known."""
        if self._num_answers < 2:
            return None
        return max(1.0, self._mean - SHORT_BY * self._deviation)
