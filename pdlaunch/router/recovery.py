"""Decides, from the failures of one prompt, which engines may be asked next and when: pure."""

import msgspec

from pdlaunch.http.errors import unavailable
from pdlaunch.router.engine import EngineKey
from pdlaunch.router.engine_client import EngineFailure, EngineRefusal
from pdlaunch.router.policy import Hop


class RecoverySettings(msgspec.Struct, frozen=True, kw_only=True):
    # A request fails after this many failures of prefill, or of decode without new output between
    # them: it may kill engines.
    max_attempts: int = 4
    wait_s: float = 60.0  # seconds to wait after a failure for an engine to come back
    retry_wait_s: float = 1.0  # seconds until engines that failed or are busy are asked again


class Attempts:
    """Holds which engines have failed or refused a prompt. ``now`` is a time of one clock."""

    def __init__(self, limits: RecoverySettings) -> None:
        self.failure: EngineFailure | EngineRefusal | None = None  # the last one
        self.tried: set[EngineKey] = set()  # may be listed still; not asked before ``_retry_at``
        self.num_failures: dict[Hop, int] = {"prefill": 0, "decode": 0}
        self._limits = limits
        self._retry_at = 0.0
        # Time of the first failure since new output: the wait ends even if engines fail in turn.
        self.since_at: float | None = None

    def are_over(self, hop: Hop) -> bool:
        return self.num_failures[hop] >= self._limits.max_attempts

    def add(self, hop: Hop, failure: EngineFailure | EngineRefusal, now: float) -> None:
        # An engine that turned the request away was not killed by it.
        self.num_failures[hop] += hop == "prefill" or not failure.turned_away
        self.failure = failure
        self.tried.add(failure.engine.key)
        self._retry_at = now + self._limits.retry_wait_s
        self.since_at = self.since_at or now

    def progressed(self, *, may_kill: bool) -> None:
        self.since_at = None
        if not may_kill:
            self.num_failures["decode"] = 0

    def prefilled(self) -> None:
        self.failure = self.since_at = None
        self.tried.clear()

    def wait_s(self, now: float, *, has_tokens: bool) -> float:
        """Return how long to wait for an engine; raise the last failure if none is expected."""
        # No local variable holds the failure: its traceback would keep the body in memory.
        self.since_at = self.since_at or now
        left_s = self.since_at + self._limits.wait_s - now
        # If all engines are busy, a request is refused unless its stream has begun.
        is_refused = isinstance(self.failure, EngineRefusal) and not has_tokens
        is_lost = isinstance(self.failure, EngineFailure) and not self.failure.may_return
        if left_s <= 0 or is_refused or is_lost:
            message = "no engine can continue this request"
            raise self.failure or unavailable(message, "no_engine_ready")
        return min(left_s, max(0.0, self._retry_at - now)) if self.tried else left_s

    def waited(self, now: float) -> None:
        if now >= self._retry_at:
            self.tried.clear()
