"""When a unit that has died is started again."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_DOUBLINGS = 32
"""No number that overflows, however often an engine is given up."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Exponential back-off, until too many deaths in a row came too quickly."""

    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    quick_s: float = 60.0
    """A death within this time of being ready, or before it, is a quick one; a later one starts the
    count anew.
    """
    max_quick_deaths: int = 5
    first_retry_s: float = 60.0
    max_retry_s: float = 900.0
    """How long an engine that was given up is left alone: twice as long each time, up to this."""

    def is_quick(self, ready_for_s: float | None) -> bool:
        return ready_for_s is None or ready_for_s < self.quick_s

    def delay_s(self, num_quick_deaths: int) -> float | None:
        """Seconds until the next start after so many quick deaths in a row; None: give up."""
        if num_quick_deaths >= self.max_quick_deaths:
            return None
        return float(min(self.max_delay_s, self.first_delay_s * 2 ** max(0, num_quick_deaths - 1)))

    def retry_delay_s(self, num_times: int) -> float:
        """Seconds until an engine is tried again that was given up so many times in a row, once at
        least.
        """
        doublings = min(num_times - 1, _MAX_DOUBLINGS)
        return float(min(self.max_retry_s, self.first_retry_s * 2**doublings))
